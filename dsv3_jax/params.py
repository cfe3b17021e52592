"""Parameters: how they are stored, gathered for use and quantised, and how gradients return.

**Stored.** Between steps a parameter is a float32 master weight, split into one shard per device:
ZeRO, over all data axes of the mesh (with pipeline stages `pp` counts as one more). A layer makes
it with `make_param`, as an `nnx.Param` whose metadata say all that is needed later:

    axes          logical name of each dimension, such as ("embed", "mlp")
    global_shape  its shape, without the leading dimension of stacked layers
    keep_fp32     used in float32 instead of the policy's compute format (norms, router, embedding)
    fp8           used in matmuls only, which the policy may ask to run in FP8

Layers name no mesh axis: `sharding/layout.py` derives the placement from `axes` and `global_shape`
(`param_specs`). A model's state is an `nnx.State` of such variables; the functions here map one
state to another, inside the manual region, where each device holds its own shards.

**Gathered.** `all_gather_params` casts shards to the compute format and all-gathers them: the whole
model once per step (ZeRO-1), or each layer when its turn comes (ZeRO-3, `layer_scan.py`). It is
differentiable: its backward casts the gradient to the master's float32 and reduce-scatters it, so
the gradient of a shard has the shape and placement of the shard.

**FP8.** Once per step, before they are gathered, `quantize_params` turns the weights of matmuls
into an `Fp8Weight`: float8 values, and a float32 scale for each block of 128x128. Quantising the
shard saves work and a factor of 4 in what travels. A block that lies across two shards has one
scale, from the largest number of both.

**Why a tap.** JAX insists that the gradient of an array has the array's own dtype, so float8 values
could only receive a float8 gradient, which is useless; and the derivative of rounding is zero
anyway. What we want is the straight-through gradient: dW in float32, as if nothing had been
rounded. It takes a way of its own. With the values rides a `GradTap`, a float32 array of zeros in
the weight's shape, which no matmul reads, so it costs nothing in the forward. The VJP of
`numerics.fp8.fp8_matmul` returns dW as the gradient of the tap. The tap itself is a function of the
master shard, with the value zero and reduce-scatter as its VJP, so from there the gradient reaches
the shard just as that of a weight in bfloat16 does. `grad_taps` gives for each parameter the array
whose gradient is the weight's: its tap, or the weight itself if that is not in FP8.

**Pipeline stages** change the gathering only: once per step `scatter_to_stages` sends the weights
of each layer to the ranks of its stage. FP8 weights come without a tap there, because the backward
is split (`numerics/split_backward.py`): it hands out the operands of dW instead, and dW returns to
the shards by `Layout.gather_from_stages`.
"""

import gc
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.numerics.fp8 import Fp8Weight, GradTap, Platform
from dsv3_jax.numerics.matmul import Weight
from dsv3_jax.numerics.quantize import QuantizedTensor, quantize_shard
from dsv3_jax.shapes import Array
from sharding.layout import Layout, StageLayers, scatter_layers
from sharding.mesh import REPLICATED


def make_param(
    rngs: nnx.Rngs,
    global_shape: tuple[int, ...],
    axes: tuple[str, ...],
    std: float,
    keep_fp32: bool = False,
    fp8: bool = False,
) -> nnx.Param:
    """Return a float32 parameter drawn from normal(0, std); the metadata are explained above."""
    value = std * jax.random.normal(rngs.params(), global_shape, jnp.float32)
    return nnx.Param(value, axes=axes, global_shape=global_shape, keep_fp32=keep_fp32, fp8=fp8)


def map_params(fn: Callable, state: nnx.State, *others: nnx.State) -> nnx.State:
    """Return the state with fn(dotted path, value, variable, *values in others) in each parameter.

    Variables that are no parameters stay as they are.
    """

    def visit(keys, variable: nnx.Variable, *rest: nnx.Variable) -> nnx.Variable:
        if not isinstance(variable, nnx.Param):
            return variable
        path = ".".join(str(key.key) for key in keys)
        values = (other.get_value() for other in rest)
        return variable.replace(fn(path, variable.get_value(), variable, *values))

    return jax.tree_util.tree_map_with_path(visit, state, *others, is_leaf=is_variable)


def named_arrays(state: nnx.State) -> dict:
    """Return the arrays of a state, or their shapes, by path such as "moe.attention.out.kernel"."""
    return {".".join(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def is_variable(x) -> bool:
    """Return whether a node of a tree is an NNX variable, the leaf that carries metadata."""
    return isinstance(x, nnx.Variable)


def param_specs(tree, layout: Layout):
    """Return the PartitionSpecs of a tree of variables: parameters, or moments of parameters.

    Variables without the metadata of a parameter are replicated.
    """

    def spec(leaf):
        if not (is_variable(leaf) and "axes" in leaf.get_metadata()):
            return REPLICATED
        if isinstance(value := leaf.get_value(), Fp8Weight):
            values = leaf.replace(value.quantized.values)
            return QuantizedTensor(spec(values), scale_spec(values, layout))
        return layout.param_spec(leaf.axes, leaf.global_shape, _n_stack_dims(leaf, leaf))

    return jax.tree.map(spec, tree, is_leaf=is_variable)


def scale_spec(variable: nnx.Param, layout: Layout):
    """Return the PartitionSpec of the scales of an FP8 weight in a layout without ZeRO.

    The experts of a weight lie on several devices; a single matrix is whole.
    """
    n_stack_dims = _n_stack_dims(variable, variable)
    return layout.param_spec(variable.axes[:-2], variable.global_shape[:-2], n_stack_dims)


def _n_stack_dims(x, variable: nnx.Param) -> int:
    """Return how many leading dimensions of `x` count stacked layers."""
    return len(x.shape) - len(variable.global_shape)


def quantize_params(state: nnx.State, layout: Layout, stats: nnx.State | None = None) -> nnx.State:
    """Return the stored shards with the weights of matmuls as `Fp8Weight`.

    Args:
        stats: from `zero_quant_stats`; its gradients are the statistics of all roundings.
    """

    def quantize_param(_, x: jax.Array, variable: nnx.Param, stats: jax.Array | None = None):
        if not variable.fp8:
            return x
        axes, shape = variable.axes, variable.global_shape
        shard = jax.lax.stop_gradient(x)
        quantized = quantize_shard(
            shard,
            layout.shard_offset(shard, axes, shape)[-2:],
            shape[-2:],
            lambda amax: layout.pmax_amax(amax, axes, shape),
        )
        return Fp8Weight(quantized, GradTap(x, stats), Platform(layout.mesh.platform))

    return map_params(quantize_param, state, *(() if stats is None else (stats,)))


def zero_quant_stats(state: nnx.State) -> nnx.State:
    """Return zeros [... 3 4] for each parameter.

    In the gradients, row 0 has the `QuantStats` of the activations, row 1 of the gradients, row 2
    of the weight itself.
    """

    def zeros(_, x: jax.Array, variable: nnx.Param) -> jax.Array:
        return jnp.zeros((*x.shape[: _n_stack_dims(x, variable)], 3, 4), jnp.float32)

    return map_params(zeros, state)


def all_gather_params(state: nnx.State, layout: Layout, compute: jnp.dtype) -> nnx.State:
    """Return the weights that layers use, in the format they use, from stored shards.

    What is gathered already stays as it is.
    """

    def gather(_, x: Weight, variable: nnx.Param) -> Weight:
        axes, shape = variable.axes, variable.global_shape
        if not isinstance(x, Fp8Weight):
            return layout.gather_param(x, axes, shape, x.dtype if variable.keep_fp32 else compute)
        values = layout.gather_param(x.quantized.values, axes, shape, x.quantized.values.dtype)
        tap = x.tap._replace(weight=layout.grad_tap(x.tap.weight, axes, shape))
        return x._replace(quantized=x.quantized._replace(values=values), tap=tap)

    return map_params(gather, state)


def reduce_scatter_grads(grads: nnx.State, like: nnx.State, layout: Layout) -> nnx.State:
    """Return the summed gradients of stored shards from those of gathered weights.

    Args:
        grads: gradients of `grad_taps` of the gathered weights.
        like: `grad_taps` of the stored shards: their shapes and dtypes.
    """

    def reduce_scatter(_, grad: Array | GradTap, variable: nnx.Param, like: Array | GradTap):
        axes, shape = variable.axes, variable.global_shape
        if isinstance(grad, GradTap):
            return grad._replace(
                weight=layout.reduce_scatter_grad(grad.weight, like.weight, axes, shape)
            )
        return layout.reduce_scatter_grad(grad, like, axes, shape)

    return map_params(reduce_scatter, grads, like)


def scatter_to_stages(
    state: nnx.State, layout: Layout, compute: jnp.dtype, layers: StageLayers
) -> nnx.State:
    """Return the weights of this rank's pipeline stages from stored shards of a stack of layers.

    Formats are those of `all_gather_params`; FP8 weights come without a tap.
    """

    def scatter(_, x: Weight, variable: nnx.Param) -> Weight:
        axes, shape = variable.axes, variable.global_shape
        if not isinstance(x, Fp8Weight):
            dtype = x.dtype if variable.keep_fp32 else compute
            return layout.scatter_to_stages(x, axes, shape, dtype, layers)
        values, scale = x.quantized
        values = layout.scatter_to_stages(values, axes, shape, values.dtype, layers)
        return x._replace(
            quantized=QuantizedTensor(values, scatter_layers(scale, None, layers)), tap=None
        )

    return map_params(scatter, state)


def grad_taps(state: nnx.State) -> nnx.State:
    """Return for each parameter the array whose gradient is the weight's: its tap, or itself."""
    return map_params(lambda _, x, __: x.tap if isinstance(x, Fp8Weight) else x, state)


def set_grad_taps(state: nnx.State, taps: nnx.State) -> nnx.State:
    """Return the weights with these taps: the inverse of `grad_taps`."""

    def set_tap(_, x: Weight, __, tap: Array | GradTap) -> Weight:
        return x._replace(tap=tap) if isinstance(x, Fp8Weight) else tap

    return map_params(set_tap, state, taps)


def grads_from_taps(state: nnx.State, grads: nnx.State) -> nnx.State:
    """Return the gradients of `grad_taps(state)` as gradients of the state itself."""

    def from_tap(_, x: Weight, __, grad: Array | GradTap) -> Weight:
        return x._replace(quantized=None, tap=grad) if isinstance(x, Fp8Weight) else grad

    return map_params(from_tap, state, grads)


def take_arrays(module: nnx.Module) -> dict:
    """Move all arrays out of a module and return them by path, as their only owner.

    The module can't be used any more. NNX leaves reference cycles behind, when models are filled
    and when states are flattened, that would keep the arrays alive: they are collected.
    """
    arrays = named_arrays(nnx.pop(module, nnx.Variable))
    gc.collect()
    return arrays
