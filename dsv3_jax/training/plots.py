"""Pictures of a run, from the rows of its metrics and from the load of its experts."""

from pathlib import Path

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from jaxtyping import Float, Int

from dsv3_jax.pipeline_plan import Pipeline
from sharding import gantt

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9822b", "#2e8b57", "#666666"


def plot_loss(rows: list[dict], path: str | Path, unigram_entropy: float):
    """Draw training, MTP and held-out loss over the tokens seen.

    Args:
        rows: what `metrics.read` returns; a null loss leaves a gap.
        path: the PNG to write.
        unigram_entropy: nats a token of the held-out text; a model below it uses context.
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
        ("eval_ema_loss", {"marker": "+", "markersize": 7}, "held-out, mean weights"),
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
    axes.set(title="Loss", xlabel="tokens", ylabel="cross entropy (nats a token)")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_pipeline(pipeline: Pipeline, path: Path):
    """Draw what every rank of the pipeline does in a step, in time on paper."""
    table, costs = pipeline.table, pipeline.costs
    size = (14.0, 1.6 + 0.3 * table.stages.n_ranks)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    gantt.draw(axes, table, costs)
    axes.set(title=f"pipeline: {pipeline}", xlabel="forwards of a layer")
    gantt.legend(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def plot_expert_load(
    steps: Int[np.ndarray, " steps"], loads: Float[np.ndarray, "steps L E"], path: str | Path
):
    """Draw the experts' load over the mean: at the last step, over time in the layer where it is
    least even, and the imbalance of all layers over time.

    Args:
        steps: when the loads were seen.
        loads: tokens that each expert of each MoE layer received in those steps.
        path: the PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(13.0, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    relative = loads / np.maximum(loads.mean(-1, keepdims=True), 1e-30)
    violations = max_violation(loads)
    worst = int(violations.mean(0).argmax())
    look = {"aspect": "auto", "cmap": "RdBu_r", "vmin": 0.0, "vmax": 2.0}
    left.imshow(relative[-1], **look)
    left.set(title="Expert load at the last step", xlabel="expert", ylabel="MoE layer")
    left.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    span = (steps[0], max(steps[-1], steps[0] + 1), loads.shape[-1] - 0.5, -0.5)
    image = middle.imshow(relative[:, worst].T, extent=span, interpolation="nearest", **look)
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
    """Draw over the steps which shares of activations, gradients and weights FP8 loses.

    Args:
        rows: what `metrics.read` returns, of a run with `fp8_stats`.
        path: the PNG to write.
    """
    rows = [row for row in rows if "fp8_weights_underflow" in row]
    figure = matplotlib.figure.Figure(figsize=(12.0, 3.8), layout="constrained")
    titles = {
        "underflow": "Underflow (not 0, but the code is)",
        "saturated": "Saturated (code \u00b1448)",
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
    figure.axes[0].set_ylabel("share of the numbers in products")
    figure.axes[0].legend(frameon=False)
    _save(figure, path)


def max_violation(load: Float[np.ndarray, "... E"]) -> Float[np.ndarray, "..."]:
    """By how much the busiest expert exceeds the mean load: max / mean - 1.

    Source: Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), MaxVio.
    """
    return load.max(-1) / load.mean(-1) - 1.0


def smoothed(values: Float[np.ndarray, " T"], share: float = 0.02) -> Float[np.ndarray, " T"]:
    """Mean over a centred window of `share` of the values, narrower at both ends; skips NaN."""
    places, reach = np.arange(len(values)), int(len(values) * share / 2)
    first, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
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
