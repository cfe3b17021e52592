"""One training step: losses and gradients inside the manual region, the update outside of it."""

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
from dsv3_jax.losses import Batch, Losses, training_loss
from dsv3_jax.model.deepseek import abstract_model
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer, updated_bias
from dsv3_jax.params import all_gather_params, map_params, param_specs, quantize_params
from dsv3_jax.schedules import BatchSizes, bias_update_speed, learning_rate, mtp_weight
from dsv3_jax.shapes import Array, Float32, Int
from dsv3_jax.training.batches import abstract_batch
from dsv3_jax.training.pipelined import pipelined
from dsv3_jax.training.state import TrainState, abstract_state, layout_of, parts_of
from sharding.collectives import pmax_data, psum_data
from sharding.layout import Layout
from sharding.mesh import BATCH, REPLICATED, manual_region, mesh_spec, named_sharding

USUAL_STEPS = 100  # gradient norms that make the usual one


class Metrics(NamedTuple):
    """Numbers of one step, the same on every device."""

    losses: Losses  # means over the global batch
    grad_norm: Array  # [] before clipping
    allowed_norm: Array  # [] above it the step is skipped
    lr: Array  # []
    router: RouterStats | None  # of every MoE layer over the global batch, MTP layers last
    skipped: Array  # [] whether the state stayed as it was


def ready(
    params: nnx.State, layout: Layout, policy: Policy, counts: nnx.State | None = None
) -> nnx.State:
    """What is done once a step, before the first layer: weights to FP8, if the policy says so.

    And gathered: all under ZeRO-1, else all that is not stacked. `counts` as in `quantize_params`.
    """
    if policy.fp8:
        params = quantize_params(params, layout, counts)
    if layout.zero == 1:
        return all_gather_params(params, layout, policy.compute)
    model_level = {"embedding", "head", "norm"}
    early = {name: part for name, part in params.items() if name in model_level}
    return nnx.State({**params, **all_gather_params(nnx.State(early), layout, policy.compute)})


def loss_and_gradients(config: Config, mesh: Mesh | AbstractMesh, layout: Layout) -> Callable:
    """(params, bias, batch, mtp_weight, redundant) -> (losses, statistics, gradients), as stored.

    The gradients are those of the mean over the global batch. Losses are that mean; load and
    dropped pairs are sums over the whole batch.
    """
    if layout.mesh.pp > 1:
        return pipelined(config, mesh, layout)
    policy = Policy.of(config.precision)
    graphdef, params, _, redundant = parts_of(abstract_model(config.model, policy))
    stored = param_specs(params, layout)

    def shard(params, bias, batch, weight, extra):
        places = by_layer(redundant, extra)

        def loss_fn(params):
            model = nnx.merge(graphdef, ready(params, layout, policy), bias, places)
            how = (layout, config.parallel.remat)
            losses, stats = training_loss(model, batch, config.losses, weight, *how)
            return losses.total, (losses, stats)

        grads, (losses, stats) = jax.grad(loss_fn, has_aux=True)(params)
        grads = map_params(lambda _, x, p: layout.psum_replicated(x, p.axes, p.global_shape), grads)
        return psum_data(losses), summarize(stats), grads

    return manual_region(
        shard,
        mesh,
        in_specs=(stored, REPLICATED, BATCH, REPLICATED, REPLICATED),
        out_specs=(REPLICATED, REPLICATED, stored),
    )


def summarize(stats: RouterStats | None) -> RouterStats | None:
    """This shard's statistics -> those of the global batch."""
    if stats is None:
        return None
    sums = psum_data(stats)
    return sums._replace(rounds=pmax_data(stats.rounds))


def update_bias(bias: nnx.State, load: Array, speed: Array) -> nnx.State:
    """Every layer's balance bias moved by its load; `load` has the MoE layers first, MTP last."""
    move = functools.partial(updated_bias, speed=speed)
    return jax.tree.map(move, bias, by_layer(bias, load))


def by_layer(state: nnx.State, rows: Array | None) -> nnx.State:
    """`rows` [L ...], MoE layers first and MTP last, in the places of `state`; it may have none."""
    leaves, treedef = jax.tree.flatten(state)  # "moe" comes before "mtp"
    ends = np.cumsum([leaf.shape[0] for leaf in leaves])[:-1]
    return treedef.unflatten(jnp.split(rows, ends) if leaves else [])


def make_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    layout: Layout,
    sizes: BatchSizes | None = None,
) -> Callable:
    """(state, batch, extra) -> (state, metrics): the program that training runs.

    `extra` [L R] is the expert in each further slot of every MoE layer, MTP last; None if R = 0.

    Args:
        sizes: batches of the whole run, where that of `config` is one of several.
    """
    compute = loss_and_gradients(config, mesh, layout)
    sizes = sizes or BatchSizes.of(config.train)

    def step(
        state: TrainState, batch: Batch, extra: Array | None = None
    ) -> tuple[TrainState, Metrics]:
        tokens = sizes.tokens(state.step)
        weight = mtp_weight(config.losses, tokens)
        found = compute(state.params, state.bias, batch, weight, extra)
        losses, stats, grads = jax.lax.optimization_barrier(found)  # layers scheduled as if alone
        rate = learning_rate(config.optimizer, state.step, tokens)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
        bias = state.bias
        if stats is not None:
            bias = update_bias(bias, stats.load, bias_update_speed(config.losses, tokens))
        norm, allowed = optax.tree.norm(grads), allowed_norm(state, config.guard)
        good = norm <= allowed  # not if it is not a number
        if stats is not None:
            good = good & ~stats.lost.any()
        moved = TrainState(
            state.step + 1, params, bias, moments, usual_norm(state.usual_norm, norm, state.step)
        )
        state = jax.tree.map(lambda new, old: jax.lax.select(good, new, old), moved, state)
        return state, Metrics(losses, norm, allowed, rate, stats, ~good)

    kind = "" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].device_kind
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(kind) or None)


def allowed_norm(state: TrainState, guard: GuardConfig) -> Float32[Array, ""]:
    """The largest gradient norm that a step may have; any finite one at the beginning."""
    most = jnp.finfo(jnp.float32).max
    return jnp.where(state.step < USUAL_STEPS, most, guard.skip_above * state.usual_norm)


def usual_norm(
    usual: Float32[Array, ""], norm: Float32[Array, ""], step: Int[Array, ""]
) -> Float32[Array, ""]:
    """The mean of the norms so far, later of about the last `USUAL_STEPS`."""
    return usual + (norm - usual) / jnp.minimum(step + 1, USUAL_STEPS).astype(jnp.float32)


def lower_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The program that training runs on `mesh`, lowered for its devices; nothing is run."""
    layout = layout_of(config, mesh_spec(mesh))
    optimizer = make_optimizer(config.optimizer, Policy.of(config.precision))
    state = abstract_state(config, optimizer, mesh, layout)
    batch, extra = Batch(*abstract_batch(config, mesh)), None
    if n_redundant := config.model.moe and config.model.moe.n_redundant:
        shape = (config.model.n_moe_layers, n_redundant)
        extra = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=named_sharding(mesh, REPLICATED))
    return make_step(config, optimizer, mesh, layout).lower(state, batch, extra)
