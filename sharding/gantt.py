"""Schedules as pictures and as a table: when each rank works on which micro-batch."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sharding.schedules import NAMES, Costs, bubble, bubble_formula, make, makespan, nearest_micro
from sharding.ticks import Table, lockstep, peak_kept, table_of

COLOURS = {"F": "#2563a8", "FB": "#7b4fa3", "B": "#d9822b", "X": "#e8b25c", "W": "#4f9d69"}
MEANING = {
    "F": "F forward",
    "FB": "F and B side by side",
    "B": "B backward",
    "X": "X backward of inputs",
    "W": "W backward of weights",
}


def draw(axes: Axes, table: Table, costs: Costs):
    """The ticks of a table, each as long as the longest work of the ranks that it joins.

    A rank begins a tick when it and both its neighbours have ended the one before, as they do when
    messages are exchanged; what is white is waiting. Numbers are micro-batches; where a rank holds
    two stages, those of the second are in bold.
    """
    n_ranks = table.stages.n_ranks
    end = [0.0] * n_ranks
    for row in table.slots:
        begin = [max(end[max(rank - 1, 0) : rank + 2]) for rank in range(n_ranks)]
        for rank, slot in enumerate(row):
            if not slot:
                continue
            kind, length = "".join(op.kind for op in slot), costs.of(slot, rank, table.stages)
            axes.barh(rank, length, 0.9, begin[rank], color=COLOURS[kind], edgecolor="white")
            for number, op in enumerate(slot):
                axes.text(
                    begin[rank] + length * (2 * number + 1) / (2 * len(slot)),
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
    """What the colours mean, under the picture."""
    patches = [Patch(color=COLOURS[kind], label=text) for kind, text in MEANING.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)


def costs_of(name: str, fused: float | None) -> Costs:
    """F = X = W = 1 for a P-th of the layers: a stage of a V is half of that."""
    size = 0.5 if name == "dualpipev" else 1.0
    return Costs(size, size, size, None if fused is None else fused * size)


def report(n_ranks: int, n_micro: int, fused: float | None, path: str):
    """Print a line a schedule, and draw all of them into one picture."""
    names = [name for name in NAMES if nearest_micro(name, n_ranks, n_micro) == n_micro]
    print(f"{n_ranks} ranks, {n_micro} micro-batches; F = X = W = 1 for a P-th of the layers\n")
    print("schedule     time  bubble  formula  in ticks  kept for the backward, by rank")
    figure = Figure(figsize=(14, 1 + 0.28 * (n_ranks + 3) * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        schedule, costs = make(name, n_ranks, n_micro), costs_of(name, fused)
        table = table_of(schedule)
        time, waits = makespan(schedule, costs)[0], bubble(schedule, costs)
        formula, ticks = bubble_formula(name, n_ranks, costs), lockstep(table, costs)
        kept = " ".join(map(str, peak_kept(table)))
        print(f"{name:10s}{time:7.1f}{waits:8.1f}{formula:9.1f}{ticks:10.1f}  {kept}")
        draw(axes, table, costs)
        axes.set_title(f"{name}: {ticks:g} in ticks; {time:g}, bubble {waits:g}, in the ideal")
    legend(figure)
    figure.savefig(path, dpi=130)
    for name in NAMES:
        if name not in names:
            try:
                make(name, n_ranks, n_micro)
            except ValueError as error:
                print(f"left out: {error}")
    print(f"\npicture in {path}")
