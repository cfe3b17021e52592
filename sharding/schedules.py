"""Pipeline schedules: who works on which micro-batch, in which order, and what that costs.

    python -m sharding.schedules --p 8 --m 20            a table and a picture of all five
    python -m sharding.schedules --p 8 --m 20 --fused 2  F and B together cost 2 instead of 3

A stage is a run of layers; micro-batches pass through all stages forwards, then backwards. Work
comes in four kinds: F forward, B backward, and B in two parts: X for the gradient of the input,
for which the rank before waits, and W for that of the weights, for which nobody does. In every
schedule a rank has a program, a list of slots, each of one piece of work, or of an F and a B of two
micro-batches side by side, so that the one computes while the other's tokens travel.

    gpipe, 1f1b   a stage a rank; a rank that waits for others has nothing else to do
    zb1p          1F1B with W put off until then (Qi et al., arXiv 2401.10241)
    dualpipe      micro-batches enter at both ends, so every rank holds two stages (report 3.2.1)
    dualpipev     2P stages in a V: the first half goes down the ranks, the second half comes back
"""

import argparse
import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

NAMES = ("gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev")


class Op(NamedTuple):
    """A piece of work of a rank."""

    kind: str  # "F", "B", "X" or "W"
    chunk: int  # 0, or 1 for the rank's second stage
    micro: int

    @property
    def step(self) -> str:
        """What others wait for: X is as good as B to them."""
        return "B" if self.kind == "X" else self.kind


GradTap = tuple[Op, ...]
Program = list[GradTap]


@dataclasses.dataclass(frozen=True)
class Stages:
    """Which stages a rank holds: one ("line"), its own and its mirror's ("cross"), two of a "v"."""

    n_ranks: int
    shape: str

    @property
    def n_chunks(self) -> int:
        return 1 if self.shape == "line" else 2

    @property
    def n_stages(self) -> int:
        return self.n_ranks * (2 if self.shape == "v" else 1)

    def stage(self, rank: int, chunk: int) -> int:
        """The stage that a rank holds as that chunk."""
        last = 2 * self.n_ranks - 1 if self.shape == "v" else self.n_ranks - 1
        return last - rank if chunk else rank

    def after(self, rank: int, chunk: int) -> tuple[int, int] | None:
        """Rank and chunk that take a micro-batch next, on its way forwards; None at the end."""
        if self.stage(rank, chunk) == self.n_stages - 1:
            return None
        if self.shape == "v" and chunk == 0 and rank == self.n_ranks - 1:
            return rank, 1
        return (rank - 1 if chunk else rank + 1), chunk

    def before(self, rank: int, chunk: int) -> tuple[int, int] | None:
        """The inverse of `after`; None at the beginning."""
        if self.stage(rank, chunk) == 0:
            return None
        if self.shape == "v" and chunk == 1 and rank == self.n_ranks - 1:
            return rank, 0
        return (rank + 1 if chunk else rank - 1), chunk


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The programs of all ranks."""

    name: str
    stages: Stages
    n_micro: int
    programs: tuple[Program, ...]

    def needs(self, rank: int, op: Op) -> list[tuple[str, int, int, int]]:
        """(step, rank, chunk, micro) of all that must be done before `op`."""
        mine = (rank, op.chunk, op.micro)
        if op.kind == "W":
            return [("B", *mine)]
        if op.kind == "F":
            before = self.stages.before(rank, op.chunk)
            return [] if before is None else [("F", *before, op.micro)]
        after = self.stages.after(rank, op.chunk)
        return [("F", *mine)] + ([] if after is None else [("B", *after, op.micro)])


class Costs(NamedTuple):
    """Time of a layer, by kind; an F and a B side by side take `fb`.

    What comes before the first layer takes `begin` forwards and `begin_back` backwards, W and what
    is computed again included; what comes after the last takes `end`, both ways, before its B.
    """

    f: float = 1.0
    x: float = 1.0
    w: float = 1.0
    fb: float | None = None  # None: as long as one after the other
    sizes: Sequence[float] | None = None  # layers of all stages; None: 1 each
    begin: float = 0.0
    begin_back: float = 0.0
    end: float = 0.0

    def of(self, slot: GradTap, rank: int, stages: Stages) -> float:
        """Time of a slot. Of an F and a B of unequal size the rest runs by itself."""
        stage = {op: stages.stage(rank, op.chunk) for op in slot}
        size = {op: 1.0 if self.sizes is None else self.sizes[stage[op]] for op in slot}
        alone = {"F": self.f, "X": self.x, "W": self.w, "B": self.x + self.w}
        total = sum(alone[op.kind] * size[op] for op in slot)
        if self.fb is not None and {op.kind for op in slot} == {"F", "B"}:
            total -= min(size.values()) * (self.f + self.x + self.w - self.fb)
        for op in slot:
            if stage[op] == 0:
                total += {"F": self.begin, "W": 0.0}.get(op.kind, self.begin_back)
            if stage[op] == stages.n_stages - 1 and op.step == "B":
                total += self.end
        return total


def make(name: str, n_ranks: int, n_micro: int, n_late: int | None = None) -> Schedule:
    """The schedule of that name.

    Args:
        n_late: micro-batches of a rank whose W may wait at a time; further X run as B. None for
            as many as the schedule has.

    Raises:
        ValueError: unknown name, or too few or odd micro-batches; the message has the nearest
            number that works.
    """
    if name not in NAMES:
        raise ValueError(f"schedule {name!r} must be one of {', '.join(NAMES)}")
    fits = nearest_micro(name, n_ranks, n_micro)
    if fits is None:
        raise ValueError(
            f"dualpipe sends micro-batches from both ends of an even number of stages, not of "
            f"{n_ranks}: use {n_ranks + 1}, or dualpipev"
        )
    if fits != n_micro:
        raise ValueError(
            f"{name} on {n_ranks} stages cannot run {n_micro} micro-batches; the nearest number "
            f"that works is {fits}"
        )
    if name == "dualpipe":
        shape, half = "cross", n_micro // 2
        programs = [
            _two_way(min(rank, n_ranks - 1 - rank), n_ranks // 2, half, 2 * rank >= n_ranks, half)
            for rank in range(n_ranks)
        ]
    elif name == "dualpipev":
        shape = "v"
        programs = [_two_way(rank, n_ranks, n_micro, False, 0) for rank in range(n_ranks)]
    else:
        shape = "line"
        programs = [_one_way(name, rank, n_ranks, n_micro) for rank in range(n_ranks)]
    if n_late is not None:
        programs = [_limited(program, n_late) for program in programs]
    return Schedule(name, Stages(n_ranks, shape), n_micro, tuple(programs))


def nearest_micro(name: str, n_ranks: int, n_micro: int) -> int | None:
    """The nearest number of micro-batches that the schedule can run; None if there is none."""
    if name not in ("dualpipe", "dualpipev"):
        return max(n_micro, 1)
    if name == "dualpipe" and n_ranks % 2:
        return None
    return max(n_micro + (n_micro % 2 if name == "dualpipe" else 0), 2 * n_ranks)


def _one_way(name: str, rank: int, n_ranks: int, n_micro: int) -> Program:
    """GPipe: all F, then all B. 1F1B: as few F ahead as keep the ranks busy. ZB1P: with late W."""
    ahead = n_micro if name == "gpipe" else min(n_ranks - 1 - rank, n_micro)
    program = [(Op("F", 0, micro),) for micro in range(ahead)]
    late: collections.deque[int] = collections.deque()
    for micro in range(n_micro):
        forward = micro + ahead
        if forward < n_micro:
            program.append((Op("F", 0, forward),))
        program.append((Op("X" if name == "zb1p" else "B", 0, micro),))
        if name == "zb1p":
            late.append(micro)
            if len(late) > rank or forward >= n_micro:  # as much in memory as 1F1B at most
                program.append((Op("W", 0, late.popleft()),))
    return program + [(Op("W", 0, micro),) for micro in late]


def _two_way(place: int, depth: int, n_micro: int, mirrored: bool, second: int) -> Program:
    """A rank's program where micro-batches come from two sides, in the report's eight phases.

    Args:
        place: how far the rank is from the side that is nearer, of `depth` places.
        n_micro: micro-batches of each chunk.
        mirrored: whether the near side is that of chunk 1.
        second: number of the first micro-batch of chunk 1.
    """
    done = collections.Counter()
    late: collections.deque[tuple[int, int]] = collections.deque()
    rest = depth - 1 - place

    def op(kind: str, far: int) -> Op:
        chunk = far ^ int(mirrored)
        micro = done[kind == "F", chunk] + second * chunk
        done[kind == "F", chunk] += 1
        if kind == "X":
            late.append((chunk, micro))
        return Op(kind, chunk, micro)

    def weights() -> GradTap:
        return (Op("W", *late.popleft()),)

    program: Program = [(op("F", 0),) for _ in range(2 * rest)]
    for _ in range(place + 1):
        program += [(op("F", 0),), (op("F", 1),)]
    for _ in range(rest):
        program += [(op("X", 1),), weights(), (op("F", 1),)]
    for turn in range(n_micro - 2 * depth + place + 1):
        if turn == 0 and rest == 0:  # in the middle the first B is that of the F just before
            program += [(op("F", 0),), (op("B", 1),)]
        else:
            program.append((op("F", 0), op("B", 1)))
        program.append((op("F", 1), op("B", 0)))
    for _ in range(rest):
        program += [(op("B", 1),), (op("F", 1), op("B", 0))]
    for turn in range(2 * (place + 1)):  # the second half puts W off
        kind = "X" if turn > place else "B"
        program.append((op(kind, 1 - turn % 2),))
    for _ in range(rest):
        program += [weights(), (op("X", 0),)]
    return program + [weights() for _ in range(len(late))]


def _limited(program: Program, n_late: int) -> Program:
    """A program with B in place of X and W where more than `n_late` would wait."""
    waiting: set[tuple[int, int]] = set()
    new: Program = []
    for slot in program:
        for op in slot:
            key = (op.chunk, op.micro)
            if op.kind == "X" and len(waiting) < n_late:
                waiting.add(key)
            elif op.kind == "X":
                slot = (op._replace(kind="B"),)
            elif op.kind == "W" and key not in waiting:
                slot = ()
            elif op.kind == "W":
                waiting.remove(key)
        new += [slot] if slot else []
    return new


def makespan(schedule: Schedule, costs: Costs) -> tuple[float, list[float]]:
    """Time until the last slot ends if messages take none, and how long each rank works."""
    end: dict[tuple, float] = {}
    n_ranks = schedule.stages.n_ranks
    at, free, busy = [0] * n_ranks, [0.0] * n_ranks, [0.0] * n_ranks
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(schedule.programs):
            while at[rank] < len(program):
                slot = program[at[rank]]
                needs = [need for op in slot for need in schedule.needs(rank, op)]
                if any(need not in end for need in needs):
                    break
                cost = costs.of(slot, rank, schedule.stages)
                free[rank] = max([free[rank], *(end[need] for need in needs)]) + cost
                busy[rank] += cost
                end |= {(op.step, rank, op.chunk, op.micro): free[rank] for op in slot}
                at[rank] += 1
                moved = True
    if any(at[rank] < len(program) for rank, program in enumerate(schedule.programs)):
        raise ValueError(f"{schedule.name}: ranks wait for each other at slots {at}")
    return max(free), busy


def bubble(schedule: Schedule, costs: Costs) -> float:
    """Time that the rank waits that waits longest."""
    total, busy = makespan(schedule, costs)
    return total - min(busy)


def bubble_formula(name: str, n_ranks: int, costs: Costs) -> float:
    """The report's table 2, and GPipe as 1F1B; a V has 2P stages of half the size."""
    f, b, w = costs.f, costs.x + costs.w, costs.w
    fb = f + b if costs.fb is None else costs.fb
    formulas: dict[str, Callable[[], float]] = {
        "gpipe": lambda: (n_ranks - 1) * (f + b),
        "1f1b": lambda: (n_ranks - 1) * (f + b),
        "zb1p": lambda: (n_ranks - 1) * (f + b - 2 * w),
        "dualpipe": lambda: (n_ranks / 2 - 1) * (fb + b - 3 * w),
        "dualpipev": lambda: (n_ranks - 1) * (fb + b - 3 * w),
    }
    return formulas[name]()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--p", type=int, default=8, help="ranks of the pipeline (default: 8)")
    parser.add_argument("--m", type=int, default=20, help="micro-batches (default: 20)")
    parser.add_argument("--fused", type=float, help="time of F and B side by side (default: 3)")
    parser.add_argument("--out", default="schedules.png", help="picture (default: schedules.png)")
    arguments = parser.parse_args()
    from sharding.gantt import report

    try:
        report(arguments.p, arguments.m, arguments.fused, arguments.out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
