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

from dsv3_jax.numerics import fp8, gmm
from dsv3_jax.numerics.fp8 import Fp8Weight, SavedInput, WgradOperands
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


def deferred_product(save: SavedInput, x, w: Deferred, sizes, platform: str) -> Float[Array, "r F"]:
    """x [r D] times W [D F]; with `sizes`, rows of group i times `W[i]`, as `grouped_matmul`."""
    if isinstance(w.factors, Shapes):
        _note(save, x, w, sizes)
        return _forward(save, platform, x, w.weight, sizes)[0]
    return _product(save, platform, x, w.weight, w.factors, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(save: SavedInput, platform: str, x, w, factors, sizes):
    return _forward(save, platform, x, w, sizes)[0]


def _forward(save: SavedInput, platform: str, x, w, sizes):
    if isinstance(w, Fp8Weight):
        return fp8.forward(save, x, w, sizes, training=True)
    x = x if save.name is None else checkpoint_name(x, save.name)
    if sizes is None:
        return jnp.einsum("rD,DF->rF", x, w.astype(x.dtype)), (x, w, sizes)
    return gmm.gmm(x, w.astype(x.dtype), sizes, platform), (x, w, sizes)


def _backward(save: SavedInput, platform: str, saved, grad):
    x, w, sizes = saved[:3]
    if isinstance(w, Fp8Weight):
        d_x, factors, _ = fp8.backward(save, saved, grad)
        return d_x, None, factors, None
    if sizes is None:
        d_x, groups = jnp.einsum("rF,DF->rD", grad, w.astype(grad.dtype)), None
    else:
        d_x = gmm.gmm(grad, w.astype(grad.dtype), sizes, platform, transposed=True)
        groups = sizes.astype(jnp.float32)
    return d_x, None, WgradOperands(x, grad, groups), None


_product.defvjp(
    lambda save, platform, x, w, factors, sizes: _forward(save, platform, x, w, sizes), _backward
)


def deferred_gated_product(
    save: SavedInput, hidden, gates, w: Deferred, sizes
) -> Float[Array, "r D"]:
    """(gates * SwiGLU(hidden)) W in FP8, of whose backward `hidden` is what is kept."""
    if isinstance(w.factors, Shapes):
        _note(SavedInput(), hidden[:, : hidden.shape[1] // 2], w, sizes)
        return fp8.gated_forward(save, hidden, gates, w.weight, sizes)[0]
    return _gated_product(save, hidden, gates, w.weight, w.factors, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_product(save: SavedInput, hidden, gates, w, factors, sizes):
    return fp8.gated_forward(save, hidden, gates, w, sizes)[0]


def _gated_backward(save: SavedInput, saved, grad):
    d_inputs, factors, _ = fp8.gated_backward(saved, grad)
    return *d_inputs, None, factors, None


_gated_product.defvjp(
    lambda save, hidden, gates, w, factors, sizes: fp8.gated_forward(save, hidden, gates, w, sizes),
    _gated_backward,
)


def _note(save: SavedInput, x, w: Deferred, sizes):
    """Write down the shapes of the factors of a product."""
    if w.name in w.factors:
        raise ValueError(f"the weight {w.name} is used twice in a layer, so no gradient can wait")

    def factors(x, w, sizes):
        y, saved = _forward(save, "cpu", x, w, sizes)
        return _backward(save, "cpu", saved, y)[2]

    w.factors[w.name] = jax.eval_shape(factors, x, w.weight, sizes)


def weight_gradient(factors: WgradOperands, platform: str) -> Float32[Array, "..."]:
    """The gradient of a weight [D F] or [e D F], in float32."""
    x, grad, sizes = factors
    if isinstance(x, QuantizedTensor):
        return fp8.wgrad(factors, platform)
    if sizes is None:
        return jnp.einsum("rD,rF->DF", x, grad, preferred_element_type=jnp.float32)
    groups: Int[Array, " e"] = sizes.astype(jnp.int32)
    return gmm.tgmm(x, grad, groups, platform, jnp.float32)
