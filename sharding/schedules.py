"""Pipeline schedules: which rank works on which micro-batch, in which order.

A stage is a run of layers. Every micro-batch passes through all stages forwards, then backwards.
Work comes in four kinds, named as in the zero-bubble papers (Qi et al., arXiv 2401.10241):

    F    forward
    B    backward for the input (dgrad), for which the rank of the stage before waits
    W    backward for the weights (wgrad), for which no rank waits
    BW   B and W in one; the report's table 2 calls this B

In every schedule a rank has a program: a list in which each entry is one piece of work, or an F and
a BW of two micro-batches side by side, so that one computes while the other's tokens travel.

    gpipe, 1f1b   one stage per rank; a rank that waits for others is idle
    zb1p          1F1B whose W fill the waiting time (arXiv 2401.10241)
    dualpipe      micro-batches enter at both ends, so every rank holds two stages (report 3.2.1)
    dualpipev     2P stages in a V: the first half runs down the ranks, the second half back up

`python -m tools.schedules` draws all five and compares their waiting time with the report's.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

NAMES = ("gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev")


class Op(NamedTuple):
    """One piece of work of a rank."""

    kind: str  # "F", "B", "W" or "BW"
    chunk: int  # 0, or 1 for the rank's second stage
    micro: int  # micro-batch

    @property
    def phase(self) -> str:
        """The kind of work that other ranks wait for: B is part of BW."""
        return "B" if self.kind == "BW" else self.kind


Work = tuple[Op, ...]  # what a rank does in one tick
Program = list[Work]


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages that a rank holds.

    Shape "line" is one stage per rank; "bidirectional" is its own stage and that of the rank
    mirrored in the middle; "v" is two of the 2P stages of a V.
    """

    n_ranks: int
    shape: str

    @property
    def n_chunks(self) -> int:
        return 1 if self.shape == "line" else 2

    @property
    def n_stages(self) -> int:
        return self.n_ranks * (2 if self.shape == "v" else 1)

    def stage(self, rank: int, chunk: int) -> int:
        """Return the stage that a rank holds as that chunk."""
        last = 2 * self.n_ranks - 1 if self.shape == "v" else self.n_ranks - 1
        return last - rank if chunk else rank

    def after(self, rank: int, chunk: int) -> tuple[int, int] | None:
        """Return the rank and chunk of the next stage; None after the last."""
        if self.stage(rank, chunk) == self.n_stages - 1:
            return None
        if self.shape == "v" and chunk == 0 and rank == self.n_ranks - 1:
            return rank, 1
        return (rank - 1 if chunk else rank + 1), chunk

    def before(self, rank: int, chunk: int) -> tuple[int, int] | None:
        """Return the rank and chunk of the stage before; None before the first."""
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
        """Return (phase, rank, chunk, micro) of all work that must be done before `op`."""
        own = (rank, op.chunk, op.micro)
        if op.kind == "W":
            return [("B", *own)]
        if op.kind == "F":
            before = self.stages.before(rank, op.chunk)
            return [] if before is None else [("F", *before, op.micro)]
        after = self.stages.after(rank, op.chunk)
        return [("F", *own)] + ([] if after is None else [("B", *after, op.micro)])


class Costs(NamedTuple):
    """The time of a layer by kind of work, and of what stands before and after all layers.

    Embedding and dense layers take `embed` forwards and `embed_backward` backwards, W and
    recomputation included. The head takes `head` in both directions together, before its B.
    """

    f: float = 1.0
    b: float = 1.0
    w: float = 1.0
    f_bw: float | None = None  # F and BW side by side; None: as long as one after the other
    sizes: Sequence[float] | None = None  # layers of all stages; None: 1 each
    embed: float = 0.0
    embed_backward: float = 0.0
    head: float = 0.0

    def of(self, work: Work, rank: int, stages: Stages) -> float:
        """Return the time of a tick's work; the rest of the larger of F and BW runs alone."""
        stage = {op: stages.stage(rank, op.chunk) for op in work}
        size = {op: 1.0 if self.sizes is None else self.sizes[stage[op]] for op in work}
        alone = {"F": self.f, "B": self.b, "W": self.w, "BW": self.b + self.w}
        total = sum(alone[op.kind] * size[op] for op in work)
        if self.f_bw is not None and {op.kind for op in work} == {"F", "BW"}:
            total -= min(size.values()) * (self.f + self.b + self.w - self.f_bw)
        for op in work:
            if stage[op] == 0:
                total += {"F": self.embed, "W": 0.0}.get(op.kind, self.embed_backward)
            if stage[op] == stages.n_stages - 1 and op.phase == "B":
                total += self.head
        return total


def make_schedule(
    name: str, n_ranks: int, n_micro: int, max_deferred_wgrads: int | None = None
) -> Schedule:
    """Return the schedule of that name.

    Args:
        max_deferred_wgrads: micro-batches of a rank whose W may be deferred at a time; any further
            B runs as BW. None for as many as the schedule has.

    Raises:
        ValueError: unknown name, or too few or odd micro-batches; the message has the nearest
            number that works.
    """
    if name not in NAMES:
        raise ValueError(f"schedule {name!r} must be one of {', '.join(NAMES)}")
    fits = nearest_n_micro(name, n_ranks, n_micro)
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
        shape, half = "bidirectional", n_micro // 2
        programs = [
            _dualpipe(min(rank, n_ranks - 1 - rank), n_ranks // 2, half, 2 * rank >= n_ranks, half)
            for rank in range(n_ranks)
        ]
    elif name == "dualpipev":
        shape = "v"
        programs = [_dualpipe(rank, n_ranks, n_micro, False, 0) for rank in range(n_ranks)]
    else:
        shape = "line"
        programs = [_one_direction(name, rank, n_ranks, n_micro) for rank in range(n_ranks)]
    if max_deferred_wgrads is not None:
        programs = [_limit_deferred(program, max_deferred_wgrads) for program in programs]
    return Schedule(name, Stages(n_ranks, shape), n_micro, tuple(programs))


def nearest_n_micro(name: str, n_ranks: int, n_micro: int) -> int | None:
    """Return the nearest number of micro-batches that the schedule can run, or None."""
    if name not in ("dualpipe", "dualpipev"):
        return max(n_micro, 1)
    if name == "dualpipe" and n_ranks % 2:
        return None
    return max(n_micro + (n_micro % 2 if name == "dualpipe" else 0), 2 * n_ranks)


def _one_direction(name: str, rank: int, n_ranks: int, n_micro: int) -> Program:
    """Return a rank's program of GPipe, 1F1B or ZB1P.

    GPipe runs all F, then all BW. 1F1B runs as few F ahead as keep the ranks busy. ZB1P is 1F1B
    with deferred W.
    """
    ahead = n_micro if name == "gpipe" else min(n_ranks - 1 - rank, n_micro)
    program = [(Op("F", 0, micro),) for micro in range(ahead)]
    deferred: collections.deque[int] = collections.deque()
    for micro in range(n_micro):
        forward = micro + ahead
        if forward < n_micro:
            program.append((Op("F", 0, forward),))
        program.append((Op("B" if name == "zb1p" else "BW", 0, micro),))
        if name == "zb1p":
            deferred.append(micro)
            if len(deferred) > rank or forward >= n_micro:  # no more in memory than in 1F1B
                program.append((Op("W", 0, deferred.popleft()),))
    return program + [(Op("W", 0, micro),) for micro in deferred]


def _dualpipe(depth: int, n_depths: int, n_micro: int, mirrored: bool, second: int) -> Program:
    """Return a rank's program where micro-batches come from two sides.

    The eight steps are those of the report's figure 5 and carry the names of the DualPipe code:
    0 is the chunk whose micro-batches come from the near side, 1 the other one.

    Args:
        depth: distance of the rank from its near side, out of `n_depths`.
        n_micro: micro-batches of each chunk.
        mirrored: whether the near side is that of chunk 1.
        second: number of the first micro-batch of chunk 1.
    """
    done = collections.Counter()
    deferred: collections.deque[tuple[int, int]] = collections.deque()
    rest = n_depths - 1 - depth

    def op(kind: str, side: int) -> Op:
        chunk = side ^ int(mirrored)
        micro = done[kind == "F", chunk] + second * chunk
        done[kind == "F", chunk] += 1
        if kind == "B":
            deferred.append((chunk, micro))
        return Op(kind, chunk, micro)

    def wgrad() -> Work:
        return (Op("W", *deferred.popleft()),)

    # Step 1: nF0
    program: Program = [(op("F", 0),) for _ in range(2 * rest)]
    # Step 2: nF0F1
    for _ in range(depth + 1):
        program += [(op("F", 0),), (op("F", 1),)]
    # Step 3: nB1W1F1
    for _ in range(rest):
        program += [(op("B", 1),), wgrad(), (op("F", 1),)]
    # Step 4, the main one: nF0B1F1B0, in which F and BW run side by side
    for number in range(n_micro - 2 * n_depths + depth + 1):
        if number == 0 and rest == 0:  # in the middle the first BW is that of the F just before
            program += [(op("F", 0),), (op("BW", 1),)]
        else:
            program.append((op("F", 0), op("BW", 1)))
        program.append((op("F", 1), op("BW", 0)))
    # Step 5: nB1F1B0
    for _ in range(rest):
        program += [(op("BW", 1),), (op("F", 1), op("BW", 0))]
    # Step 6: nB1B0, whose second half defers W
    for number in range(2 * (depth + 1)):
        kind = "B" if number > depth else "BW"
        program.append((op(kind, 1 - number % 2),))
    # Step 7: nWB0
    for _ in range(rest):
        program += [wgrad(), (op("B", 0),)]
    # Step 8: nW
    return program + [wgrad() for _ in range(len(deferred))]


def _limit_deferred(program: Program, limit: int) -> Program:
    """Replace B and W by BW where the W of more than `limit` micro-batches would be deferred."""
    deferred: set[tuple[int, int]] = set()
    limited: Program = []
    for work in program:
        for op in work:
            key = (op.chunk, op.micro)
            if op.kind == "B" and len(deferred) < limit:
                deferred.add(key)
            elif op.kind == "B":
                work = (op._replace(kind="BW"),)
            elif op.kind == "W" and key not in deferred:
                work = ()
            elif op.kind == "W":
                deferred.remove(key)
        limited += [work] if work else []
    return limited
