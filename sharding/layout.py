"""Logical axis names -> mesh axes: where parameters are stored, and how they come together for use.

A parameter dimension whose name is in `KEPT` stays split while a layer uses it: experts, the
vocabulary of the output head and the width of the embedding table lie over the expert axes. All
other splits are ZeRO's: master weights, gradients and Adam moments of every matrix are shared out
over all data axes, and the weight is gathered for use. ZeRO-1 gathers once a step, ZeRO-3 once a
layer; the gradient comes back by reduce-scatter in both. Without ZeRO (level 0, for inference)
everything that is not kept split is stored whole.

Where there are pipeline stages, their axis is one more data axis to ZeRO: what is stored on
pp4,dp2,ep4 lies as on dp8,ep4. So stages, however uneven and in whatever order, concern neither
checkpoints nor optimizers: for use, the layers of a stack go to the ranks of their stages.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sharding.collectives import gather, scatter_sum
from sharding.dispatch import PLAIN, Wire
from sharding.mesh import AXES, EXPERT_AXES, MeshSpec
from sharding.stage_resharding import Layers, from_ranks, to_ranks

KEPT = ("expert", "vocab_shard", "embed_shard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """All that layers need to know about where they run: mesh, ZeRO level, the way to experts.

    `capacity` is the receive buffer of one round of the expert exchange over a balanced load;
    `ragged` and `wire` are how and in which format rows travel there (`sharding/dispatch.py`);
    `unroll` how many layers one turn of the loop over layers runs; `pieces` into how many the
    sequence is cut in layers with experts; `context` over how many ranks it lies
    (`sharding/context_parallel.py`).
    """

    mesh: MeshSpec = MeshSpec()
    zero: int = 1
    capacity: float = 1.25
    ragged: bool = False
    wire: Wire = PLAIN
    unroll: int = 1
    pieces: int = 1
    context: int = 1

    def stored(
        self, names: tuple[str, ...], sizes: tuple[int, ...], stack: int = 0
    ) -> PartitionSpec:
        """Placement of a parameter between steps.

        Args:
            names: logical axis names, one a dimension, without stack dimensions.
            sizes: global sizes of the same.
            stack: leading dimensions, such as layers, that come on top.
        """
        return PartitionSpec(*(None,) * stack, *_split(self.mesh, self.zero, names, sizes))

    def gather(self, x: jax.Array, names: tuple, sizes: tuple, dtype: jnp.dtype) -> jax.Array:
        """A stored shard -> the array that a layer uses, in `dtype`; leading stack dims are free.

        The gradient is summed in the stored dtype and comes back as a shard. What is whole already
        is left as it is.
        """
        return _gather(x, self._moves(x.ndim, x.shape, names, sizes), self.mesh, dtype)

    def _moves(self, ndim: int, shape: tuple, names: tuple, sizes: tuple) -> tuple:
        """Dims and mesh axes along which a shard of that shape is to be gathered."""
        stack, split = ndim - len(names), _split(self.mesh, self.zero, names, sizes)
        return tuple(
            (stack + dim, split[dim])
            for dim, name in enumerate(names)
            if split[dim] and name not in KEPT and shape[stack + dim] < sizes[dim]
        )

    def landing(self, x: jax.Array, names: tuple, sizes: tuple) -> jax.Array:
        """Of the shape that `gather` gives, to no use but that a gradient comes in for it.

        It comes back as that of the stored shard `x`, summed.
        """
        return _landing(x, self._moves(x.ndim, x.shape, names, sizes), self.mesh)

    def scatter(self, grad: jax.Array, like: jax.Array, names: tuple, sizes: tuple) -> jax.Array:
        """The gradient of what `gather` gives -> that of the shard, summed in the dtype of `like`.

        Args:
            like: the shard.
        """
        moves = self._moves(like.ndim, like.shape, names, sizes)
        return _scattered(grad.astype(like.dtype), moves, self.mesh)

    def to_stages(
        self, x: jax.Array, names: tuple, sizes: tuple, dtype: jnp.dtype, layers: Layers
    ) -> jax.Array:
        """A stored shard of a stack [L ...] -> whole arrays [S ...] of this rank's own layers."""
        x, staged = x.astype(dtype), None
        for dim, axes in self._moves(x.ndim, x.shape, names, sizes):
            if axes[0] == "pp":
                staged, axes = dim, axes[1:]
            x = gather(x, axes, dim, self.mesh)
        return to_ranks(x, staged, layers)

    def from_stages(
        self, grad: jax.Array, like: jax.Array, names: tuple, sizes: tuple, layers: Layers
    ) -> jax.Array:
        """The gradient of what `to_stages` gives -> that of the shard `like`, summed in float32."""
        moves = self._moves(like.ndim, like.shape, names, sizes)
        staged = next((dim for dim, axes in moves if axes[0] == "pp"), None)
        grad = from_ranks(grad.astype(jnp.float32), staged, layers, like.shape[0])
        moves = tuple((dim, axes[axes[0] == "pp" :]) for dim, axes in moves)
        return _scattered(grad, moves, self.mesh).astype(like.dtype)

    def start(self, x: jax.Array, names: tuple, sizes: tuple) -> tuple:
        """Where a stored shard begins in each dim of its parameter."""
        split, shape = _split(self.mesh, self.zero, names, sizes), x.shape[x.ndim - len(names) :]
        return tuple(
            jax.lax.axis_index(axes) * n if axes and n < size else 0
            for axes, n, size in zip(split, shape, sizes, strict=True)
        )

    def largest(self, x: jax.Array, names: tuple, sizes: tuple) -> jax.Array:
        """Maximum over the devices that share a parameter, each with its own x."""
        split = _split(self.mesh, self.zero, names, sizes)
        shared = (dim for name, dim in zip(names, split, strict=True) if dim and name not in KEPT)
        axes = tuple(axis for dim in shared for axis in dim if self.mesh.size(axis) > 1)
        return jax.lax.pmax(x, axes) if axes else x

    def whole_sum(self, grad: jax.Array, names: tuple, sizes: tuple) -> jax.Array:
        """A stored gradient, summed over the axes where its parameter is stored whole.

        Over the others `gather` has summed it already.
        """
        axes = self.missing(names, sizes)
        return jax.lax.psum(grad, axes) if axes else grad

    def missing(self, names: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[str, ...]:
        """Mesh axes over which the parameter is stored whole."""
        taken = {axis for axes in _split(self.mesh, self.zero, names, sizes) for axis in axes or ()}
        return tuple(axis for axis in AXES if axis not in taken and self.mesh.size(axis) > 1)


ONE_DEVICE = Layout()


@functools.cache
def _split(
    mesh: MeshSpec, zero: int, names: tuple, sizes: tuple
) -> tuple[tuple[str, ...] | None, ...]:
    """Mesh axes of each dimension: kept dims first, then ZeRO on the first dims that divide."""
    split: list = [EXPERT_AXES if name in KEPT else None for name in names]
    if zero == 0 or len(sizes) == 1:  # vectors are too small to be worth a gather
        return tuple(split)
    copies = ("pp", "dp") if mesh.pp > 1 else ("dp",)
    groups = [copies] if any(split) else [copies + EXPERT_AXES, copies, EXPERT_AXES]
    for group in groups:
        taken = {axis for axes in split for axis in axes or ()}
        for dim, size in enumerate(sizes):
            free = split[dim] is None and not taken & set(group)
            if free and size % mesh.size(*group) == 0:
                split[dim] = group
                break
    return tuple(split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, moves: tuple, mesh: MeshSpec, dtype: jnp.dtype) -> jax.Array:
    x = x.astype(dtype)
    for dim, axes in moves:
        x = gather(x, axes, dim, mesh)
    return x


def _gather_forward(x, moves, mesh, dtype):
    return _gather(x, moves, mesh, dtype), jnp.zeros((0,), x.dtype)


def _gather_backward(moves, mesh, dtype, like, grad):
    return (_scattered(grad.astype(like.dtype), moves, mesh),)


_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _landing(x: jax.Array, moves: tuple, mesh: MeshSpec) -> jax.Array:
    shape = list(x.shape)
    for dim, axes in moves:
        shape[dim] *= mesh.size(*axes)
    return jnp.zeros(shape, x.dtype)


_landing.defvjp(
    lambda x, moves, mesh: (_landing(x, moves, mesh), None),
    lambda moves, mesh, _, grad: (_scattered(grad, moves, mesh),),
)


def _scattered(grad: jax.Array, moves: tuple, mesh: MeshSpec) -> jax.Array:
    for dim, axes in reversed(moves):
        grad = scatter_sum(grad, axes, dim, mesh)
    return grad
