"""The plots of a run: losses, expert load, FP8 statistics, the pipeline schedule."""

from pathlib import Path

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from jaxtyping import Float, Int

from dsv3_jax.pipeline_plan import Pipeline
from dsv3_jax.training import pipeline_plot
from dsv3_jax.training.expert_load import LoadHistory, max_violation
from dsv3_jax.training.setup import Setup

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9822b", "#2e8b57", "#666666"


def plot_run(setup: Setup, rows: list[dict], loads: LoadHistory, folder: Path):
    """Draw everything that a run plots at its end.

    Args:
        rows: of metrics.jsonl, as `read_rows` returns them.
        folder: of the PNGs.
    """
    plot_loss(rows, folder / "loss.png", setup.corpus.unigram_entropy)
    if setup.config.fp8_stats:
        plot_fp8(rows, folder / "fp8.png")
    if setup.pipeline is not None:
        plot_pipeline(setup.pipeline, folder / "pipeline.png")
    if setup.config.model.moe:
        plot_expert_load(*loads.arrays(), folder / "expert_load.png")


def plot_loss(rows: list[dict], path: str | Path, unigram_entropy: float):
    """Draw training, MTP and held-out loss over the tokens seen.

    Args:
        rows: of metrics.jsonl; a null loss leaves a gap.
        path: the PNG to write.
        unigram_entropy: of the held-out text, in nats per token; a loss below it needs context.
    """
    figure = matplotlib.figure.Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.subplots()
    tokens_of = {0: 0} | {row["step"]: row["tokens"] for row in rows if "tokens" in row}
    for name, color, label in (
        ("mtp_loss", ORANGE, "MTP (the token after the next)"),
        ("loss", BLUE, "training"),
    ):
        tokens, losses = _series(rows, name, tokens_of)
        axes.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(tokens, smoothed(losses), color=color, linewidth=1.8, label=label)
    for name, style, label in (
        ("eval_loss", {"marker": "o", "markersize": 5}, "held-out"),
        ("eval_ema_loss", {"marker": "+", "markersize": 7}, "held-out, EMA weights"),
    ):
        tokens, losses = _series(rows, name, tokens_of)
        if len(tokens):
            axes.plot(tokens, losses, linestyle="", color=GREEN, label=label, zorder=3, **style)
    axes.axhline(unigram_entropy, color=GREY, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"unigram entropy {unigram_entropy:.2f}",
        (0.99, unigram_entropy),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=GREY,
    )
    axes.set(title="Loss", xlabel="tokens", ylabel="cross entropy (nats per token)")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_pipeline(pipeline: Pipeline, path: Path):
    """Draw the schedule of a step on every rank of the pipeline, by modelled time."""
    table, costs = pipeline.table, pipeline.costs
    size = (14.0, 1.6 + 0.3 * table.stages.n_ranks)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    pipeline_plot.draw(axes, table, costs)
    axes.set(title=f"pipeline: {pipeline}", xlabel="forwards of a layer")
    pipeline_plot.legend(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def plot_expert_load(
    steps: Int[np.ndarray, " steps"], loads: Float[np.ndarray, "steps L E"], path: str | Path
):
    """Draw the experts' load: at the last step, over time in the worst layer, and its imbalance.

    Args:
        steps: of the loads.
        loads: tokens that each expert of each MoE layer received in each step.
        path: the PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(13.0, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    relative = loads / np.maximum(loads.mean(-1, keepdims=True), 1e-30)
    violations = max_violation(loads)
    worst = int(violations.mean(0).argmax())
    style = {"aspect": "auto", "cmap": "RdBu_r", "vmin": 0.0, "vmax": 2.0}
    left.imshow(relative[-1], **style)
    left.set(title="Expert load at the last step", xlabel="expert", ylabel="MoE layer")
    left.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    span = (steps[0], max(steps[-1], steps[0] + 1), loads.shape[-1] - 0.5, -0.5)
    image = middle.imshow(relative[:, worst].T, extent=span, interpolation="nearest", **style)
    figure.colorbar(image, ax=middle, label="load / mean", extend="max")
    middle.set(title=f"Load over time, MoE layer {worst}", xlabel="step", ylabel="expert")
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, violations.shape[1]))
    for layer, color in enumerate(shades):
        right.plot(steps, violations[:, layer], color=color, linewidth=1.2, label=f"layer {layer}")
    right.set(title="Imbalance", xlabel="step", ylabel="max violation (max / mean - 1)")
    right.set_ylim(bottom=0.0)
    right.grid(alpha=0.3)
    if violations.shape[1] <= 8:
        right.legend(frameon=False)
    _save(figure, path)


def plot_fp8(rows: list[dict], path: str | Path):
    """Draw the fractions of activations, gradients and weights that FP8 loses, over the steps.

    Args:
        rows: of metrics.jsonl, of a run with `fp8_stats`.
        path: the PNG to write.
    """
    rows = [row for row in rows if "fp8_weights_underflow" in row]
    figure = matplotlib.figure.Figure(figsize=(12.0, 3.8), layout="constrained")
    titles = {
        "underflow": "Underflow (not 0, but 0 in FP8)",
        "saturated": "Saturated (\u00b1448 in FP8)",
        "not_finite": "NaN or infinite",
    }
    for axes, (kind, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for name, color in (("activations", BLUE), ("gradients", ORANGE), ("weights", GREEN)):
            values = [row[f"fp8_{name}_{kind}"] for row in rows]
            axes.plot([row["step"] for row in rows], values, "o-", color=color, label=name)
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0.0)
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("fraction of the numbers in matmuls")
    figure.axes[0].legend(frameon=False)
    _save(figure, path)


def smoothed(values: Float[np.ndarray, " T"], share: float = 0.02) -> Float[np.ndarray, " T"]:
    """Return the means over centred windows of a `share` of the values; NaN does not count."""
    positions, half_window = np.arange(len(values)), int(len(values) * share / 2)
    first = np.maximum(positions - half_window, 0)
    end = np.minimum(positions + half_window + 1, len(values))
    finite = np.isfinite(values)
    sums = np.append(0.0, np.cumsum(np.where(finite, values, 0.0)))
    counts = np.append(0.0, np.cumsum(finite))
    n_finite = counts[end] - counts[first]
    return np.where(n_finite > 0, (sums[end] - sums[first]) / np.maximum(n_finite, 1.0), np.nan)


def _series(
    rows: list[dict], name: str, tokens_of: dict[int, int]
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    picked = [row for row in rows if name in row]
    tokens = [tokens_of.get(row["step"], np.nan) for row in picked]
    values = [np.nan if row[name] is None else row[name] for row in picked]
    return np.array(tokens, float), np.array(values, float)


def _save(figure: matplotlib.figure.Figure, path: str | Path):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
