"""A picture of simulated computations: compute above, the link and collectives in flight below."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsv3_jax.aot.simulator import Event

LANES = {"compute": 0.0, "link": 1.2, "in flight": 2.2}  # heights; in-flight bars get rows
COLOURS = {
    "matmul": "#2f6f9f",
    "memory": "#93c2e0",
    "loop": "#6a8f6b",
    "wait": "#d9534f",
    "all-gather": "#f0ad4e",
    "reduce-scatter": "#c77d0a",
    "all-reduce": "#8c564b",
    "all-to-all": "#7d5ba6",
    "ragged-all-to-all": "#7d5ba6",
    "collective-permute": "#e377c2",
}
NAMES = {
    "matmul": "compute: matmuls",
    "memory": "compute: bound by HBM",
    "loop": "compute: an inner loop",
    "wait": "compute stands still",
}
ROW = 0.3  # height of an in-flight bar


def draw(bodies: dict[str, list[Event]], path: Path, n_names: int = 12):
    """Write a PNG of the events of simulated computations, one computation below the other.

    Args:
        bodies: `Simulation.events` by title.
        n_names: how many of the longest events have their name written on them.
    """
    figure = Figure(figsize=(16, 4 * len(bodies)), layout="constrained")
    grid = figure.subplots(len(bodies), squeeze=False)[:, 0]
    for axes, (title, events) in zip(grid, bodies.items(), strict=True):
        axes.set_title(title)
        _draw_events(axes, events, n_names)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_events(axes, events: list[Event], n_names: int):
    unit, name = (1e3, "ms") if max((e.end for e in events), default=0) >= 2e-3 else (1e6, "µs")
    rows = _rows([event for event in events if event.lane == "in flight"])
    for event in events:
        _bar(axes, event, unit, rows)
    _name_longest(axes, events, unit, n_names)
    n_rows = max(rows.values(), default=0) + 1 if rows else 0
    ticks = {"compute": 0.5, "link": 1.7} | (
        {"start to done": 2.2 + ROW * n_rows / 2} if rows else {}
    )
    axes.set_yticks(list(ticks.values()), list(ticks))
    axes.set_ylim(2.4 + ROW * n_rows, -0.1)
    axes.set(xlabel=name)
    axes.margins(x=0.005)
    kinds = [kind for kind in COLOURS if any(event.kind == kind for event in events)]
    patches = [Patch(color=COLOURS[kind], label=NAMES.get(kind, kind)) for kind in kinds]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(kinds))


def _bar(axes, event: Event, unit: float, rows: dict[Event, int]):
    in_flight = event.lane == "in flight"
    bottom = LANES[event.lane] + ROW * rows.get(event, 0)
    axes.broken_barh(
        [(event.start * unit, (event.end - event.start) * unit)],
        (bottom, ROW * 0.7 if in_flight else 1.0),
        facecolor=COLOURS.get(event.kind, "#777777"),
        edgecolor="white",  # collectives in flight often follow each other without a gap
        alpha=0.5 if in_flight else 1.0,
        linewidth=1.5 if in_flight else 0,
    )


def _rows(events: list[Event]) -> dict[Event, int]:
    """Return a row for each event, such that events of one row do not overlap."""
    ends: list[float] = []  # of each row's last event
    rows = {}
    for event in sorted(events, key=lambda event: event.start):
        row = next((i for i, end in enumerate(ends) if end <= event.start), len(ends))
        ends[row : row + 1] = [event.end]
        rows[event] = row
    return rows


def _name_longest(axes, events: list[Event], unit: float, n_names: int):
    """Write names on the bars that are long enough, upright so that they fit."""
    named = [event for event in events if event.lane != "in flight" and event.kind != "wait"]
    end = max((event.end for event in events), default=0.0)
    for event in sorted(named, key=lambda event: event.start - event.end)[:n_names]:
        if event.end - event.start < end / 150:
            continue
        middle = (event.start + event.end) / 2 * unit
        height, label = LANES[event.lane] + 0.5, event.label[:24]
        axes.text(middle, height, label, ha="center", va="center", fontsize=6, rotation=90)
