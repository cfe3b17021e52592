"""Parameters with logical axes, and the matrix product that most of them are for."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.numerics.fp8 import Fp8Weight, Platform, SavedInput, Slot
from dsv3_jax.numerics.matmul import NOT_SAVED, Weight, matmul
from dsv3_jax.numerics.quantize import QuantizedTensor, quantize_shard
from dsv3_jax.shapes import Array, Float
from sharding.layout import Layout, StageLayers, scatter_layers
from sharding.mesh import REPLICATED


def weight(
    rngs: nnx.Rngs,
    sizes: tuple[int, ...],
    names: tuple[str, ...],
    std: float,
    wide: bool = False,
    fp8: bool = False,
) -> nnx.Param:
    """A normal(0, std) parameter in float32.

    Args:
        sizes: global sizes.
        names: logical axis of each dimension, see `sharding/layout.py`.
        wide: stays float32 where it is used, instead of the policy's compute format.
        fp8: is used in products alone, which the policy may want in FP8.
    """
    value = std * jax.random.normal(rngs.params(), sizes, jnp.float32)
    return nnx.Param(value, names=names, sizes=sizes, wide=wide, fp8=fp8)


def in_fp8(state: nnx.State, layout: Layout, counts: nnx.State | None = None) -> nnx.State:
    """Stored shards with the weights of products in FP8: once a step, whatever passes it makes.

    Args:
        counts: from `no_counts`; their gradients are how numbers became codes.
    """

    def one(x: jax.Array, variable: nnx.Param, counts: jax.Array | None = None) -> Weight:
        if not variable.fp8:
            return x
        about = (variable.names, variable.sizes)
        fixed = jax.lax.stop_gradient(x)
        codes = quantize_shard(
            fixed,
            layout.shard_offset(fixed, *about)[-2:],
            variable.sizes[-2:],
            lambda amax: layout.pmax_amax(amax, *about),
        )
        return Fp8Weight(codes, Slot(x, counts), Platform(layout.mesh.platform))

    return of_parameters(one, state, *([] if counts is None else [counts]))


def no_counts(state: nnx.State) -> nnx.State:
    """Zeros [... 3 4] for every parameter: of activations, gradients and itself, `QuantStats`."""

    def one(x: jax.Array, variable: nnx.Param) -> jax.Array:
        layers = x.ndim - len(variable.sizes)
        return jnp.zeros((*x.shape[:layers], 3, 4), jnp.float32)

    return of_parameters(one, state)


def assemble(state: nnx.State, layout: Layout, compute: jnp.dtype) -> nnx.State:
    """Stored shards of parameters -> the weights that layers use, in the format they use.

    Does nothing to what is assembled already.
    """

    def one(x: Weight, variable: nnx.Param):
        about = (variable.names, variable.sizes)
        if not isinstance(x, Fp8Weight):
            return layout.gather_param(x, *about, x.dtype if variable.wide else compute)
        values = layout.gather_param(x.quantized.values, *about, x.quantized.values.dtype)
        slot = x.slot._replace(weight=layout.grad_tap(x.slot.weight, *about))
        return x._replace(quantized=x.quantized._replace(values=values), slot=slot)

    return of_parameters(one, state)


def to_stages(
    state: nnx.State, layout: Layout, compute: jnp.dtype, layers: StageLayers
) -> nnx.State:
    """Stored shards of a stack of layers -> the weights of this rank's own layers, as `assemble`.

    Those in FP8 come without a slot.
    """

    def one(x: Weight, variable: nnx.Param):
        about = (variable.names, variable.sizes)
        if not isinstance(x, Fp8Weight):
            dtype = x.dtype if variable.wide else compute
            return layout.scatter_to_stages(x, *about, dtype, layers)
        values, scale = x.quantized
        values = layout.scatter_to_stages(values, *about, values.dtype, layers)
        return x._replace(
            quantized=QuantizedTensor(values, scatter_layers(scale, None, layers)), slot=None
        )

    return of_parameters(one, state)


def landings(state: nnx.State) -> nnx.State:
    """The arrays whose gradients are those of the weights: the slots of weights in FP8."""

    def one(x: Weight, _) -> Array | Slot:
        return x.slot if isinstance(x, Fp8Weight) else x

    return of_parameters(one, state)


def with_landings(state: nnx.State, slots: nnx.State) -> nnx.State:
    """The weights with these arrays where `landings` finds them."""

    def one(x: Weight, _, slot: Array | Slot) -> Weight:
        return x._replace(slot=slot) if isinstance(x, Fp8Weight) else slot

    return of_parameters(one, state, slots)


def landed(state: nnx.State, grads: nnx.State) -> nnx.State:
    """Gradients of `landings(state)` as those of the state."""

    def one(x: Weight, _, grad: Array | Slot) -> Weight:
        return x._replace(quantized=None, slot=grad) if isinstance(x, Fp8Weight) else grad

    return of_parameters(one, state, grads)


def scatter(grads: nnx.State, like: nnx.State, layout: Layout) -> nnx.State:
    """Gradients of weights in use, summed, as shards such as these."""

    def one(grad: Array | Slot, variable: nnx.Param, like: Array | Slot) -> Array | Slot:
        about = (variable.names, variable.sizes)
        if isinstance(grad, Slot):
            return grad._replace(
                weight=layout.reduce_scatter_grad(grad.weight, like.weight, *about)
            )
        return layout.reduce_scatter_grad(grad, like, *about)

    return of_parameters(one, grads, like)


def of_parameters(fn: Callable, state: nnx.State, *others: nnx.State) -> nnx.State:
    """fn(value, variable, *values in others) of every parameter; other variables stay."""

    def one(variable, *further):
        if not isinstance(variable, nnx.Param):
            return variable
        return variable.replace(
            fn(variable.get_value(), variable, *(x.get_value() for x in further))
        )

    return jax.tree.map(one, state, *others, is_leaf=lambda x: isinstance(x, nnx.Variable))


def specs(tree, layout: Layout):
    """PartitionSpecs: of each parameter, and of the moments of it, where the layout stores it."""

    def of(leaf):
        if not (isinstance(leaf, nnx.Variable) and "names" in leaf.get_metadata()):
            return REPLICATED
        if isinstance(value := leaf.get_value(), Fp8Weight):
            whole = leaf.replace(value.quantized.values)
            return QuantizedTensor(of(whole), scale_spec(whole, layout))
        n_stack_dims = len(leaf.shape) - len(leaf.sizes)
        return layout.param_spec(leaf.names, leaf.sizes, n_stack_dims)

    return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def scale_spec(variable: nnx.Param, layout: Layout):
    """Where the scales of a weight in FP8 lie that is stored whole, up to its experts."""
    stack = len(variable.shape) - len(variable.sizes)
    return layout.param_spec(variable.names[:-2], variable.sizes[:-2], stack)


def named_arrays(state: nnx.State) -> dict:
    """Return the arrays of a state, or their shapes, by path such as "moe.attention.out.kernel"."""
    return {".".join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


class Linear(nnx.Module):
    """x W, without bias."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        names: tuple[str, str],
        std: float,
        fp8: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.kernel = weight(rngs, (n_in, n_out), names, std, fp8=fp8)

    def __call__(
        self, x: Float[Array, "*B D"], save: SavedInput = NOT_SAVED
    ) -> Float[Array, "*B F"]:
        """x W; `save` says what the backward finds of x."""
        return matmul(x, self.kernel.get_value(), save)
