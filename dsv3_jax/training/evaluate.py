"""Held-out loss, and text sampled from the model, both on the mesh that training runs on."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import UInt32

from dsv3_jax.config import Config
from dsv3_jax.losses import Batch, next_token_loss, training_loss
from dsv3_jax.model.deepseek import abstract_model
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.params import param_specs
from dsv3_jax.shapes import Array, Int
from dsv3_jax.training.state import parts_of
from dsv3_jax.training.step import prepare_weights
from sharding.collectives import psum_data
from sharding.layout import Layout
from sharding.mesh import BATCH, REPLICATED, manual_region


def make_evaluation(config: Config, mesh: Mesh, layout: Layout) -> Callable:
    """(params, bias, batch) -> mean losses over the global batch."""
    model_of, stored = model_in_region(config, layout)
    loss_fn = next_token_loss(config.losses, config.model.mtp_depth)

    def shard(params, bias, batch: Batch):
        model = model_of(params, bias)
        seen, weight = jnp.float32(0.0), config.losses.balance_weight
        losses, _ = training_loss(model, batch, loss_fn, weight, seen, layout, "none")
        return psum_data(losses)

    return jax.jit(manual_region(shard, mesh, (stored, REPLICATED, BATCH), REPLICATED))


def make_sampler(config: Config, mesh: Mesh, layout: Layout, temperature: float = 0.7) -> Callable:
    """(params, bias, tokens [B T], start, keys [B 2]) -> tokens with those from `start` on sampled.

    Every new token runs the model over all T places: right for a line of text after training; the
    cached decoder is for more. A row is a whole text, also where training cuts them into slices.
    """
    layout = dataclasses.replace(layout, context=1)
    model_of, stored = model_in_region(config, layout)

    def shard(params, bias, tokens: Int[Array, "b T"], start, keys: UInt32[Array, "b 2"]):
        model = model_of(params, bias)

        def extend(place, tokens):
            hidden, _ = model.hidden_states(tokens, layout)
            at = jax.lax.dynamic_slice_in_dim(hidden, place - 1, 1, axis=1)
            logits = model.logits(at, layout)[:, 0] / temperature
            draw = jax.vmap(lambda key, row: jax.random.categorical(_at(key, place), row))
            new = draw(keys, logits).astype(tokens.dtype)
            return jax.lax.dynamic_update_slice_in_dim(tokens, new[:, None], place, axis=1)

        return jax.lax.fori_loop(start, tokens.shape[1], extend, tokens)

    inputs = (stored, REPLICATED, BATCH, REPLICATED, BATCH)
    return jax.jit(manual_region(shard, mesh, inputs, BATCH))


def _at(key: UInt32[Array, " 2"], place: Int[Array, ""]) -> jax.Array:
    return jax.random.fold_in(jax.random.wrap_key_data(key), place)


def model_in_region(config: Config, layout: Layout) -> tuple[Callable, nnx.State]:
    """How a shard makes its model of stored parameters, and the specs of those.

    It has no redundant experts, which change nothing.
    """
    policy = Policy.of(config.precision)
    moe = config.model.moe and dataclasses.replace(config.model.moe, n_redundant=0)
    model = dataclasses.replace(config.model, moe=moe)
    graphdef, params, *_ = parts_of(abstract_model(model, policy))

    def model_of(params, bias, counts=None):
        return nnx.merge(graphdef, prepare_weights(params, layout, policy, counts), bias)

    return model_of, param_specs(params, layout)
