"""What a run says: its first lines, the row of a step, what was wrong with one."""

import zlib

import jax
import numpy as np

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.loader import RowBatch
from dsv3_jax.hardware import has_fp8_units
from dsv3_jax.mesh_checks import why_not
from dsv3_jax.pipeline_plan import Pipeline
from dsv3_jax.training import plots
from dsv3_jax.training.step import Metrics
from sharding.mesh import MeshSpec


def announcement(
    config: Config, mesh: MeshSpec, corpus: Corpus, n_parameters: int, first: int
) -> str:
    """What is trained, where, on what, and from where on."""
    init = config.init_from
    start = f"starting with the weights of {init}" if init else "starting"
    where = f"resuming at step {first}" if first else start
    return (
        f"{config.name}: {n_parameters:,} parameters on mesh {mesh} "
        f"({mesh.n_devices} {jax.default_backend()} devices), {where}\n"
        f"text: {config.data.source}, {corpus.n_train_tokens:,} tokens of "
        f"{config.model.vocab_size:,}; held out, unigram entropy {corpus.unigram_entropy:.4f} nats"
    )


def of_pipeline(config: Config, mesh: MeshSpec, pipeline: Pipeline) -> str:
    """The schedule, and if it was chosen for want of micro-batches why."""
    why = ""
    if config.pipeline.schedule == "auto" and pipeline.table.schedule.name == "zb1p":
        why = f" ({why_not('dualpipe', config, mesh)})"
    return f"pipeline: {pipeline}{why}"


def of_fp8(config: Config) -> str:
    """Whether FP8 is emulated; empty if not."""
    kind = jax.local_devices()[0].device_kind
    if config.precision.matmul != "fp8" or has_fp8_units(kind):
        return ""
    return f"precision.matmul=fp8: {kind} devices emulate it; that is as exact, but no faster"


def row_of(step: int, tokens: int, numbers: Metrics) -> dict[str, int | float]:
    """The row of a step in the metrics."""
    router = numbers.router
    row = {
        "step": step,
        "tokens": tokens,
        **{name: float(term) for name, term in numbers.losses.terms.items()},
        "grad_norm": float(numbers.grad_norm),
        "lr": float(numbers.lr),
    }
    if router is not None:
        row["max_violation"] = float(plots.max_violation(router.load).max())
        row["dropped_tokens"] = int(router.load.sum() - router.n_received.sum())
        row["dispatch_rounds"] = int(router.rounds.max())
    return row | ({"skipped": 1} if numbers.skipped else {})


def why_skipped(numbers: Metrics, model: ModelConfig) -> str:
    """What was wrong with a step; names the layers whose router had no finite logits."""
    norm, allowed = float(numbers.grad_norm), float(numbers.max_grad_norm)
    reasons = []
    if not np.isfinite(norm):
        reasons.append(f"the gradient is not finite (norm {norm})")
    elif norm > allowed:
        reasons.append(f"the gradient norm {norm:.4g} exceeds {allowed:.4g}")
    if numbers.router is not None and numbers.router.n_nonfinite.any():
        layers = np.flatnonzero(numbers.router.n_nonfinite) + model.n_dense
        names = [
            f"layer {layer}"
            if layer < model.n_layers
            else f"MTP module {layer - model.n_layers + 1}"
            for layer in layers
        ]
        lost = int(numbers.router.n_nonfinite.max())
        reasons.append(f"the router logits of {lost:,} tokens are not finite in {', '.join(names)}")
    return "; ".join(reasons)


def identity(batch: RowBatch, begin: int, size: int) -> str:
    """What a batch can be found again by: its place in the order, its rows of the text, a CRC."""
    indices = batch.indices
    some = " ".join(map(str, indices[:8].tolist())) + " ..." * (len(indices) > 8)
    crc = zlib.crc32(np.ascontiguousarray(batch.rows.tokens).tobytes())
    return (
        f"sequences {begin:,} to {begin + size - 1:,} of the order, here rows {some} of the text, "
        f"CRC-32 {crc:08x}"
    )


def end(rows: list[dict], unigram_entropy: float) -> str:
    """The last held-out loss."""
    loss = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    return (
        f"done: held-out loss {loss:.4f}, {unigram_entropy - loss:.4f} nats below the unigram "
        f"entropy {unigram_entropy:.4f}"
    )
