"""Matmuls whose weight gradient comes later: the split of BW into B and W (report sec. 3.2.1).

The stage before waits for the gradient of its output (dgrad); the gradient of the weights (wgrad)
can wait until a rank has nothing else to do. So the backward of a `DeferredWgrad` hands out the
operands x and dy instead of dW = x^T dy. JAX lets a backward return nothing but gradients of
inputs. So each such weight brings zeros in the shape of its operands as a further input, which no
forward reads and whose "gradient" the operands are. `wgrad_of` multiplies them later.

The shape of the zeros depends on how many rows a layer gives to each matmul, which only the layer
knows: `operand_shapes` traces it once, ahead of time.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.extend.core
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

OperandShapes = dict  # by parameter path: WgradOperands of ShapeDtypeStructs
INPUT_TAG = "wgrad input of "


@jax.tree_util.register_static
class ParamPath(str):
    """The path of a parameter: part of a pytree's structure, not of its leaves."""


class DeferredWgrad(NamedTuple):
    """A weight whose gradient is deferred."""

    weight: Array | Fp8Weight
    path: ParamPath
    operands: WgradOperands | None  # zeros; None while `operand_shapes` looks for their shapes


def operand_shapes(fn: Callable, weights: dict, *args) -> OperandShapes:
    """Return the shapes of the wgrad operands of all deferred weights that `fn(*args)` uses.

    Args:
        fn: a function that uses `weights` as `DeferredWgrad(weight, path, None)`: their inputs are
            then tagged with the path, and this finds the tags in its jaxpr.
        weights: arrays or `Fp8Weight`s by path, those of `fn` or more.

    Raises:
        ValueError: a weight is used twice: its operands would be added up.
    """
    found: OperandShapes = {}
    for equation in _equations(jax.make_jaxpr(fn)(*args).jaxpr):
        tag = equation.params["name"] if equation.primitive.name == "name" else ""
        if not tag.startswith(INPUT_TAG):
            continue
        path, rows = tag.removeprefix(INPUT_TAG), equation.outvars[0].aval
        if path in found:
            raise ValueError(
                f"the weight {path} is used twice in a layer, so its gradient cannot be deferred"
            )
        in_fp8 = isinstance(weights[path], Fp8Weight)
        shape = (weights[path].quantized.values if in_fp8 else weights[path]).shape
        x, grad = (jax.ShapeDtypeStruct((rows.shape[0], dim), rows.dtype) for dim in shape[-2:])
        sizes = jax.ShapeDtypeStruct(shape[:1], jnp.int32) if len(shape) == 3 else None
        found[path] = jax.eval_shape(wgrad_operands if in_fp8 else _operands, x, grad, sizes)
    return found


def _equations(jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)


def split_matmul(
    save: SavedInput, inputs: Array | SwiGLUInput, w: DeferredWgrad, sizes, platform: str
) -> Float[Array, "r F"]:
    """Return x [r D] times W [D F], as `fp8_matmul` or `matmul`; a `SwiGLUInput` in FP8 only."""
    if w.operands is None:
        tag = INPUT_TAG + w.path
        if isinstance(inputs, SwiGLUInput):
            inputs = inputs._replace(hidden=checkpoint_name(inputs.hidden, tag))
        else:
            inputs = checkpoint_name(inputs, tag)
    if isinstance(w.weight, Fp8Weight):
        weight = w.weight if w.operands is None else w.weight._replace(tap=w.operands)
        return fp8_matmul(save, inputs, weight, sizes)
    if w.operands is None:
        return _forward(save, platform, inputs, w.weight, sizes)[0]
    return _split_matmul(save, platform, inputs, w.weight, w.operands, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _split_matmul(save: SavedInput, platform: str, x, w, operands, sizes):
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


_split_matmul.defvjp(
    lambda save, platform, x, w, operands, sizes: _forward(save, platform, x, w, sizes), _backward
)


def _operands(x, grad, sizes) -> WgradOperands:
    return WgradOperands(x, grad, None if sizes is None else sizes.astype(jnp.float32))


def wgrad_of(operands: WgradOperands, platform: str) -> Float32[Array, "..."]:
    """Return the gradient of a weight [D F] or [e D F], in float32."""
    x, grad, sizes = operands
    if isinstance(x, QuantizedTensor):
        return wgrad(operands, platform)
    if sizes is None:
        return jnp.einsum("rD,rF->DF", x, grad, preferred_element_type=jnp.float32)
    groups: Int[Array, " e"] = sizes.astype(jnp.int32)
    return pick(platform).tgmm(x, grad, groups, jnp.float32)
