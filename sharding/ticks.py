"""Schedules as tables of ticks: what every rank does in each turn of one loop, and from where.

In a tick a rank runs a slot of its program: at most one F, one B or X, and one W. What it makes
goes to its neighbours at the end of the tick and waits there in a numbered place until it is
wanted. What F keeps for B, and X for W, has numbered places, too. All numbers are fixed here, so
the loop (`sharding/pipeline.py`) only reads them; `check` replays a table and refuses what is
wrong.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from sharding.schedules import Costs, GradTap, Schedule, Stages

# Of F, B and W: whether there is one, chunk, micro-batch, and places: where the input waits, where
# is kept what the backward needs, and what W needs. B has `b_split` if it is an X; `first` and
# `last` are the ends of the pipeline. `fused`: F and B run side by side. Last, where things go that
# arrive at the end of the tick, -1 for none: activations x and gradients g from the rank before
# (`down`), the rank after (`up`) and this one (`self`). What comes out of the last stage waits
# among the gradients (`end`): the loss and its gradient are worked out when B begins.
FIELDS = (
    "f_on", "f_chunk", "f_micro", "f_in", "f_kept", "f_first",
    "b_on", "b_chunk", "b_micro", "b_in", "b_kept", "b_first", "b_last", "b_split", "b_late",
    "w_on", "w_chunk", "w_late", "fused",
    "x_down", "x_up", "x_self", "g_down", "g_up", "g_self", "g_end",
)  # fmt: skip
ARRIVALS = FIELDS[-7:]


@dataclasses.dataclass(frozen=True)
class Table:
    """Int32 [ticks ranks fields], and how many places of each kind a rank needs."""

    schedule: Schedule
    slots: tuple[tuple[GradTap, ...], ...]  # of every tick and rank, as the rows say in numbers
    rows: np.ndarray
    n_x: int  # activations that wait
    n_g: int  # gradients that wait
    n_kept: int  # micro-batches between F and B
    n_late: int  # micro-batches between X and W

    @property
    def stages(self) -> Stages:
        return self.schedule.stages

    def field(self, name: str) -> np.ndarray:
        """[ticks ranks]"""
        return self.rows[:, :, FIELDS.index(name)]

    def used(self, name: str) -> bool:
        """Whether anything ever arrives that way."""
        return bool((self.field(name) >= 0).any())


def table_of(schedule: Schedule) -> Table:
    """The table in which every slot runs as early as what it needs allows, each in its tick."""
    slots, when = _ticks(schedule)
    stages = schedule.stages
    rows = {name: np.zeros((len(slots), stages.n_ranks), np.int32) for name in FIELDS}
    for name in ARRIVALS:
        rows[name][:] = -1
    sizes = np.zeros((4, stages.n_ranks), int)
    for rank in range(stages.n_ranks):
        arrivals = {"F": {}, "B": {}}  # (chunk, micro) -> tick, way
        waits: dict[str, list] = {"x": [], "g": [], "kept": [], "late": []}
        for (step, owner, chunk, micro), tick in when.items():
            if owner != rank or step == "W":
                continue
            key, source = (chunk, micro), stages.before if step == "F" else stages.after
            here = (rank, chunk)
            if step == "F":
                waits["kept"].append((tick, when["B", *here, micro], key))
            elif ("W", *here, micro) in when:
                waits["late"].append((tick, when["W", *here, micro], key))
            origin = source(*here)
            if origin is not None:
                way = {-1: "down", 1: "up", 0: "self"}[origin[0] - rank]
                arrivals[step][key] = (when[step, *origin, micro], way)
            elif step == "B":
                arrivals[step][key] = (when["F", *here, micro], "end")
        for kind, step in (("x", "F"), ("g", "B")):
            for key, (tick, _) in arrivals[step].items():
                waits[kind].append((tick, when[step, rank, *key] - 1, key))
        places = {}
        for number, kind in enumerate(waits):
            places[kind], sizes[number, rank] = _places(waits[kind])
        for kind, step in (("x", "F"), ("g", "B")):
            for key, (tick, way) in arrivals[step].items():
                rows[f"{kind}_{way}"][tick, rank] = places[kind][key]
        for tick, row in enumerate(slots):
            for name, value in _numbers(row[rank], rank, stages, places).items():
                rows[name][tick, rank] = value
    numbers = np.stack([rows[name] for name in FIELDS], axis=-1)
    table = Table(schedule, tuple(slots), numbers, *(int(n) for n in sizes.max(1)))
    check(table)
    return table


def _ticks(schedule: Schedule) -> tuple[list[tuple[GradTap, ...]], dict[tuple, int]]:
    """The slot of every tick and rank, empty where it waits; and the tick of every (step, ...)."""
    n_ranks = schedule.stages.n_ranks
    at, when, slots = [0] * n_ranks, {}, []
    while any(at[rank] < len(program) for rank, program in enumerate(schedule.programs)):
        row: list[GradTap] = [()] * n_ranks
        for rank, program in enumerate(schedule.programs):
            if at[rank] < len(program):
                slot = program[at[rank]]
                if all(need in when for op in slot for need in schedule.needs(rank, op)):
                    row[rank] = slot
        if not any(row):
            raise ValueError(f"{schedule.name}: ranks wait for each other at slots {at}")
        for rank, slot in enumerate(row):
            at[rank] += bool(slot)
            when |= {(op.step, rank, op.chunk, op.micro): len(slots) for op in slot}
        slots.append(tuple(row))
    return slots, when


def _places(intervals: Iterable[tuple[int, int, tuple]]) -> tuple[dict[tuple, int], int]:
    """The lowest free place for each (first tick, last tick, key), and how many there are."""
    free_from: list[int] = []
    place = {}
    for first, last, key in sorted(intervals):
        fits = [number for number, tick in enumerate(free_from) if tick <= first]
        if not fits:
            fits = [len(free_from)]
            free_from.append(0)
        place[key] = fits[0]
        free_from[fits[0]] = last + 1
    return place, len(free_from)


def _numbers(slot: GradTap, rank: int, stages: Stages, places: dict) -> dict[str, int]:
    """What a slot puts into its row."""
    numbers = {"fused": int(len(slot) == 2)}
    for op in slot:
        key, here = (op.chunk, op.micro), (rank, op.chunk)
        kind = op.step.lower()
        numbers |= {f"{kind}_on": 1, f"{kind}_chunk": op.chunk}
        if op.kind == "F":
            numbers |= {"f_micro": op.micro, "f_in": places["x"].get(key, 0)}
            numbers["f_kept"] = places["kept"][key]
            numbers["f_first"] = int(stages.before(*here) is None)
        elif op.kind == "W":
            numbers["w_late"] = places["late"][key]
        else:
            numbers |= {
                "b_micro": op.micro,
                "b_in": places["g"][key],
                "b_kept": places["kept"][key],
            }
            numbers["b_first"] = int(stages.before(*here) is None)
            numbers["b_last"] = int(stages.after(*here) is None)
            if op.kind == "X":
                numbers |= {"b_split": 1, "b_late": places["late"][key]}
    return numbers


def check(table: Table):
    """Replay a table, looking only at its rows.

    Raises:
        ValueError: a micro-batch that does not pass every stage once both ways, or a place that is
            read before it is written, or written while it is wanted. Tick and rank are named.
    """
    replay = _Replay(table)
    for tick, ranks in enumerate(table.rows.tolist()):
        rows = [dict(zip(FIELDS, row, strict=True)) for row in ranks]
        sent = [replay.work((tick, rank), q) for rank, q in enumerate(rows)]
        for rank, q in enumerate(rows):
            replay.arrive((tick, rank), q, sent)
    _check_complete(table, replay.done, table.schedule.n_micro)


class _Replay:
    """What lies in the places of every rank: (stage, chunk, micro-batch), or None."""

    def __init__(self, table: Table):
        self.stages, self.name = table.stages, table.schedule.name
        sizes = {"x": table.n_x, "g": table.n_g, "kept": table.n_kept, "late": table.n_late}
        self.full = [
            {kind: [None] * n for kind, n in sizes.items()} for _ in range(self.stages.n_ranks)
        ]
        self.done: collections.Counter = collections.Counter()  # of (step, stage, micro-batch)

    def expect(self, at: tuple, right, what):
        if not right:
            tick, rank = at
            raise ValueError(f"{self.name}, tick {tick}, rank {rank}: {what}")

    def take(self, at: tuple, kind, place, wanted):
        places = self.full[at[1]][kind]
        found = places[place] if 0 <= place < len(places) else None
        self.expect(at, found == wanted, f"{kind} place {place} holds {found}, not {wanted}")
        places[place] = None

    def put(self, at: tuple, kind, place, what):
        places = self.full[at[1]][kind]
        free = 0 <= place < len(places) and places[place] is None
        self.expect(at, free, f"{kind} place {place} is not free for {what}")
        places[place] = what

    def work(self, at: tuple, q: dict):
        """Do what a row says; returns what the rank has to send after the tick."""
        sent = dict.fromkeys(("x", "g", "end"))
        if q["f_on"]:
            self.forward(at, q, sent)
        if q["b_on"]:
            self.backward(at, q, sent)
        if q["w_on"]:
            stage = self.stages.stage(at[1], q["w_chunk"])
            self.take(at, "late", q["w_late"], (stage, q["w_chunk"]))
            self.done["W", stage] += 1
        return sent

    def forward(self, at: tuple, q: dict, sent: dict):
        chunk, micro = q["f_chunk"], q["f_micro"]
        stage = self.stages.stage(at[1], chunk)
        self.expect(at, q["f_first"] == (stage == 0), f"stage {stage}, f_first={q['f_first']}")
        if stage:
            self.take(at, "x", q["f_in"], (stage, chunk, micro))
        self.put(at, "kept", q["f_kept"], (stage, chunk, micro))
        last = stage == self.stages.n_stages - 1
        sent["end" if last else "x"] = (stage if last else stage + 1, chunk, micro)
        self.done["F", stage, micro] += 1

    def backward(self, at: tuple, q: dict, sent: dict):
        chunk, micro = q["b_chunk"], q["b_micro"]
        stage = self.stages.stage(at[1], chunk)
        ends = (q["b_first"], q["b_last"])
        right = (stage == 0, stage == self.stages.n_stages - 1)
        self.expect(at, ends == right, f"stage {stage} has b_first, b_last = {ends}")
        self.take(at, "g", q["b_in"], (stage, chunk, micro))
        self.take(at, "kept", q["b_kept"], (stage, chunk, micro))
        sent["g"] = (stage - 1, chunk, micro) if stage else None
        self.done["B", stage, micro] += 1
        if q["b_split"]:
            self.put(at, "late", q["b_late"], (stage, chunk))
        else:
            self.done["W", stage] += 1

    def arrive(self, at: tuple, q: dict, sent: list):
        """Put what the rank, and those before and after it, have sent where the row says."""
        rank = at[1]
        sources = {"down": rank - 1, "up": rank + 1, "self": rank}
        for kind in ("x", "g"):
            for way, source in sources.items():
                arrives = sent[source][kind] if 0 <= source < len(sent) else None
                wanted = arrives is not None and _belongs(self.stages, rank, arrives)
                place = q[f"{kind}_{way}"]
                comes = arrives or "nothing"
                self.expect(at, (place >= 0) == wanted, f"{kind}_{way}={place}; {comes} comes")
                if wanted:
                    self.put(at, kind, place, _seen(self.stages, arrives))
        end = sent[rank]["end"]
        self.expect(at, (q["g_end"] >= 0) == (end is not None), f"g_end={q['g_end']}")
        if end is not None:
            self.put(at, "g", q["g_end"], end)


def _belongs(stages: Stages, rank: int, what: tuple) -> bool:
    """Whether a rank holds the stage that a message (stage, chunk, micro) of a neighbour is for."""
    return any(
        stages.stage(rank, chunk) == what[0] and (stages.shape == "v" or chunk == what[1])
        for chunk in range(stages.n_chunks)
    )


def _seen(stages: Stages, what: tuple) -> tuple:
    """A message as its receiver names it: in a V the chunk changes at the turn."""
    stage, chunk, micro = what
    if stages.shape == "v":
        chunk = int(stage >= stages.n_ranks)
    return stage, chunk, micro


def _check_complete(table: Table, done: collections.Counter, n_micro: int):
    """Every micro-batch went through every stage both ways, once, and every W was done."""
    name = table.schedule.name
    for stage in range(table.stages.n_stages):
        for step in "FB":
            for micro in range(n_micro):
                if (count := done[step, stage, micro]) != 1:
                    raise ValueError(
                        f"{name}: {step} of {micro} in stage {stage} runs {count} times"
                    )
        if (count := done["W", stage]) != n_micro:
            raise ValueError(f"{name}: W of stage {stage} ran {count} times, not {n_micro}")


def lockstep(table: Table, costs: Costs) -> float:
    """Time of all ticks, as `joined`."""
    stages = table.stages
    return joined(
        [[costs.of(slot, rank, stages) for rank, slot in enumerate(row)] for row in table.slots]
    )


def joined(times: Sequence[Sequence[float]]) -> float:
    """Time of ticks [ticks ranks], each of which a rank ends together with its neighbours."""
    end = np.zeros(len(times[0]))
    for row in times:
        padded = np.concatenate([[0.0], end, [0.0]])
        end = np.maximum(np.maximum(padded[:-2], padded[2:]), end) + np.array(row)
    return float(end.max())


def peak_kept(table: Table) -> list[int]:
    """Micro-batches between F and B that each rank holds at most."""
    held, most = [0] * table.stages.n_ranks, [0] * table.stages.n_ranks
    for row in table.slots:
        for rank, slot in enumerate(row):
            held[rank] += sum(op.kind == "F" for op in slot)
            most[rank] = max(most[rank], held[rank])
            held[rank] -= sum(op.step == "B" for op in slot)
    return most
