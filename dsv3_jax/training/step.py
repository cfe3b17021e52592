"""The training step: losses and gradients inside the manual region, the update outside of it.

`make_step` is given a `LossFn` (losses.py) and knows no loss by name. On a mesh with pipeline
stages `pipelined.py` computes the gradients, with the same `LossFn`; the update is the same.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import Config, GuardConfig
from dsv3_jax.hardware import compiler_options
from dsv3_jax.losses import Batch, Losses, LossFn, next_token_loss, training_loss
from dsv3_jax.model.deepseek import abstract_model
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer, updated_bias
from dsv3_jax.params import all_gather_params, map_params, param_specs, quantize_params
from dsv3_jax.schedules import BatchSizes, bias_update_speed, learning_rate
from dsv3_jax.shapes import Array, Float32, Int
from dsv3_jax.training.batches import abstract_batch
from dsv3_jax.training.pipelined import pipelined
from dsv3_jax.training.state import TrainState, abstract_state, make_layout, split_model
from sharding.collectives import pmax_data, psum_data
from sharding.layout import Layout
from sharding.mesh import BATCH, REPLICATED, manual_region, mesh_spec, named_sharding

GRAD_NORM_WINDOW = 100  # steps over which the mean gradient norm is taken


class Metrics(NamedTuple):
    """Numbers of one step, the same on every device."""

    losses: Losses  # means over the global batch
    grad_norm: Array  # [] before clipping
    max_grad_norm: Array  # [] above it the step is skipped
    lr: Array  # []
    router: RouterStats | None  # of every MoE layer over the global batch, MTP layers last
    skipped: Array  # [] whether the state stayed as it was


def prepare_weights(
    params: nnx.State, layout: Layout, policy: Policy, counts: nnx.State | None = None
) -> nnx.State:
    """Quantize and gather weights, once per step before the first layer.

    FP8 weights are quantized if the policy says so. Under ZeRO-1 all weights are gathered, else
    all that are not stacked. `counts` as in `quantize_params`.
    """
    if policy.fp8:
        params = quantize_params(params, layout, counts)
    if layout.zero == 1:
        return all_gather_params(params, layout, policy.compute)
    model_level = {"embedding", "head", "norm"}
    early = {name: part for name, part in params.items() if name in model_level}
    return nnx.State({**params, **all_gather_params(nnx.State(early), layout, policy.compute)})


def loss_and_gradients(
    config: Config, mesh: Mesh | AbstractMesh, layout: Layout, loss_fn: LossFn
) -> Callable:
    """Return (params, bias, batch, tokens_seen, redundant) -> (losses, stats, gradients).

    The gradients are those of `losses.total` over the global batch, stored as the parameters are.
    Load and sent rows of `stats` are sums over the global batch.
    """
    if layout.mesh.pp > 1:
        return pipelined(config, mesh, layout, loss_fn)
    policy = Policy.of(config.precision)
    graphdef, params, _, redundant_of = split_model(abstract_model(config.model, policy))
    stored, balance_weight = param_specs(params, layout), config.losses.balance_weight

    def shard(params, bias, batch, tokens_seen, redundant):
        experts = split_layers(redundant_of, redundant)

        def total(params):
            model = nnx.merge(graphdef, prepare_weights(params, layout, policy), bias, experts)
            remat = config.parallel.remat
            losses, stats = training_loss(
                model, batch, loss_fn, balance_weight, tokens_seen, layout, remat
            )
            return losses.total, (losses, stats)

        grads, (losses, stats) = jax.grad(total, has_aux=True)(params)
        grads = map_params(lambda _, x, p: layout.psum_replicated(x, p.axes, p.global_shape), grads)
        return psum_data(losses), reduce_stats(stats), grads

    return manual_region(
        shard,
        mesh,
        in_specs=(stored, REPLICATED, BATCH, REPLICATED, REPLICATED),
        out_specs=(REPLICATED, REPLICATED, stored),
    )


def reduce_stats(stats: RouterStats | None) -> RouterStats | None:
    """Reduce this shard's statistics to those of the global batch."""
    if stats is None:
        return None
    sums = psum_data(stats)
    return sums._replace(rounds=pmax_data(stats.rounds))


def update_bias(bias: nnx.State, load: Array, speed: Array) -> nnx.State:
    """Return the balance bias of every MoE layer after a step.

    Args:
        load: [L E], MoE layers first, MTP last. A loss that runs no MTP gives no load of them:
            their bias stays.
    """
    if (missing := sum(leaf.shape[0] for leaf in jax.tree.leaves(bias)) - load.shape[0]) > 0:
        load = jnp.pad(load, ((0, missing), (0, 0)))
    move = functools.partial(updated_bias, speed=speed)
    return jax.tree.map(move, bias, split_layers(bias, load))


def split_layers(like: nnx.State, rows: Array | None) -> nnx.State:
    """Split `rows` [L ...], MoE layers first and MTP last, as `like` is; it may be empty."""
    leaves, treedef = jax.tree.flatten(like)  # "moe" comes before "mtp"
    ends = np.cumsum([leaf.shape[0] for leaf in leaves])[:-1]
    return treedef.unflatten(jnp.split(rows, ends) if leaves else [])


def make_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    layout: Layout,
    loss_fn: LossFn,
    sizes: BatchSizes | None = None,
) -> Callable:
    """Return the compiled program (state, batch, redundant) -> (state, metrics).

    `redundant` [L R] is the expert in each redundant slot of every MoE layer, MTP last; None if
    R = 0.

    Args:
        sizes: batch sizes of the whole run, where that of `config` is one of several.
    """
    compute = loss_and_gradients(config, mesh, layout, loss_fn)
    sizes = sizes or BatchSizes.of(config.train)

    def step(
        state: TrainState, batch, redundant: Array | None = None
    ) -> tuple[TrainState, Metrics]:
        tokens_seen = sizes.tokens(state.step)
        computed = compute(state.params, state.bias, batch, tokens_seen, redundant)
        # Without it XLA would schedule the layers otherwise than if they stood alone.
        losses, stats, grads = jax.lax.optimization_barrier(computed)
        rate = learning_rate(config.optimizer, state.step, tokens_seen)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
        bias = state.bias
        if stats is not None:
            bias = update_bias(bias, stats.load, bias_update_speed(config.losses, tokens_seen))
        norm, limit = optax.tree.norm(grads), max_grad_norm(state, config.guard)
        good = norm <= limit  # False if it is not a number
        if stats is not None:
            good = good & ~stats.n_nonfinite.any()
        mean = mean_grad_norm(state.mean_grad_norm, norm, state.step)
        updated = TrainState(state.step + 1, params, bias, moments, mean)
        state = jax.tree.map(lambda new, old: jax.lax.select(good, new, old), updated, state)
        return state, Metrics(losses, norm, limit, rate, stats, ~good)

    kind = "" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].device_kind
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(kind) or None)


def max_grad_norm(state: TrainState, guard: GuardConfig) -> Float32[Array, ""]:
    """Return the largest gradient norm that a step may have; any finite one at the beginning."""
    largest = jnp.finfo(jnp.float32).max
    return jnp.where(
        state.step < GRAD_NORM_WINDOW, largest, guard.skip_above * state.mean_grad_norm
    )


def mean_grad_norm(
    mean: Float32[Array, ""], norm: Float32[Array, ""], step: Int[Array, ""]
) -> Float32[Array, ""]:
    """Return the mean of all gradient norms, later of about the last `GRAD_NORM_WINDOW`."""
    return mean + (norm - mean) / jnp.minimum(step + 1, GRAD_NORM_WINDOW).astype(jnp.float32)


def lower_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Lower the pre-training program for the devices of `mesh`; nothing is run."""
    layout = make_layout(config, mesh_spec(mesh))
    optimizer = make_optimizer(config.optimizer, Policy.of(config.precision))
    state = abstract_state(config, optimizer, mesh, layout)
    batch, redundant = Batch(*abstract_batch(config, mesh)), None
    if n_redundant := config.model.moe and config.model.moe.n_redundant:
        shape = (config.model.n_moe_layers, n_redundant)
        redundant = jax.ShapeDtypeStruct(
            shape, jnp.int32, sharding=named_sharding(mesh, REPLICATED)
        )
    loss_fn = next_token_loss(config.losses, config.model.mtp_depth)
    return make_step(config, optimizer, mesh, layout, loss_fn).lower(state, batch, redundant)
