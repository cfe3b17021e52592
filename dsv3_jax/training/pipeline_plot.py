"""Pictures of pipeline schedules: when each rank works on which micro-batch."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sharding.schedules import Costs
from sharding.ticks import TickTable

COLOURS = {"F": "#2563a8", "FBW": "#7b4fa3", "BW": "#d9822b", "B": "#e8b25c", "W": "#4f9d69"}
LEGEND = {
    "F": "F forward",
    "FBW": "F and BW side by side",
    "BW": "BW backward",
    "B": "B backward for the input",
    "W": "W backward for the weights",
}


def draw(axes: Axes, table: TickTable, costs: Costs):
    """Draw the ticks of a table, each as long as the longest work of the ranks that it joins.

    A rank begins a tick when it and both its neighbours have ended the one before, as they do when
    messages are exchanged; white is waiting. Numbers are micro-batches; where a rank holds two
    stages, those of the second are in bold.
    """
    n_ranks = table.stages.n_ranks
    end = [0.0] * n_ranks
    for row in table.work:
        begin = [max(end[max(rank - 1, 0) : rank + 2]) for rank in range(n_ranks)]
        for rank, work in enumerate(row):
            if not work:
                continue
            kind, length = "".join(op.kind for op in work), costs.of(work, rank, table.stages)
            axes.barh(rank, length, 0.9, begin[rank], color=COLOURS[kind], edgecolor="white")
            for number, op in enumerate(work):
                axes.text(
                    begin[rank] + length * (2 * number + 1) / (2 * len(work)),
                    rank,
                    str(op.micro),
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=6,
                    fontweight="bold" if op.chunk else "normal",
                )
            begin[rank] += length
        end = begin
    axes.set(ylabel="rank", yticks=range(n_ranks), ylim=(n_ranks - 0.5, -0.5), xlim=(0, max(end)))


def legend(figure: Figure):
    """Explain the colours under the picture."""
    patches = [Patch(color=COLOURS[kind], label=text) for kind, text in LEGEND.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
