"""Pictures of needle grids."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np

from dsv3_jax.evaluation.haystack import Grid


def draw(grids: Sequence[Grid], path: Path):
    """Draw heat maps side by side: length by depth; colour and number are the fraction found."""
    widths = [len(grid.lengths) for grid in grids]
    size = (1.6 + 0.6 * sum(widths) + 0.8 * len(grids), 1.5 + 0.32 * len(grids[0].depths))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(grids), width_ratios=widths, squeeze=False)[0]
    for axes, grid in zip(panels, grids, strict=True):
        image = axes.imshow(grid.found, cmap="RdYlGn", vmin=0.0, vmax=1.0, aspect="auto")
        for (row, column), fraction in np.ndenumerate(grid.found):
            axes.text(column, row, f"{fraction:.2f}", ha="center", va="center", fontsize=7)
        axes.set(title=f"{grid.title}\nmean {grid.mean:.2f}", xlabel="context (tokens)")
        axes.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths])
        axes.set_yticks(range(len(grid.depths)), [f"{depth:.0%}" for depth in grid.depths])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    panels[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels[-1], label="fraction found")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
