"""Logical axis names -> mesh axes: where parameters are stored, and how they come together for use.

A parameter dimension whose name is in `KEPT` stays split while a layer uses it: experts, the
vocabulary of the output head and the width of the embedding table lie over the expert axes. All
other splits are ZeRO's: master weights, gradients and Adam moments of every matrix are shared out
over all data axes, and the weight is gathered for use. ZeRO-1 gathers once a step, ZeRO-3 once a
layer; the gradient comes back by reduce-scatter in both. Without ZeRO (level 0, for inference)
everything that is not kept split is stored whole.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sharding.dispatch import PLAIN, Wire
from sharding.hops import gather, scatter_sum
from sharding.mesh import DATA_AXES, EXPERT_AXES, MeshSpec

KEPT = ("expert", "vocab_shard", "embed_shard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """All that layers need to know about where they run: mesh, ZeRO level, the way to experts.

    `capacity` is the receive buffer of one round of the expert exchange over a balanced load;
    `ragged` and `wire` are how and in which format rows travel there (`sharding/dispatch.py`);
    `unroll` how many layers one turn of the loop over layers runs; `pieces` into how many the
    sequence is cut in layers with experts.
    """

    mesh: MeshSpec = MeshSpec()
    zero: int = 1
    capacity: float = 1.25
    ragged: bool = False
    wire: Wire = PLAIN
    unroll: int = 1
    pieces: int = 1

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
        stack = x.ndim - len(names)
        split = _split(self.mesh, self.zero, names, sizes)
        moves = tuple(
            (stack + dim, split[dim])
            for dim, name in enumerate(names)
            if split[dim] and name not in KEPT and x.shape[stack + dim] < sizes[dim]
        )
        return _gather(x, moves, self.mesh, dtype)

    def whole_sum(self, grad: jax.Array, names: tuple, sizes: tuple) -> jax.Array:
        """A stored gradient, summed over the axes where its parameter is stored whole.

        Over the others `gather` has summed it already.
        """
        axes = self.missing(names, sizes)
        return jax.lax.psum(grad, axes) if axes else grad

    def missing(self, names: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[str, ...]:
        """Mesh axes over which the parameter is stored whole."""
        taken = {axis for axes in _split(self.mesh, self.zero, names, sizes) for axis in axes or ()}
        return tuple(axis for axis in DATA_AXES if axis not in taken and self.mesh.size(axis) > 1)


@functools.cache
def _split(
    mesh: MeshSpec, zero: int, names: tuple, sizes: tuple
) -> tuple[tuple[str, ...] | None, ...]:
    """Mesh axes of each dimension: kept dims first, then ZeRO on the first dims that divide."""
    split: list = [EXPERT_AXES if name in KEPT else None for name in names]
    if zero == 0 or len(sizes) == 1:  # vectors are too small to be worth a gather
        return tuple(split)
    groups = [("dp",)] if any(split) else [DATA_AXES, ("dp",), EXPERT_AXES]
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
    grad = grad.astype(like.dtype)
    for dim, axes in reversed(moves):
        grad = scatter_sum(grad, axes, dim, mesh)
    return (grad,)


_gather.defvjp(_gather_forward, _gather_backward)
