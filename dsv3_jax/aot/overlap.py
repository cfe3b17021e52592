"""How long a scheduled program takes, and what of its communication compute hides.

The model walks each computation in its order, with three things that work side by side:

- compute: an instruction takes the longer of its matrix FLOPs over `efficiency` times the peak and
  its bytes over the HBM's bandwidth. Vector arithmetic, sorting and launches cost nothing else.
- the link: one queue. An exchange takes payload / `link_rate(exchange)`; there is no latency, and
  no other exchange on the way. An asynchronous one begins at its start, or when the link is free,
  and its `done` waits; any other blocks compute.
- copies: one queue for asynchronous copies between memories and for SparseCore calls, at the HBM's
  bandwidth, which compute does not miss. What a `done` waits for here counts as compute.

Exchanges take nothing of the HBM's bandwidth. A loop's body is walked once, from an idle link, and
multiplied by its trips; what is started outside of a loop goes on beside it. A `done` whose start
lies outside its computation waits for nothing. Of a conditional the slowest branch counts. All
devices are taken to be in step; what stages of a pipeline wait is not in here (`pipeline.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from dsv3_jax.aot.collectives import Collective, collective, launched_by, phase
from dsv3_jax.aot.hlo import Computation, Instruction, Module
from dsv3_jax.aot.work import KERNELS, Kernels, Work, work

NOTHING = Work()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a device can do, in FLOP/s and bytes a second.

    `link_rate` gives the rate at which a device sends its payload of an exchange, which may
    depend on kind and members; `ragged_fill` is the share of their buffers that ragged exchanges
    send, and `efficiency` that of the peak which large products reach.
    """

    peak_flops: float
    hbm_bandwidth: float
    link_rate: Callable[[Collective], float]
    ragged_fill: float = 1.0
    efficiency: float = 1.0
    fp8_peak_flops: float | None = None  # the other peak, unless given

    def seconds(self, work: Work) -> float:
        narrow = self.fp8_peak_flops or self.peak_flops
        products = (work.flops - work.fp8_flops) / self.peak_flops + work.fp8_flops / narrow
        return max(products / self.efficiency, work.hbm_bytes / self.hbm_bandwidth)


class Event(NamedTuple):
    """A stretch of time, in seconds from the start of its computation.

    `lane` is "compute", "link", or "flight", which is an exchange from its start to its done.
    `kind` is that of the exchange, "loop", "wait", or for compute "product" or "memory": what
    limits it. `label` says what it is in the program.
    """

    lane: str
    start: float
    end: float
    name: str
    kind: str
    label: str


class Exchange(NamedTuple):
    """A collective instruction, and what its runs in a step take together."""

    name: str
    collective: Collective
    asynchronous: bool
    times: float
    seconds: float
    exposed: float  # seconds in which compute stood still for it and for those before it
    beside: float = 0.0  # FLOPs of matrix products between its start and its done


@dataclasses.dataclass
class Schedule:
    """The walk through a computation and all it runs; seconds and work are those of one run."""

    makespan: float = 0.0
    compute: float = 0.0
    products: float = 0.0  # of it, where FLOPs are the limit
    work: Work = NOTHING
    exchanges: list[Exchange] = dataclasses.field(default_factory=list)
    events: list[Event] = dataclasses.field(default_factory=list)

    @property
    def communication(self) -> float:
        return sum(exchange.seconds for exchange in self.exchanges)

    @property
    def exposed_share(self) -> float:
        """(makespan - compute) / communication: 1 if nothing is hidden."""
        return (self.makespan - self.compute) / self.communication if self.communication else 0.0

    @property
    def covered_share(self) -> float:
        return 1.0 - self.exposed_share if self.communication else 0.0

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Of each kind of exchange, all in a step: how many, how many of them asynchronous and
        how many with matrix products beside them, bytes sent, also in the largest, and seconds.
        """
        rows: dict[str, dict[str, float]] = {}
        for exchange in self.exchanges:
            kind, payload = exchange.collective.kind, exchange.collective.payload
            figures = {
                "count": exchange.times,
                "asynchronous": exchange.times * exchange.asynchronous,
                "beside_products": exchange.times * (exchange.beside > 0),
                "bytes": exchange.times * payload,
                "seconds": exchange.seconds,
                "exposed_seconds": exchange.exposed,
            }
            row = rows.setdefault(kind, dict.fromkeys((*figures, "largest_bytes"), 0.0))
            for name, figure in figures.items():
                row[name] += figure
            row["largest_bytes"] = max(row["largest_bytes"], payload)
        return rows


class Walk:
    """Walks of a module's computations on a machine, each done once.

    Args:
        trips: of every loop, by its name (`hlo.trip_counts`, and guesses for the rest).
        kernels: FLOPs of custom kernels.
        odds: of conditionals, how often the slowest branch runs; always, unless given.
    """

    def __init__(
        self,
        module: Module,
        machine: Machine,
        trips: Mapping[str, float],
        kernels: Kernels = KERNELS,
        odds: Mapping[str, float] = MappingProxyType({}),
    ):
        self.module, self.machine, self.trips, self.kernels = module, machine, trips, kernels
        self.odds = odds
        self.done: dict[str, Schedule] = {}

    def step(self) -> Schedule:
        """The whole program."""
        return self.computation(self.module.entry)

    def computation(self, name: str) -> Schedule:
        if name not in self.done:
            self.done[name] = _Clock(self, self.module.computations[name]).run()
        return self.done[name]

    def trips_of(self, loop: Instruction) -> float:
        if loop.name not in self.trips:
            raise KeyError(f"no trips given for loop {loop.name} ({loop.op_name})")
        return self.trips[loop.name]

    def layer_bodies(self) -> dict[str, str]:
        """The longest loop body with products, "forward" and "backward" (transposed by JAX)."""
        bodies: dict[str, str] = {}
        for computation in self.module.computations.values():
            for loop in computation.instructions:
                if loop.opcode != "while" or not self.trips_of(loop):
                    continue
                way = "backward" if "transpose(" in loop.op_name else "forward"
                body = loop.attribute("body").lstrip("%")
                if not self.computation(body).work.flops:
                    continue
                longest = self.computation(bodies[way]).makespan if way in bodies else 0.0
                if self.computation(body).makespan > longest:
                    bodies[way] = body
        return bodies


class _Clock:
    """The walk through one computation."""

    def __init__(self, walk: Walk, computation: Computation):
        self.walk, self.computation = walk, computation
        self.schedule = Schedule()
        self.now = self.link_free = self.copies_free = 0.0
        self.finish: dict[str, float] = {}  # of what was started
        self.flights: dict[str, tuple[float, float, Collective]] = {}  # since, FLOPs by then

    def run(self) -> Schedule:
        for instruction in self.computation.instructions:
            if instruction.opcode in ("while", "call", "conditional"):
                self._enter(instruction)
                continue
            if instruction.opcode == "async-start" and not instruction.operands:
                continue  # loads a program
            at = phase(self.walk.module, instruction)
            if at == "done":
                self._wait(instruction)
            elif at:
                self._start(instruction, at)
            else:
                self._compute(instruction)
        self.schedule.makespan = self.now
        return self.schedule

    def _work(self, instruction: Instruction) -> Work:
        if instruction.opcode == "async-update":
            instruction = self.computation.by_name[instruction.operands[0]]
        return work(self.walk.module, self.computation, instruction, self.walk.kernels)

    def _compute(self, instruction: Instruction):
        cost = self._work(instruction)
        seconds = self.walk.machine.seconds(cost)
        by_products = seconds * self.walk.machine.hbm_bandwidth > cost.hbm_bytes * (1 + 1e-9)
        self._busy(instruction, seconds, "product" if by_products else "memory")
        self.schedule.products += seconds * by_products
        self.schedule.work += cost

    def _busy(self, instruction: Instruction, seconds: float, kind: str):
        if seconds:
            end = self.now + seconds
            self._show("compute", self.now, end, instruction, kind)
            self.schedule.compute += seconds
            self.now = end

    def _start(self, instruction: Instruction, at: str):
        """Put an exchange on the link, or an asynchronous copy or call on its queue."""
        found = collective(self.walk.module, self.computation, instruction)
        self.schedule.work += self._work(instruction)
        if not found:
            seconds = self.walk.machine.seconds(self._work(instruction))
            self.copies_free = max(self.now, self.copies_free) + seconds
            self.finish[instruction.name] = self.copies_free
            return
        if found.kind == "ragged-all-to-all":
            found = found._replace(payload=found.payload * self.walk.machine.ragged_fill)
        seconds = found.payload / self.walk.machine.link_rate(found) if found.payload else 0.0
        begin = max(self.now, self.link_free)
        self.link_free = begin + seconds
        name = instruction.name
        self._show("link", begin, self.link_free, instruction, found.kind)
        blocks = at == "whole"
        exposed = self.link_free - self.now if blocks else 0.0
        exchange = Exchange(name, found, not blocks, 1.0, seconds, exposed)
        self.schedule.exchanges.append(exchange)
        if blocks:
            self._stall(self.link_free, instruction)
        else:
            self.finish[name] = self.link_free
            self.flights[name] = (self.now, self.schedule.work.flops, found)

    def _wait(self, done: Instruction):
        name = launched_by(self.walk.module, self.computation, done)
        if name not in self.finish:
            return
        late = max(0.0, self.finish[name] - self.now)
        if name not in self.flights:
            self._busy(done, late, "wait")
            return
        self._stall(self.now + late, done)
        start, flops, found = self.flights[name]
        self._show("flight", start, self.now, self.computation.by_name[name], found.kind)
        for i, exchange in enumerate(self.schedule.exchanges):
            if exchange.name == name:
                beside = self.schedule.work.flops - flops
                self.schedule.exchanges[i] = exchange._replace(exposed=late, beside=beside)

    def _stall(self, until: float, instruction: Instruction):
        if until > self.now:
            self._show("compute", self.now, until, instruction, "wait")
            self.now = until

    def _show(self, lane: str, start: float, end: float, instruction: Instruction, kind: str):
        label = _label(self.walk.module, instruction)
        self.schedule.events.append(Event(lane, start, end, instruction.name, kind, label))

    def _enter(self, instruction: Instruction):
        """Run a loop's body as often as it trips, a called computation or the slowest branch."""
        if instruction.opcode == "while":
            times = self.walk.trips_of(instruction)
            names = [instruction.attribute("body").lstrip("%")]
        else:
            times = self.walk.odds.get(instruction.name, 1.0)
            names = list(instruction.called)
        inner = max((self.walk.computation(n) for n in names), key=lambda one: one.makespan)
        end = self.now + times * inner.makespan
        if end > self.now:
            self._show("compute", self.now, end, instruction, "loop")
        self.now = end
        if inner.communication and times:
            self.link_free = max(self.link_free, end)
        self.schedule.compute += times * inner.compute
        self.schedule.products += times * inner.products
        self.schedule.work += inner.work.times(times)
        self.schedule.exchanges += [
            exchange._replace(
                times=times * exchange.times,
                seconds=times * exchange.seconds,
                exposed=times * exchange.exposed,
                beside=times * exchange.beside,
            )
            for exchange in inner.exchanges
            if times
        ]


def _label(module: Module, instruction: Instruction) -> str:
    """A loop's place in the source, else the last part of JAX's path; a product's einsum."""
    if instruction.opcode == "while":
        return module.source(instruction).rsplit("/", 1)[-1] or instruction.name
    *path, last = instruction.op_name.split("/")
    return (path[-1] if path and last == "dot_general" else last) or instruction.name
