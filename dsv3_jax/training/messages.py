"""The texts of a run: its first and last lines, events, and the row of a step in the metrics."""

import zlib
from pathlib import Path

import jax
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.loader import RowBatch
from dsv3_jax.hardware import has_fp8_units
from dsv3_jax.mesh_checks import schedule_obstacle
from dsv3_jax.training.expert_load import max_violation
from dsv3_jax.training.health import SkippedStep
from dsv3_jax.training.setup import Setup
from dsv3_jax.training.step import Metrics


def start(setup: Setup, n_parameters: int, step: int, workdir: Path) -> str:
    """Return the first lines: what is trained, on which devices and text, from which step on."""
    config, mesh, corpus = setup.config, setup.layout.mesh, setup.corpus
    begin = f"resuming at step {step}" if step else "starting"
    if config.init_from and not step:
        begin = f"starting with the weights of {config.init_from}"
    lines = [
        f"{config.name}: {n_parameters:,} parameters on mesh {mesh} "
        f"({mesh.n_devices} {jax.default_backend()} devices), {begin}",
        f"text: {config.data.source}, {corpus.n_train_tokens:,} tokens of "
        f"{config.model.vocab_size:,}; held out, unigram entropy {corpus.unigram_entropy:.4f} nats",
    ]
    if setup.pipeline is not None:
        lines.append(pipeline(setup))
    kind = jax.local_devices()[0].device_kind
    if config.precision.matmul == "fp8" and not has_fp8_units(kind):
        lines.append(
            f"precision.matmul=fp8: {kind} devices emulate it; that is as exact, but no faster"
        )
    lines.append(f"writing to {workdir}: metrics.jsonl, checkpoints/, plots/ and more")
    return "\n".join(lines)


def pipeline(setup: Setup) -> str:
    """Return the pipeline's schedule; where "auto" had to take zb1p, with the reason."""
    text = f"pipeline: {setup.pipeline}"
    if (
        setup.config.pipeline.schedule == "auto"
        and setup.pipeline.table.schedule.name == "zb1p"
        and (reason := schedule_obstacle("dualpipe", setup.config, setup.layout.mesh))
    ):
        text += f" ({reason})"
    return text


def metrics_row(step: int, tokens: int, metrics: Metrics) -> dict[str, int | float]:
    """Return the row of a step in metrics.jsonl; `tokens` are all up to and with this step."""
    router = metrics.router
    row = {
        "step": step,
        "tokens": tokens,
        **{name: float(term) for name, term in metrics.losses.terms.items()},
        "grad_norm": float(metrics.grad_norm),
        "lr": float(metrics.lr),
    }
    if router is not None:
        row["max_violation"] = float(max_violation(router.load).max())
        row["dropped_tokens"] = int(router.load.sum() - router.n_received.sum())
        row["dispatch_rounds"] = int(router.rounds.max())
    if metrics.skipped:
        row["skipped"] = 1
    return row


def why_skipped(metrics: Metrics, model: ModelConfig) -> str:
    """Return why a step was skipped; names the layers whose router logits were not finite."""
    norm, largest = float(metrics.grad_norm), float(metrics.max_grad_norm)
    reasons = []
    if not np.isfinite(norm):
        reasons.append(f"the gradient is not finite (norm {norm})")
    elif norm > largest:
        reasons.append(f"the gradient norm {norm:.4g} exceeds {largest:.4g}")
    if metrics.router is not None and metrics.router.n_nonfinite.any():
        layers = np.flatnonzero(metrics.router.n_nonfinite) + model.n_dense
        names = [
            f"layer {layer}"
            if layer < model.n_layers
            else f"MTP module {layer - model.n_layers + 1}"
            for layer in layers
        ]
        n_tokens = int(metrics.router.n_nonfinite.max())
        reasons.append(
            f"the router logits of {n_tokens:,} tokens are not finite in {', '.join(names)}"
        )
    return "; ".join(reasons)


def batch_identity(batch: RowBatch, first_row: int, size: int) -> str:
    """Return what a batch can be found again by: its range in the order, its rows, a CRC."""
    shown = " ".join(map(str, batch.indices[:8].tolist()))
    if len(batch.indices) > 8:
        shown += " ..."
    crc = zlib.crc32(np.ascontiguousarray(batch.rows.tokens).tobytes())
    return (
        f"sequences {first_row:,} to {first_row + size - 1:,} of the order, here rows {shown} of "
        f"the text, CRC-32 {crc:08x}"
    )


def roll_back(skipped: list[SkippedStep], step: int) -> str:
    """Return the event of a roll-back to `step`."""
    return f"{_skipped_in_a_row(skipped)}; back to step {step:,}, and on behind their data"


def no_roll_back(skipped: list[SkippedStep], saved: list[int]) -> str:
    """Return the error of a run that cannot roll back, with the steps that are saved."""
    known = f"only those of {saved}" if saved else "none"
    return (
        f"{_skipped_in_a_row(skipped)}. There is no earlier checkpoint to go back to ({known}); "
        "try a lower optimizer.peak_lr or precision.compute=float32, and look at "
        f"{skipped[0].batch}"
    )


def _skipped_in_a_row(skipped: list[SkippedStep]) -> str:
    last = skipped[-1]
    return f"{len(skipped)} steps in a row, to step {last.step:,}, were skipped: {last.why}"


def evaluation(step: int, row: dict[str, float], unigram_entropy: float) -> str:
    """Return the line of an evaluation, from its row of the metrics."""
    text = (
        f"step {step:,}: held-out loss {row['eval_loss']:.4f} (unigram entropy of the same text "
        f"{unigram_entropy:.4f}), second token {row['eval_mtp_loss']:.4f}"
    )
    if "eval_ema_loss" in row:
        text += f", of the EMA weights {row['eval_ema_loss']:.4f}"
    return text


def end(rows: list[dict], unigram_entropy: float) -> str:
    """Return the last line: the last held-out loss, from the rows of the metrics."""
    loss = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    return (
        f"done: held-out loss {loss:.4f}, {unigram_entropy - loss:.4f} nats below the unigram "
        f"entropy {unigram_entropy:.4f}"
    )
