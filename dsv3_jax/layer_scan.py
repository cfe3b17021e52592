"""Equal layers, stacked with one array per parameter, and run by `lax.scan`.

`scan` is the plain one: its backward is what JAX derives from it. Under ZeRO-3 that is too slow.
Parameters are stored as shards there, so a layer's weights are gathered before it runs, gathered
again in its backward, and its gradients are reduce-scattered after it. In the derived backward all
three are in one iteration of the loop, one after the other: gather, compute, scatter. Nothing can
hide the communication, as an iteration of a loop begins when the last one has ended.

`scan_prefetch` is written by hand to overlap them. In the forward the carry holds the weights of
the layer that runs, and the iteration gathers those of the next. In the backward, a loop in
reverse, it holds the weights of the layer that runs and the gradients of the one that ran before:

    forward,  layer i:   compute i               | all-gather weights of i + 1
    backward, layer i:   recompute, backward i   | all-gather weights of i - 1
                                                 | reduce-scatter gradients of i + 1

Neither communication depends on the computation beside it. But a compiler puts what nothing waits
for at the end of a loop's body, where nothing is left to hide it. So the layer gets a function
`overlap_barrier`, an identity to apply in its middle, before its token exchange: in the forward it
passes only when the next weights are there, and in the backward the scattering begins there.

What the forward saves for the backward is `jax.vjp`'s function, a pytree. The gathered weights are
among its leaves and must not be saved for every layer, as ZeRO-3 is there to avoid just that:
`strip_inputs` takes them out.
"""

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

# The activations that remat="report" saves; norms, MLA up-projections, attention scores and the
# SwiGLU product are recomputed in the backward (report sec. 3.2.3 and 3.3.3).
SAVED_NAMES = (
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
    """Return `n` layers in one module whose parameters have a leading dim of `n`."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(n))


def scan(fn: Callable, layers: nnx.Module, carry, xs, *, layout: Layout, compute, remat: str):
    """Run stacked layers in turn.

    Args:
        fn: (layer, carry, x) -> (carry, out); the layer's parameters come gathered.
        xs: further inputs with a leading dim of one entry per layer, or None.
        compute: dtype of the gathered weights.
        remat: "report", "full" (the backward repeats the layer) or "none".

    Returns:
        The last carry, and the outs, stacked.
    """
    graphdef, state = nnx.split(layers)

    def body(carry, item):
        params, x = item
        layer = nnx.merge(graphdef, all_gather_params(params, layout, compute))
        return fn(layer, carry, x)

    return lax.scan(apply_remat(body, remat), carry, (state, xs), unroll=layout.unroll)


def scan_prefetch(fn: Callable, layers: nnx.Module, carry, *, layout: Layout, compute, remat: str):
    """Run stacked layers in turn, moving weights and gradients of ZeRO-3 while layers compute.

    Args:
        fn: (layer, carry, overlap_barrier) -> (carry, out); it must close over nothing that needs a
            gradient. `overlap_barrier` is the identity, for the middle of the layer.
    """
    graphdef, state = nnx.split(layers)
    n_layers = jax.tree.leaves(state)[0].shape[0]

    def shards_of(state, index):
        """Return layer `index` as it is stored; past the ends, the first or the last."""
        inside = jnp.clip(index, 0, n_layers - 1)
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, inside, keepdims=False), state)

    def gather(shards):
        return all_gather_params(shards, layout, compute)

    def scatter(grads, like):
        return reduce_scatter_grads(grads, like, layout)

    def layer(weights, other, tap, carry):
        barrier = functools.partial(_overlap_barrier, scatter, other, tap)
        return fn(nnx.merge(graphdef, weights), carry, barrier)

    @jax.custom_vjp
    def run(state, carry):
        return forward(state, carry)[0]

    def forward(state, carry):
        def body(carry_weights, index):
            carry, weights = carry_weights
            next_weights = gather(shards_of(state, index + 1))
            tap = grad_taps(shards_of(state, index))
            d_after, tap = jax.tree.map(jnp.zeros_like, (grad_taps(weights), tap))
            inputs = (weights, (next_weights, d_after), tap)
            (carry, out), pull = jax.vjp(apply_remat(layer, remat), *inputs, carry)
            return (carry, next_weights), (out, strip_inputs(pull, inputs))

        first = (carry, gather(shards_of(state, 0)))
        (carry, _), (outs, pulls) = lax.scan(
            body, first, jnp.arange(n_layers), unroll=layout.unroll
        )
        return (carry, outs), (state, pulls)

    def backward(residuals, grads):
        (state, pulls), (d_carry, d_outs) = residuals, grads

        def put(total, index, d_shards):
            """Return `total` with the gradient of layer `index`."""
            inside = jnp.clip(index, 0, n_layers - 1)
            update = functools.partial(lax.dynamic_update_index_in_dim, index=inside, axis=0)
            return jax.tree.map(update, total, d_shards)

        def body(loop_carry, item):
            (d_carry, weights, d_after, total), (index, pull) = loop_carry, item
            next_weights = gather(shards_of(state, index - 1))
            tap = grad_taps(shards_of(state, index))
            d_out = jax.tree.map(functools.partial(_entry, index), d_outs)
            pull = restore_inputs(pull, (weights, (next_weights, d_after), tap))
            d_weights, _, d_shards, d_carry = pull((d_carry, d_out))
            total = put(total, index + 1, d_shards)
            return (d_carry, next_weights, grad_taps(d_weights), total), None

        weights = gather(shards_of(state, n_layers - 1))
        zeros = jax.tree.map(jnp.zeros_like, (grad_taps(weights), grad_taps(state)))
        (d_carry, _, d_first, total), _ = lax.scan(
            body,
            (d_carry, weights, *zeros),
            (jnp.arange(n_layers), pulls),
            reverse=True,
            unroll=layout.unroll,
        )
        total = put(total, 0, scatter(d_first, grad_taps(shards_of(state, 0))))
        return grads_from_taps(state, total), d_carry

    run.defvjp(forward, backward)
    return run(state, carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _overlap_barrier(scatter, other, tap, x):
    """Return `x`, but not before the weights of the next layer are there.

    Args:
        other: weights of the next layer, and in the backward the gradients of the layer after:
            from here on they are scattered.
        tap: receives the scattered shards as its gradient.
    """
    return lax.optimization_barrier((x, other[0]))[0]


def _overlap_barrier_forward(scatter, other, tap, x):
    return _overlap_barrier(scatter, other, tap, x), (other[1], tap)


def _overlap_barrier_backward(scatter, residuals, grad):
    d_after, tap = residuals
    grad, d_after = lax.optimization_barrier((grad, d_after))
    return None, scatter(d_after, tap), grad


_overlap_barrier.defvjp(_overlap_barrier_forward, _overlap_barrier_backward)


def apply_remat(fn: Callable, remat: str) -> Callable:
    """Return `fn` with a backward that finds in memory only what the policy saves."""
    if remat == "none":
        return fn
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
    return jax.checkpoint(fn, policy=policy if remat == "report" else None, prevent_cse=False)


def _entry(index, grads):
    """Return entry `index` of stacked gradients; integers have none."""
    if grads.dtype == jax.dtypes.float0:
        return np.zeros(grads.shape[1:], grads.dtype)
    return lax.dynamic_index_in_dim(grads, index, keepdims=False)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Input:
    """The number of an input that stood here in a backward function."""

    number: int


def strip_inputs(pull, inputs):
    """Return a backward function of `jax.vjp` without these inputs among its leaves.

    A layer's backward needs its weights, which the caller has anyway: a copy per layer, or in a
    pipeline per micro-batch, would be most of the memory. JAX has no public way to say which
    residuals are inputs. But it passes an input that it saves on as the same object, so inputs are
    recognized by identity. Should that change, results would stay right and memory would grow:
    tests count what loops save (test_layer_scan.py, test_pipelined_step.py).
    """
    numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(inputs))}
    return jax.tree.map(lambda x: _Input(numbers[id(x)]) if id(x) in numbers else x, pull)


def restore_inputs(pull, inputs):
    """Return the function that `strip_inputs` was given, with these inputs for the same ones."""
    leaves = jax.tree.leaves(inputs)
    return jax.tree.map(
        lambda x: leaves[x.number] if isinstance(x, _Input) else x,
        pull,
        is_leaf=lambda x: isinstance(x, _Input),
    )
