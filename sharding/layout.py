"""The placement of parameters between steps, and their gathering for use.

Every dimension of a parameter has a logical axis name ("embed", "mlp", "expert", ...). From these
names and the global shape, this module chooses the mesh axes that the dimensions are split over.
There are two kinds of splits:

- Model parallelism. A dimension whose name is in `MODEL_PARALLEL_AXES` stays split while a layer
  uses the parameter: the experts, the vocabulary of the output head and the width of the embedding
  table are split over the expert axes.
- ZeRO. Master weights, gradients and Adam moments of every matrix are also split over all other
  data axes, and the weight is all-gathered for use: once per step with ZeRO-1, just before each
  layer with ZeRO-3. In both the gradient comes back by reduce-scatter. Level 0, for inference,
  stores whole what model parallelism does not split.

To ZeRO, pipeline stages are one more data axis: on pp4,dp2,ep4 a parameter is stored as on dp8,ep4.
So stages, however uneven and in whatever order, concern neither checkpoints nor optimizers. For
use, `scatter_to_stages` turns the stored shards of a stack of layers [L ...] into the whole weights
[S ...] of the layers of this pipeline rank: it all-gathers over the data axes, and one all-to-all
over `pp` brings each rank the missing parts of its layers. A layer may go to several ranks, as in
DualPipe; `gather_from_stages` returns the sum of the gradients of all its copies.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Num, Shaped

from sharding.collectives import all_gather, reduce_scatter
from sharding.dispatch import IDENTITY, WireFormat
from sharding.mesh import AXES, EXPERT_AXES, MeshSpec

MODEL_PARALLEL_AXES = ("expert", "vocab_shard", "embed_shard")

Axes = tuple[str, ...]
Shape = tuple[int, ...]
StageLayers = tuple[tuple[int, ...], ...]  # [pp S] layers of each rank; L where there is none
Gathers = tuple[tuple[int, Axes], ...]  # (dim, mesh axes) to all-gather, in order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """All that layers need to know about where they run.

    Args:
        mesh: the mesh axes and their sizes.
        zero: the ZeRO level, 0, 1 or 3.
        capacity_factor: receive buffer of one round of the expert all-to-all, over the buffer that
            a balanced load fills (`sharding/dispatch.py`).
        ragged: exchange rows by `ragged_all_to_all` instead of padded `all_to_all`.
        wire_format: the format in which rows travel to experts.
        unroll: layers that one iteration of the loop over layers runs.
        overlap_chunks: chunks of the sequence in layers with experts; one chunk's communication
            runs beside another's computation.
        context: ranks that each sequence is split over (`sharding/context_parallel.py`).
    """

    mesh: MeshSpec = MeshSpec()
    zero: int = 1
    capacity_factor: float = 1.25
    ragged: bool = False
    wire_format: WireFormat = IDENTITY
    unroll: int = 1
    overlap_chunks: int = 1
    context: int = 1

    def param_spec(self, axes: Axes, global_shape: Shape, n_stack_dims: int = 0) -> PartitionSpec:
        """Return the spec of a parameter between steps.

        Args:
            axes: the logical axis name of each dimension, without stack dimensions.
            global_shape: the sizes of the same dimensions.
            n_stack_dims: leading dimensions, such as layers, that are added to them.
        """
        split = _mesh_axes(self.mesh, self.zero, axes, global_shape)
        return PartitionSpec(*(None,) * n_stack_dims, *split)

    def gather_param(
        self, x: Shaped[Array, "..."], axes: Axes, global_shape: Shape, dtype: jnp.dtype
    ) -> Shaped[Array, "..."]:
        """All-gather a stored shard to the array that a layer uses, in `dtype`.

        `x` may have any leading stack dimensions. Its gradient is reduce-scattered in the stored
        dtype. Dimensions that are whole already stay as they are.
        """
        return _gather(x, self._gathers(x, axes, global_shape), self.mesh, dtype)

    def grad_tap(
        self, x: Shaped[Array, "..."], axes: Axes, global_shape: Shape
    ) -> Shaped[Array, "..."]:
        """Return zeros of the shape that `gather_param` gives, whose only use is their gradient.

        The gradient is reduce-scattered and becomes that of the stored shard `x`.
        """
        return _grad_tap(x, self._gathers(x, axes, global_shape), self.mesh)

    def reduce_scatter_grad(
        self,
        grad: Shaped[Array, "..."],
        shard: Shaped[Array, "..."],
        axes: Axes,
        global_shape: Shape,
    ) -> Shaped[Array, "..."]:
        """Turn the gradient of `gather_param(shard)` into that of `shard`, in its dtype."""
        gathers = self._gathers(shard, axes, global_shape)
        return _reduce_scatter(grad.astype(shard.dtype), gathers, self.mesh)

    def scatter_to_stages(
        self,
        x: Shaped[Array, "L ..."],
        axes: Axes,
        global_shape: Shape,
        dtype: jnp.dtype,
        layers: StageLayers,
    ) -> Shaped[Array, "S ..."]:
        """Turn a stored shard of a stack of layers into the whole weights of this rank's layers."""
        x, pp_dim = x.astype(dtype), None
        for dim, mesh_axes in self._gathers(x, axes, global_shape):
            if mesh_axes[0] == "pp":
                pp_dim = dim
            x = all_gather(x, _without_pp(mesh_axes), dim, self.mesh)
        return scatter_layers(x, pp_dim, layers)

    def gather_from_stages(
        self,
        grad: Shaped[Array, "S ..."],
        shard: Shaped[Array, "L ..."],
        axes: Axes,
        global_shape: Shape,
        layers: StageLayers,
    ) -> Shaped[Array, "L ..."]:
        """Turn the gradient of `scatter_to_stages(shard)` into that of `shard`.

        It is summed in float32.
        """
        gathers = self._gathers(shard, axes, global_shape)
        pp_dim = next((dim for dim, mesh_axes in gathers if mesh_axes[0] == "pp"), None)
        grad = gather_layers(grad.astype(jnp.float32), pp_dim, layers, shard.shape[0])
        gathers = tuple((dim, _without_pp(mesh_axes)) for dim, mesh_axes in gathers)
        return _reduce_scatter(grad, gathers, self.mesh).astype(shard.dtype)

    def shard_offset(self, x: Shaped[Array, "..."], axes: Axes, global_shape: Shape) -> tuple:
        """Return the index in each dimension of a parameter at which its stored shard begins."""
        split = _mesh_axes(self.mesh, self.zero, axes, global_shape)
        shape = x.shape[x.ndim - len(axes) :]
        return tuple(
            lax.axis_index(mesh_axes) * n if mesh_axes and n < size else 0
            for mesh_axes, n, size in zip(split, shape, global_shape, strict=True)
        )

    def pmax_amax(
        self, amax: Shaped[Array, "..."], axes: Axes, global_shape: Shape
    ) -> Shaped[Array, "..."]:
        """Return the maximum over the devices that ZeRO splits a parameter over."""
        split = _mesh_axes(self.mesh, self.zero, axes, global_shape)
        zero_axes = tuple(
            axis
            for name, mesh_axes in zip(axes, split, strict=True)
            if name not in MODEL_PARALLEL_AXES
            for axis in mesh_axes or ()
            if self.mesh.size(axis) > 1
        )
        return lax.pmax(amax, zero_axes) if zero_axes else amax

    def psum_replicated(
        self, grad: Shaped[Array, "..."], axes: Axes, global_shape: Shape
    ) -> Shaped[Array, "..."]:
        """Sum a stored gradient over the mesh axes along which its parameter is replicated.

        Over the other axes the reduce-scatter of `gather_param` has summed it already.
        """
        replicated = self.replicated_axes(axes, global_shape)
        return lax.psum(grad, replicated) if replicated else grad

    def replicated_axes(self, axes: Axes, global_shape: Shape) -> Axes:
        """Return the mesh axes along which the parameter is replicated."""
        split = _mesh_axes(self.mesh, self.zero, axes, global_shape)
        used = {axis for mesh_axes in split for axis in mesh_axes or ()}
        return tuple(axis for axis in AXES if axis not in used and self.mesh.size(axis) > 1)

    def _gathers(self, x: jax.Array, axes: Axes, global_shape: Shape) -> Gathers:
        """Return the dimensions of a shard to all-gather; not those that are whole already."""
        n_stack_dims = x.ndim - len(axes)
        split = _mesh_axes(self.mesh, self.zero, axes, global_shape)
        return tuple(
            (n_stack_dims + dim, split[dim])
            for dim, name in enumerate(axes)
            if split[dim]
            and name not in MODEL_PARALLEL_AXES
            and x.shape[n_stack_dims + dim] < global_shape[dim]
        )


ONE_DEVICE = Layout()


@functools.cache
def _mesh_axes(
    mesh: MeshSpec, zero: int, axes: Axes, global_shape: Shape
) -> tuple[tuple[str, ...] | None, ...]:
    """Return the mesh axes of each dimension: model parallelism, then ZeRO on dims that divide."""
    split: list = [EXPERT_AXES if name in MODEL_PARALLEL_AXES else None for name in axes]
    if zero == 0 or len(global_shape) == 1:  # vectors are too small to be worth an all-gather
        return tuple(split)
    replicas = ("pp", "dp") if mesh.pp > 1 else ("dp",)
    groups = [replicas] if any(split) else [replicas + EXPERT_AXES, replicas, EXPERT_AXES]
    for group in groups:
        used = {axis for mesh_axes in split for axis in mesh_axes or ()}
        for dim, size in enumerate(global_shape):
            free = split[dim] is None and not used & set(group)
            if free and size % mesh.size(*group) == 0:
                split[dim] = group
                break
    return tuple(split)


def _without_pp(mesh_axes: Axes) -> Axes:
    return tuple(axis for axis in mesh_axes if axis != "pp")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, gathers: Gathers, mesh: MeshSpec, dtype: jnp.dtype) -> jax.Array:
    x = x.astype(dtype)
    for dim, mesh_axes in gathers:
        x = all_gather(x, mesh_axes, dim, mesh)
    return x


def _gather_forward(x, gathers, mesh, dtype):
    return _gather(x, gathers, mesh, dtype), jnp.zeros((0,), x.dtype)


def _gather_backward(gathers, mesh, dtype, like, grad):
    return (_reduce_scatter(grad.astype(like.dtype), gathers, mesh),)


_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _grad_tap(x: jax.Array, gathers: Gathers, mesh: MeshSpec) -> jax.Array:
    shape = list(x.shape)
    for dim, mesh_axes in gathers:
        shape[dim] *= mesh.size(*mesh_axes)
    return jnp.zeros(shape, x.dtype)


_grad_tap.defvjp(
    lambda x, gathers, mesh: (_grad_tap(x, gathers, mesh), None),
    lambda gathers, mesh, _, grad: (_reduce_scatter(grad, gathers, mesh),),
)


def _reduce_scatter(grad: jax.Array, gathers: Gathers, mesh: MeshSpec) -> jax.Array:
    for dim, mesh_axes in reversed(gathers):
        grad = reduce_scatter(grad, mesh_axes, dim, mesh)
    return grad


def scatter_layers(
    x: Shaped[Array, "L ..."], dim: int | None, layers: StageLayers
) -> Shaped[Array, "S ..."]:
    """Return the layers of this pipeline rank, whole, from a stack of all layers.

    Args:
        dim: the dimension of `x` that is split over the ranks; None if every rank has all of it.
        layers: the layers of every rank; where there is none, the rank gets an arbitrary layer.
    """
    table = jnp.minimum(jnp.asarray(layers), x.shape[0] - 1)
    if dim is None:
        return x[table[lax.axis_index("pp")]]
    whole = lax.all_to_all(x[table], "pp", split_axis=0, concat_axis=dim + 1, tiled=True)
    return whole[0]


def gather_layers(
    grad: Shaped[Array, "S ..."], dim: int | None, layers: StageLayers, n_layers: int
) -> Shaped[Array, "L ..."]:
    """Return the sum over all copies of each layer: the transpose of `scatter_layers`.

    All layers have equally many copies. Where `dim` is None the sum over the ranks is left to the
    caller.
    """
    if dim is None:
        table = jnp.asarray(layers)[lax.axis_index("pp")]
        return jnp.zeros((n_layers, *grad.shape[1:]), grad.dtype).at[table].add(grad, mode="drop")
    parts = lax.all_to_all(grad[None], "pp", split_axis=dim + 1, concat_axis=0, tiled=True)
    flat = parts.reshape(-1, *parts.shape[2:])  # [pp S ...] -> [pp*S ...]
    copies = [np.flatnonzero(np.ravel(layers) == layer) for layer in range(n_layers)]
    return sum(flat[np.array(copy)] for copy in zip(*copies, strict=True))


def own_layers(x: Shaped[Array, "L ..."], layers: StageLayers) -> Shaped[Array, "S ..."]:
    """Return this pipeline rank's layers of a stack that every rank has."""
    return scatter_layers(x, None, layers)


def max_per_layer(x: Num[Array, " S"], layers: StageLayers, n_layers: int) -> Num[Array, " L"]:
    """Return this pipeline rank's maximum for each layer, 0 for the layers of other ranks."""
    table = jnp.asarray(layers)[lax.axis_index("pp")]
    return jnp.zeros(n_layers, x.dtype).at[table].max(x, mode="drop")
