"""Products whose backward leaves the gradient of the weight for later (report sec. 3.2.1).

For the rank before, a pipeline stage needs the gradient of its input soon; that of its weights can
wait until there is nothing else to do. So the backward of a `Deferred` weight hands out, instead of
x^T dy, both factors: as the gradients of arrays that nothing reads. `weight_gradient` is the rest.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.numerics.fp8 import (
    Fp8Weight,
    SavedInput,
    SwiGLUInput,
    WgradOperands,
    fp8_matmul,
    wgrad,
    wgrad_operands,
)
from dsv3_jax.numerics.kernels import pick
from dsv3_jax.numerics.quantize import QuantizedTensor
from dsv3_jax.shapes import Array, Float, Float32, Int


class Shapes(dict):
    """Of the factors of weights, by name; to be found out by a run of `jax.eval_shape`."""


@jax.tree_util.register_static
class Name(str):
    """Of a parameter: part of a pytree's structure, not of its leaves."""


class Deferred(NamedTuple):
    """A weight in use."""

    weight: Array | Fp8Weight
    name: Name
    factors: WgradOperands | Shapes  # never read; their gradients are the factors of the weight's


def deferred_product(
    save: SavedInput, inputs: Array | SwiGLUInput, w: Deferred, sizes, platform: str
) -> Float[Array, "r F"]:
    """x [r D] times W [D F], as `fp8_matmul` or `matmul`; a `SwiGLUInput` in FP8 alone."""
    finding_shapes = isinstance(w.factors, Shapes)
    if finding_shapes:
        _note(inputs, w, sizes)
    if isinstance(w.weight, Fp8Weight):
        weight = w.weight if finding_shapes else w.weight._replace(tap=w.factors)
        return fp8_matmul(save, inputs, weight, sizes)
    if finding_shapes:
        return _forward(save, platform, inputs, w.weight, sizes)[0]
    return _product(save, platform, inputs, w.weight, w.factors, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(save: SavedInput, platform: str, x, w, factors, sizes):
    return _forward(save, platform, x, w, sizes)[0]


def _forward(save: SavedInput, platform: str, x, w, sizes):
    x = x if save.name is None else checkpoint_name(x, save.name)
    if sizes is None:
        return jnp.einsum("rD,DF->rF", x, w.astype(x.dtype)), (x, w, sizes)
    return pick(platform).gmm(x, w.astype(x.dtype), sizes), (x, w, sizes)


def _backward(save: SavedInput, platform: str, residuals, grad):
    x, w, sizes = residuals
    if sizes is None:
        d_x = jnp.einsum("rF,DF->rD", grad, w.astype(grad.dtype))
    else:
        d_x = pick(platform).gmm(grad, w.astype(grad.dtype), sizes, transposed=True)
    return d_x, None, _operands(x, grad, sizes), None


_product.defvjp(
    lambda save, platform, x, w, factors, sizes: _forward(save, platform, x, w, sizes), _backward
)


def _operands(x, grad, sizes) -> WgradOperands:
    return WgradOperands(x, grad, None if sizes is None else sizes.astype(jnp.float32))


def _note(inputs: Array | SwiGLUInput, w: Deferred, sizes):
    """Write down the shapes of the factors of a product."""
    if w.name in w.factors:
        raise ValueError(f"the weight {w.name} is used twice in a layer, so no gradient can wait")
    in_fp8 = isinstance(w.weight, Fp8Weight)
    like = inputs.hidden if isinstance(inputs, SwiGLUInput) else inputs
    dims = (w.weight.quantized.values if in_fp8 else w.weight).shape[-2:]
    x, grad = (jax.ShapeDtypeStruct((like.shape[0], dim), like.dtype) for dim in dims)
    operands = wgrad_operands if in_fp8 else _operands
    w.factors[w.name] = jax.eval_shape(operands, x, grad, sizes)


def weight_gradient(factors: WgradOperands, platform: str) -> Float32[Array, "..."]:
    """The gradient of a weight [D F] or [e D F], in float32."""
    x, grad, sizes = factors
    if isinstance(x, QuantizedTensor):
        return wgrad(factors, platform)
    if sizes is None:
        return jnp.einsum("rD,rF->DF", x, grad, preferred_element_type=jnp.float32)
    groups: Int[Array, " e"] = sizes.astype(jnp.int32)
    return pick(platform).tgmm(x, grad, groups, jnp.float32)
