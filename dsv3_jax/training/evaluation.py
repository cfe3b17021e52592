"""The measurements of a run between steps: held-out losses, and what FP8 loses.

Pipeline stages are for training steps alone: here their devices join the data-parallel ones, and
weights are gathered one layer at a time. No program here has redundant experts, which change no
result.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.loader import eval_batches
from dsv3_jax.losses import Batch, next_token_loss, training_loss
from dsv3_jax.model.deepseek import abstract_model
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.quant_stats import QuantStats
from dsv3_jax.params import named_arrays, param_specs, zero_quant_stats
from dsv3_jax.training.batches import device_batch
from dsv3_jax.training.state import make_layout, split_model
from dsv3_jax.training.step import prepare_weights
from sharding.collectives import psum_data
from sharding.layout import Layout
from sharding.mesh import (
    BATCH,
    REPLICATED,
    fold_pp_into_dp,
    manual_region,
    mesh_spec,
    process_batch_shard,
)

OPERANDS = ("activations", "gradients", "weights")  # of the matmuls in FP8


class Evaluation:
    """The batches and compiled programs of a run's evaluations."""

    def __init__(self, config: Config, mesh: Mesh, corpus: Corpus):
        self._config, self._corpus, self._mesh = config, corpus, fold_pp_into_dp(mesh)
        self._layout = make_layout(config, mesh_spec(self._mesh))
        if mesh_spec(mesh).pp > 1:
            self._layout = dataclasses.replace(self._layout, zero=3)
        train, shard = config.train, process_batch_shard(self._mesh, config.parallel.context)
        self._rows = eval_batches(corpus.held_out, train.batch, train.eval_batches, shard)
        self._losses = make_evaluation(config, self._mesh, self._layout)
        self._fp8_stats = None
        if config.fp8_stats:
            self._fp8_stats = make_fp8_stats(config, self._mesh, self._layout)

    def measure(
        self, params: nnx.State, bias: nnx.State, ema_params: nnx.State | None
    ) -> dict[str, float]:
        """Return held-out losses of the weights and of their EMA, as a row of metrics.jsonl."""
        batches = [Batch(*device_batch(rows, self._config, self._mesh)) for rows in self._rows]

        def mean_losses(params: nnx.State) -> tuple[float, float]:
            losses = [self._losses(params, bias, batch) for batch in batches]
            terms = jax.device_get([batch_losses.terms for batch_losses in losses])
            main, mtp = np.mean([(x["loss"], x["mtp_loss"]) for x in terms], axis=0)
            return float(main), float(mtp)

        main, mtp = mean_losses(params)
        row = {"eval_loss": main, "eval_mtp_loss": mtp}
        if ema_params is not None:
            row["eval_ema_loss"] = mean_losses(ema_params)[0]
        if self._fp8_stats is not None:
            row |= fp8_fractions(jax.device_get(self._fp8_stats(params, bias, batches[0])))
        return row


def make_evaluation(config: Config, mesh: Mesh, layout: Layout) -> Callable:
    """Return (params, bias, batch) -> mean losses over the global batch."""
    build_model, specs = model_builder(config, layout)
    loss_fn = next_token_loss(config.losses, config.model.mtp_depth)

    def shard(params, bias, batch: Batch):
        model, tokens_seen = build_model(params, bias), jnp.float32(0.0)
        losses, _ = training_loss(
            model, batch, loss_fn, config.losses.balance_weight, tokens_seen, layout, "none"
        )
        return psum_data(losses)

    return jax.jit(manual_region(shard, mesh, (specs, REPLICATED, BATCH), REPLICATED))


def make_fp8_stats(config: Config, mesh: Mesh, layout: Layout) -> Callable:
    """Return (params, bias, batch) -> counts [L 3 4] for every FP8 weight: OPERANDS by QuantStats.

    The counts are the cotangents of a forward and backward of their own.
    """
    build_model, specs = model_builder(config, layout)
    loss_fn = next_token_loss(config.losses, config.model.mtp_depth)
    balance_weight, remat = config.losses.balance_weight, config.parallel.remat

    def shard(params, bias, batch: Batch) -> nnx.State:
        def loss(counts):
            model, tokens_seen = build_model(params, bias, counts), jnp.float32(0.0)
            losses, _ = training_loss(
                model, batch, loss_fn, balance_weight, tokens_seen, layout, remat
            )
            return losses.total

        return psum_data(jax.grad(loss)(zero_quant_stats(params)))

    return jax.jit(manual_region(shard, mesh, (specs, REPLICATED, BATCH), REPLICATED))


def fp8_fractions(counts: nnx.State) -> dict[str, float]:
    """Return the fractions that underflow, saturate and are not finite, per operand.

    They are over all weights. The keys are those of metrics.jsonl, such as
    "fp8_gradients_underflow".
    """
    total = sum(np.asarray(x).reshape(-1, 3, 4).sum(0) for x in named_arrays(counts).values())
    row = {}
    for operand, numbers in zip(OPERANDS, total, strict=True):
        stats = QuantStats(*numbers)
        for kind in QuantStats._fields[1:]:
            row[f"fp8_{operand}_{kind}"] = float(getattr(stats, kind) / stats.all)
    return row


def model_builder(config: Config, layout: Layout) -> tuple[Callable, nnx.State]:
    """Return how a shard builds the model from stored parameters, and their specs."""
    policy = Policy.of(config.precision)
    moe = config.model.moe and dataclasses.replace(config.model.moe, n_redundant=0)
    model = dataclasses.replace(config.model, moe=moe)
    graphdef, params, *_ = split_model(abstract_model(model, policy))

    def build_model(params, bias, counts=None):
        return nnx.merge(graphdef, prepare_weights(params, layout, policy, counts), bias)

    return build_model, param_specs(params, layout)
