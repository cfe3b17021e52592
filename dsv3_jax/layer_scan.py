"""Equal layers, stacked: one array a parameter, run by `lax.scan`."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dsv3_jax.params import all_gather_params, grad_taps, grads_from_taps, reduce_scatter_grads
from sharding.layout import Layout

# What the backward of a layer finds in memory under remat="report"; norms, MLA up-projections, the
# attention scores and the SwiGLU product are computed again (report sec. 3.2.3 and 3.3.3).
KEPT_BY_REPORT = (
    "residual",
    "q_latent",
    "kv_latent",
    "attention",
    "gates",
    "expert_ids",
    "dispatched",
    "expert_hidden",
    "ffn_hidden",
)


def stack(make: Callable[[nnx.Rngs], nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.Module:
    """`n` layers in one module whose parameters have a leading dim of `n`."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(n))


def scan(fn: Callable, layers: nnx.Module, carry, xs, *, layout: Layout, compute, remat: str):
    """Run stacked layers in turn.

    Args:
        fn: (layer, carry, x) -> (carry, out); the layer's parameters come ready to use.
        xs: further inputs with a leading dim of one entry a layer, or None.
        compute: dtype of the weights in use.
        remat: "report", "full" (the backward repeats the layer) or "none".

    Returns:
        The last carry, and the outs, stacked.
    """
    graphdef, state = nnx.split(layers)

    def body(carry, item):
        params, x = item
        layer = nnx.merge(graphdef, all_gather_params(params, layout, compute))
        return fn(layer, carry, x)

    return lax.scan(kept_by(body, remat), carry, (state, xs), unroll=layout.unroll)


def scan_ahead(fn: Callable, layers: nnx.Module, carry, *, layout: Layout, compute, remat: str):
    """`scan` for ZeRO-3 that moves weights and gradients while layers compute.

    While a layer runs, the weights of the next one are gathered, and in the backward the gradients
    of the one after are summed and scattered. Derived from `scan`, the backward of a layer would
    wait for all three; so it is written out: a loop over the layers in reverse.

    Compilers put what nobody waits for at the end of a loop's body, where nothing hides it. So `fn`
    gets an identity for the middle of the layer, before its exchange: behind it the next weights
    are there, and in the backward the scattering begins there.

    Args:
        fn: (layer, carry, between) -> (carry, out); what it closes over must need no gradient.
    """
    graphdef, state = nnx.split(layers)
    n_layers = jax.tree.leaves(state)[0].shape[0]

    def stored(state, index):
        """Layer `index` as it is stored; the first or last for what lies beyond."""
        place = jnp.clip(index, 0, n_layers - 1)
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, place, keepdims=False), state)

    def gathered(shards):
        return all_gather_params(shards, layout, compute)

    def scattered(grads, like):
        return reduce_scatter_grads(grads, like, layout)

    def layer(weights, aside, tap, carry):
        between = functools.partial(_between, scattered, aside, tap)
        return fn(nnx.merge(graphdef, weights), carry, between)

    @jax.custom_vjp
    def run(state, carry):
        return forward(state, carry)[0]

    def forward(state, carry):
        def body(carry_weights, index):
            carry, weights = carry_weights
            coming, tap = gathered(stored(state, index + 1)), grad_taps(stored(state, index))
            d_after, tap = jax.tree.map(jnp.zeros_like, (grad_taps(weights), tap))
            inputs = (weights, (coming, d_after), tap)
            (carry, out), pull = jax.vjp(kept_by(layer, remat), *inputs, carry)
            return (carry, coming), (out, without(pull, inputs))

        start, layers = (carry, gathered(stored(state, 0))), jnp.arange(n_layers)
        (carry, _), (outs, pulls) = lax.scan(body, start, layers, unroll=layout.unroll)
        return (carry, outs), (state, pulls)

    def backward(saved, grads):
        (state, pulls), (d_carry, d_outs) = saved, grads

        def put(total, index, d_shards):
            """`total` with the gradient of layer `index` in its place."""
            place = jnp.clip(index, 0, n_layers - 1)
            update = functools.partial(lax.dynamic_update_index_in_dim, index=place, axis=0)
            return jax.tree.map(update, total, d_shards)

        def body(parts, item):
            (d_carry, weights, d_after, total), (index, pull) = parts, item
            coming, tap = gathered(stored(state, index - 1)), grad_taps(stored(state, index))
            d_out = jax.tree.map(functools.partial(_entry, index), d_outs)
            pull = with_inputs(pull, (weights, (coming, d_after), tap))
            d_weights, _, d_shards, d_carry = pull((d_carry, d_out))
            total = put(total, index + 1, d_shards)
            return (d_carry, coming, grad_taps(d_weights), total), None

        weights = gathered(stored(state, n_layers - 1))
        zeros = jax.tree.map(jnp.zeros_like, (grad_taps(weights), grad_taps(state)))
        (d_carry, _, d_first, total), _ = lax.scan(
            body,
            (d_carry, weights, *zeros),
            (jnp.arange(n_layers), pulls),
            reverse=True,
            unroll=layout.unroll,
        )
        total = put(total, 0, scattered(d_first, grad_taps(stored(state, 0))))
        return grads_from_taps(state, total), d_carry

    run.defvjp(forward, backward)
    return run(state, carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _between(scattered, aside, tap, x):
    """`x`, but not before the weights of the next layer are there.

    From here on the backward scatters the gradients of the layer after, which are the second part
    of `aside`; their shards come out as the gradient of `tap`.
    """
    return lax.optimization_barrier((x, aside[0]))[0]


def _between_forward(scattered, aside, tap, x):
    return _between(scattered, aside, tap, x), (aside[1], tap)


def _between_backward(scattered, saved, grad):
    d_after, tap = saved
    grad, d_after = lax.optimization_barrier((grad, d_after))
    return None, scattered(d_after, tap), grad


_between.defvjp(_between_forward, _between_backward)


def kept_by(fn: Callable, remat: str) -> Callable:
    """`fn`, whose backward finds in memory what the policy says."""
    if remat == "none":
        return fn
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT_BY_REPORT)
    return jax.checkpoint(fn, policy=policy if remat == "report" else None, prevent_cse=False)


def _entry(index, grads):
    """Entry `index` of stacked gradients; integers have none."""
    if grads.dtype == jax.dtypes.float0:
        return np.zeros(grads.shape[1:], grads.dtype)
    return lax.dynamic_index_in_dim(grads, index, keepdims=False)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Input:
    """Stands in a saved backward for an input, by its number, that is not to be saved."""

    number: int


def without(pull, inputs):
    """A backward function without these inputs among what it has saved."""
    numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(inputs))}
    return jax.tree.map(lambda x: _Input(numbers[id(x)]) if id(x) in numbers else x, pull)


def with_inputs(pull, inputs):
    """The inverse of `without`; the inputs may be other ones."""
    leaves = jax.tree.leaves(inputs)
    return jax.tree.map(
        lambda x: leaves[x.number] if isinstance(x, _Input) else x,
        pull,
        is_leaf=lambda x: isinstance(x, _Input),
    )
