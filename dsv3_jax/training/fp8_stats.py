"""How numbers become FP8 codes while a run trains: counted on request (`--set fp8_stats=True`)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.losses import Batch, next_token_loss, training_loss
from dsv3_jax.numerics.quant_stats import QuantStats
from dsv3_jax.params import named_arrays, zero_quant_stats
from dsv3_jax.training.evaluate import model_in_region
from sharding.collectives import psum_data
from sharding.layout import Layout
from sharding.mesh import BATCH, REPLICATED, manual_region

CLASSES = ("activations", "gradients", "weights")  # what meets in the three products


def make_fp8_stats(config: Config, mesh: Mesh, layout: Layout) -> Callable:
    """(params, bias, batch) -> counts [L 3 4] of every weight in FP8: `CLASSES` by `QuantStats`.

    A forward and a backward of their own, in which all that is wanted are the counts.
    """
    model_of, stored = model_in_region(config, layout)
    loss_fn = next_token_loss(config.losses, config.model.mtp_depth)

    def shard(params, bias, batch: Batch) -> nnx.State:
        def loss(counts):
            model = model_of(params, bias, counts)
            seen, weight = jnp.float32(0.0), config.losses.balance_weight
            remat = config.parallel.remat
            return training_loss(model, batch, loss_fn, weight, seen, layout, remat)[0].total

        return psum_data(jax.grad(loss)(zero_quant_stats(params)))

    return jax.jit(manual_region(shard, mesh, (stored, REPLICATED, BATCH), REPLICATED))


def shares(counts: nnx.State) -> dict[str, float]:
    """Of each class the shares that underflow, are saturated and are not finite, over all weights.

    The keys are those of `metrics.jsonl`, such as "fp8_gradients_underflow".
    """
    total = sum(np.asarray(x).reshape(-1, 3, 4).sum(0) for x in named_arrays(counts).values())
    row = {}
    for name, numbers in zip(CLASSES, total, strict=True):
        counted = QuantStats(*numbers)
        for kind in QuantStats._fields[1:]:
            row[f"fp8_{name}_{kind}"] = float(getattr(counted, kind) / counted.all)
    return row
