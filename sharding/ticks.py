"""Schedules as tables of ticks: what every rank does in each iteration of one loop.

In a tick a rank runs one `Work` of its program: at most one F, one B or BW, and one W. Its results
go to its neighbours at the end of the tick and wait there in an entry of a buffer until they are
used. The residuals that F leaves for B, and the wgrad operands that B leaves for W, have buffers,
too. All entries are numbered here, ahead of time, so the loop (sharding/pipeline.py) only reads
numbers. tests/reference/tick_replay.py replays tables and refuses wrong ones.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from sharding.schedules import Costs, Schedule, Stages, Work

# For each of F, B and W: whether there is one (`on`), its chunk and micro-batch, and entries of
# buffers: `in` where the input waits, `residuals` and wgrad `operands`. `b_defers`: B alone, whose
# W comes later; else BW. `first` and `last`: the stage is an end of the pipeline. `fused`: F and BW
# run side by side. Last, the entries for what arrives at the end of the tick, -1 for none:
# activations x and gradients g from the rank before (`down`), the rank after (`up`) and this one
# (`self`). The output of the last stage waits among the gradients (`end`), as the loss and its
# gradient are computed when B begins.
FIELDS = (
    "f_on", "f_chunk", "f_micro", "f_in", "f_residuals", "f_first",
    "b_on", "b_chunk", "b_micro", "b_in", "b_residuals", "b_first", "b_last",
    "b_defers", "b_operands",
    "w_on", "w_chunk", "w_operands", "fused",
    "x_down", "x_up", "x_self", "g_down", "g_up", "g_self", "g_end",
)  # fmt: skip
ARRIVALS = FIELDS[-7:]
BUFFERS = ("x", "g", "residuals", "operands")


@dataclasses.dataclass(frozen=True)
class TickTable:
    """Int32 rows [ticks ranks fields], and how many entries each buffer of a rank needs."""

    schedule: Schedule
    work: tuple[tuple[Work, ...], ...]  # of every tick and rank, as the rows say in numbers
    rows: np.ndarray
    n_x: int  # activations that wait
    n_g: int  # gradients that wait
    n_residuals: int  # micro-batches between F and B
    n_operands: int  # micro-batches between B and W

    @property
    def stages(self) -> Stages:
        return self.schedule.stages

    def field(self, name: str) -> np.ndarray:
        """Return a field of all rows, [ticks ranks]."""
        return self.rows[:, :, FIELDS.index(name)]

    def arrives(self, name: str) -> bool:
        """Return whether anything ever arrives that way."""
        return bool((self.field(name) >= 0).any())


def make_tick_table(schedule: Schedule) -> TickTable:
    """Return the table in which all work runs as early as its needs allow.

    Raises:
        ValueError: ranks wait for each other.
    """
    work, when = _ticks(schedule)
    stages = schedule.stages
    rows = {name: np.zeros((len(work), stages.n_ranks), np.int32) for name in FIELDS}
    for name in ARRIVALS:
        rows[name][:] = -1
    sizes = np.zeros((len(BUFFERS), stages.n_ranks), int)
    for rank in range(stages.n_ranks):
        arrivals = {"F": {}, "B": {}}  # (chunk, micro) -> tick, direction
        spans: dict[str, list] = {name: [] for name in BUFFERS}
        for (phase, owner, chunk, micro), tick in when.items():
            if owner != rank or phase == "W":
                continue
            key, source = (chunk, micro), stages.before if phase == "F" else stages.after
            here = (rank, chunk)
            if phase == "F":
                spans["residuals"].append((tick, when["B", *here, micro], key))
            elif ("W", *here, micro) in when:
                spans["operands"].append((tick, when["W", *here, micro], key))
            origin = source(*here)
            if origin is not None:
                direction = {-1: "down", 1: "up", 0: "self"}[origin[0] - rank]
                arrivals[phase][key] = (when[phase, *origin, micro], direction)
            elif phase == "B":
                arrivals[phase][key] = (when["F", *here, micro], "end")
        for buffer, phase in (("x", "F"), ("g", "B")):
            for key, (tick, _) in arrivals[phase].items():
                spans[buffer].append((tick, when[phase, rank, *key] - 1, key))
        entries = {}
        for number, buffer in enumerate(BUFFERS):
            entries[buffer], sizes[number, rank] = _assign_entries(spans[buffer])
        for buffer, phase in (("x", "F"), ("g", "B")):
            for key, (tick, direction) in arrivals[phase].items():
                rows[f"{buffer}_{direction}"][tick, rank] = entries[buffer][key]
        for tick, row in enumerate(work):
            for name, value in _fields(row[rank], rank, stages, entries).items():
                rows[name][tick, rank] = value
    numbers = np.stack([rows[name] for name in FIELDS], axis=-1)
    return TickTable(schedule, tuple(work), numbers, *(int(n) for n in sizes.max(1)))


def _ticks(schedule: Schedule) -> tuple[list[tuple[Work, ...]], dict[tuple, int]]:
    """Return the work of every tick and rank, empty where it waits, and the tick of each phase."""
    n_ranks = schedule.stages.n_ranks
    at, when, ticks = [0] * n_ranks, {}, []
    while any(at[rank] < len(program) for rank, program in enumerate(schedule.programs)):
        row: list[Work] = [()] * n_ranks
        for rank, program in enumerate(schedule.programs):
            if at[rank] < len(program):
                work = program[at[rank]]
                if all(need in when for op in work for need in schedule.needs(rank, op)):
                    row[rank] = work
        if not any(row):
            raise ValueError(f"{schedule.name}: ranks wait for each other at {at}")
        for rank, work in enumerate(row):
            at[rank] += bool(work)
            when |= {(op.phase, rank, op.chunk, op.micro): len(ticks) for op in work}
        ticks.append(tuple(row))
    return ticks, when


def _assign_entries(spans: Iterable[tuple[int, int, tuple]]) -> tuple[dict[tuple, int], int]:
    """Return the lowest free entry for each (first tick, last tick, key), and the buffer's size."""
    free_from: list[int] = []
    entries = {}
    for first, last, key in sorted(spans):
        free = [number for number, tick in enumerate(free_from) if tick <= first]
        if not free:
            free = [len(free_from)]
            free_from.append(0)
        entries[key] = free[0]
        free_from[free[0]] = last + 1
    return entries, len(free_from)


def _fields(work: Work, rank: int, stages: Stages, entries: dict) -> dict[str, int]:
    """Return the fields that a tick's work sets in its row."""
    fields = {"fused": int(len(work) == 2)}
    for op in work:
        key, here = (op.chunk, op.micro), (rank, op.chunk)
        kind = op.phase.lower()
        fields |= {f"{kind}_on": 1, f"{kind}_chunk": op.chunk}
        if op.kind == "F":
            fields |= {"f_micro": op.micro, "f_in": entries["x"].get(key, 0)}
            fields["f_residuals"] = entries["residuals"][key]
            fields["f_first"] = int(stages.before(*here) is None)
        elif op.kind == "W":
            fields["w_operands"] = entries["operands"][key]
        else:
            fields |= {
                "b_micro": op.micro,
                "b_in": entries["g"][key],
                "b_residuals": entries["residuals"][key],
            }
            fields["b_first"] = int(stages.before(*here) is None)
            fields["b_last"] = int(stages.after(*here) is None)
            if op.kind == "B":
                fields |= {"b_defers": 1, "b_operands": entries["operands"][key]}
    return fields


def layers_of_ranks(table: TickTable, sizes: list[int]) -> np.ndarray:
    """Return the layers [ranks chunks largest_size] of the stages that each rank holds.

    Where a stage is smaller than the largest, the number is that of no layer: sum(sizes).
    """
    stages, first = table.stages, np.cumsum([0, *sizes])
    layers = np.full((stages.n_ranks, stages.n_chunks, max(sizes)), sum(sizes))
    for rank in range(stages.n_ranks):
        for chunk in range(stages.n_chunks):
            stage = stages.stage(rank, chunk)
            layers[rank, chunk, : sizes[stage]] = first[stage] + np.arange(sizes[stage])
    return layers


def trip_counts(table: TickTable, sizes: list[int]) -> dict[str, np.ndarray]:
    """Return how often each part of a tick runs [ticks ranks], by its name in the program.

    Loops over layers are "F_BW" for an F and a BW side by side, and "F", "BW", "B" and "W" by
    themselves. The other parts are `embed`, `head_and_loss` and `embed_backward` of `StageFns`.
    """
    stages, row = table.stages, {name: table.field(name) for name in FIELDS}
    ranks = np.arange(stages.n_ranks)[None, :]
    held = np.array(
        [
            [sizes[stages.stage(rank, chunk)] for chunk in range(stages.n_chunks)]
            for rank in range(stages.n_ranks)
        ]
    )
    n_f = held[ranks, row["f_chunk"]] * row["f_on"]
    n_b = held[ranks, row["b_chunk"]] * row["b_on"]
    both = np.minimum(n_f, n_b) * row["fused"]
    return {
        "F_BW": both,
        "F": n_f - both,
        "BW": n_b * (1 - row["b_defers"]) - both,
        "B": n_b * row["b_defers"],
        "W": held[ranks, row["w_chunk"]] * row["w_on"],
        "embed": row["f_on"] * row["f_first"],
        "head_and_loss": row["b_on"] * row["b_last"],
        "embed_backward": row["b_on"] * row["b_first"],
    }


def table_time(table: TickTable, costs: Costs) -> float:
    """Return the time of all ticks, as `lockstep_time`."""
    stages = table.stages
    return lockstep_time(
        [[costs.of(work, rank, stages) for rank, work in enumerate(row)] for row in table.work]
    )


def lockstep_time(times: Sequence[Sequence[float]]) -> float:
    """Return the time of ticks [ticks ranks], each of which a rank ends with its neighbours."""
    end = np.zeros(len(times[0]))
    for row in times:
        padded = np.concatenate([[0.0], end, [0.0]])
        end = np.maximum(np.maximum(padded[:-2], padded[2:]), end) + np.array(row)
    return float(end.max())


def peak_residuals(table: TickTable) -> list[int]:
    """Return the most micro-batches between F and B that each rank holds."""
    held, most = [0] * table.stages.n_ranks, [0] * table.stages.n_ranks
    for row in table.work:
        for rank, work in enumerate(row):
            held[rank] += sum(op.kind == "F" for op in work)
            most[rank] = max(most[rank], held[rank])
            held[rank] -= sum(op.phase == "B" for op in work)
    return most
