"""The predicted time of a scheduled program, and how much of its communication compute hides.

A computation is simulated in the order of its schedule, with three units that work side by side:

- Compute: an instruction takes the longer of its matmul FLOPs over `efficiency` times the peak and
  its bytes over the HBM's bandwidth. Vector arithmetic, sorting and launches take no other time.
- The link, a queue: a collective takes payload / `link_rate(collective)`, without latency or other
  traffic. An asynchronous one starts at its start instruction, or when the link is free, and its
  done instruction waits for it; any other blocks compute.
- Copies, a queue: asynchronous copies between memories and SparseCore calls, at the HBM's
  bandwidth, which compute does not miss. Waiting for them counts as compute.

Collectives take no HBM bandwidth. A loop's body is simulated once, from an idle link, and
multiplied by the trip count; what was started outside of a loop continues beside it. A done whose
start lies outside of its computation waits for nothing. Of a conditional the slowest branch counts.
All devices are taken to be in step; waiting in pipeline stages is added in `pipeline.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from dsv3_jax.aot.collectives import Collective, collective, launched_by, phase
from dsv3_jax.aot.hlo import Computation, Instruction, Module
from dsv3_jax.aot.op_cost import KERNELS, Kernels, OpCost, op_cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The rates of a device in FLOP per second and bytes per second.

    Attributes:
        link_rate: the rate at which a device sends its payload of a collective.
        ragged_fill: the part of their buffers that ragged all-to-alls send.
        efficiency: the part of the peak that large matmuls reach.
        fp8_peak_flops: equal to `peak_flops` if None.
    """

    peak_flops: float
    hbm_bandwidth: float
    link_rate: Callable[[Collective], float]
    ragged_fill: float = 1.0
    efficiency: float = 1.0
    fp8_peak_flops: float | None = None

    def seconds(self, cost: OpCost) -> float:
        fp8_peak = self.fp8_peak_flops or self.peak_flops
        matmuls = (cost.flops - cost.fp8_flops) / self.peak_flops + cost.fp8_flops / fp8_peak
        return max(matmuls / self.efficiency, cost.hbm_bytes / self.hbm_bandwidth)


class Event(NamedTuple):
    """An interval in the simulation of a computation, in seconds from the computation's start.

    Attributes:
        lane: "compute", "link", or "in flight": a collective from its start to its done.
        kind: the kind of the collective; "loop"; "wait"; or of compute what limits it, "matmul" or
            "memory".
        label: the operation in the program.
    """

    lane: str
    start: float
    end: float
    name: str
    kind: str
    label: str


class CollectiveTime(NamedTuple):
    """A collective instruction, and the totals of its runs in one run of a computation."""

    name: str
    collective: Collective
    asynchronous: bool
    runs: float
    seconds: float
    exposed: float  # seconds in which compute stood still for it and the collectives before it
    hidden_by: float = 0.0  # FLOPs between its start and its done

    def times(self, n: float) -> "CollectiveTime":
        runs, seconds, exposed, hidden_by = (n * total for total in self[3:])
        return self._replace(runs=runs, seconds=seconds, exposed=exposed, hidden_by=hidden_by)


@dataclasses.dataclass
class Simulation:
    """The outcome of one run of a computation and all it calls; times in seconds."""

    makespan: float = 0.0
    compute: float = 0.0
    matmul_bound: float = 0.0  # the part of `compute` that FLOPs limit
    cost: OpCost = OpCost()
    collectives: list[CollectiveTime] = dataclasses.field(default_factory=list)
    events: list[Event] = dataclasses.field(default_factory=list)

    @property
    def communication(self) -> float:
        return sum(collective.seconds for collective in self.collectives)

    @property
    def exposed_share(self) -> float:
        """(makespan - compute) / communication: 1 if nothing is hidden."""
        return (self.makespan - self.compute) / self.communication if self.communication else 0.0

    @property
    def covered_share(self) -> float:
        return 1.0 - self.exposed_share if self.communication else 0.0

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Return totals per kind of collective: counts, bytes sent, and seconds.

        "asynchronous" and "beside_products" count the collectives that are asynchronous and that
        have matmuls between start and done; "largest_bytes" is the largest payload.
        """
        rows: dict[str, dict[str, float]] = {}
        for timed in self.collectives:
            payload = timed.collective.payload
            figures = {
                "count": timed.runs,
                "asynchronous": timed.runs * timed.asynchronous,
                "beside_products": timed.runs * (timed.hidden_by > 0),
                "bytes": timed.runs * payload,
                "seconds": timed.seconds,
                "exposed_seconds": timed.exposed,
            }
            blank = dict.fromkeys((*figures, "largest_bytes"), 0.0)
            row = rows.setdefault(timed.collective.kind, blank)
            for name, figure in figures.items():
                row[name] += figure
            row["largest_bytes"] = max(row["largest_bytes"], payload)
        return rows


class Simulator:
    """Simulates the computations of a module on a machine, each once.

    Args:
        trips: of every loop, by name (`loops.trip_counts`, and guesses for the rest).
        kernels: FLOPs of custom kernels.
        branch_frequency: by name of a conditional, the part of its runs in which the slowest
            branch is taken; 1 if absent.
    """

    def __init__(
        self,
        module: Module,
        machine: Machine,
        trips: Mapping[str, float],
        kernels: Kernels = KERNELS,
        branch_frequency: Mapping[str, float] = MappingProxyType({}),
    ):
        self.module, self.machine, self.trips, self.kernels = module, machine, trips, kernels
        self.branch_frequency = branch_frequency
        self._simulations: dict[str, Simulation] = {}

    def step(self) -> Simulation:
        """Simulate the whole program."""
        return self.computation(self.module.entry)

    def computation(self, name: str) -> Simulation:
        if name not in self._simulations:
            run = _ComputationRun(self, self.module.computations[name])
            self._simulations[name] = run.simulate()
        return self._simulations[name]

    def callee(self, instruction: Instruction) -> Simulation:
        """Simulate a loop's body, a called computation, or the slowest branch of a conditional."""
        names = instruction.called
        if instruction.opcode == "while":
            names = (self.module.body(instruction).name,)
        return max((self.computation(name) for name in names), key=lambda run: run.makespan)

    def runs_of(self, instruction: Instruction) -> float:
        """Return how often `callee` runs for each run of the instruction."""
        if instruction.opcode != "while":
            return self.branch_frequency.get(instruction.name, 1.0)
        if instruction.name not in self.trips:
            raise KeyError(f"no trips given for loop {instruction.name} ({instruction.op_name})")
        return self.trips[instruction.name]

    def layer_bodies(self) -> dict[str, str]:
        """Return the longest loop body with matmuls, "forward" and "backward" (JAX transposes)."""
        longest: dict[str, tuple[float, str]] = {}
        for loop in self.module.instructions("while"):
            body = self.callee(loop)
            direction = "backward" if "transpose(" in loop.op_name else "forward"
            seconds, _ = longest.get(direction, (0.0, ""))
            if self.runs_of(loop) and body.cost.flops and body.makespan > seconds:
                longest[direction] = body.makespan, self.module.body(loop).name
        return {direction: body for direction, (_, body) in longest.items()}


class _InFlight(NamedTuple):
    """An asynchronous collective on its way."""

    start: float
    flops: float  # of the computation before the start
    collective: Collective
    number: int  # in `Simulation.collectives`


class _ComputationRun:
    """The simulation of one computation."""

    def __init__(self, simulator: Simulator, computation: Computation):
        self.simulator, self.computation = simulator, computation
        self.module, self.machine = simulator.module, simulator.machine
        self.result = Simulation()
        self.now = self.link_free = self.copies_free = 0.0
        self.finish: dict[str, float] = {}  # when what was started ends
        self.in_flight: dict[str, _InFlight] = {}

    def simulate(self) -> Simulation:
        for instruction in self.computation.instructions:
            if instruction.opcode in ("while", "call", "conditional"):
                self._call(instruction)
                continue
            if instruction.opcode == "async-start" and not instruction.operands:
                continue  # loads a program
            at = phase(self.module, instruction)
            if at == "done":
                self._wait(instruction)
            elif at:
                self._start(instruction, blocking=at == "blocking")
            else:
                self._compute(instruction)
        self.result.makespan = self.now
        return self.result

    def _cost(self, instruction: Instruction) -> OpCost:
        if instruction.opcode == "async-update":
            instruction = self.computation.by_name[instruction.operands[0]]
        return op_cost(self.module, self.computation, instruction, self.simulator.kernels)

    def _compute(self, instruction: Instruction):
        cost = self._cost(instruction)
        seconds = self.machine.seconds(cost)
        matmul_bound = seconds * self.machine.hbm_bandwidth > cost.hbm_bytes * (1 + 1e-9)
        self._busy(instruction, seconds, "matmul" if matmul_bound else "memory")
        self.result.matmul_bound += seconds * matmul_bound
        self.result.cost += cost

    def _busy(self, instruction: Instruction, seconds: float, kind: str):
        if seconds:
            end = self.now + seconds
            self._record("compute", self.now, end, instruction, kind)
            self.result.compute += seconds
            self.now = end

    def _start(self, instruction: Instruction, blocking: bool):
        """Put a collective on the link, or an asynchronous copy or call on its queue."""
        found = collective(self.module, self.computation, instruction)
        cost = self._cost(instruction)
        self.result.cost += cost
        if not found:
            self.copies_free = max(self.now, self.copies_free) + self.machine.seconds(cost)
            self.finish[instruction.name] = self.copies_free
            return
        if found.kind == "ragged-all-to-all":
            found = found._replace(payload=found.payload * self.machine.ragged_fill)
        seconds = found.payload / self.machine.link_rate(found) if found.payload else 0.0
        begin = max(self.now, self.link_free)
        self.link_free = begin + seconds
        name, number = instruction.name, len(self.result.collectives)
        self._record("link", begin, self.link_free, instruction, found.kind)
        exposed = self.link_free - self.now if blocking else 0.0
        timed = CollectiveTime(name, found, not blocking, 1.0, seconds, exposed)
        self.result.collectives.append(timed)
        if blocking:
            self._stall(self.link_free, instruction)
            return
        self.finish[name] = self.link_free
        self.in_flight[name] = _InFlight(self.now, self.result.cost.flops, found, number)

    def _wait(self, done: Instruction):
        name = launched_by(self.module, self.computation, done)
        if name not in self.finish:
            return
        exposed = max(0.0, self.finish[name] - self.now)
        if name not in self.in_flight:
            self._busy(done, exposed, "wait")
            return
        self._stall(self.now + exposed, done)
        start, flops, found, number = self.in_flight[name]
        self._record("in flight", start, self.now, self.computation.by_name[name], found.kind)
        timed = self.result.collectives[number]
        hidden_by = self.result.cost.flops - flops
        self.result.collectives[number] = timed._replace(exposed=exposed, hidden_by=hidden_by)

    def _stall(self, until: float, instruction: Instruction):
        if until > self.now:
            self._record("compute", self.now, until, instruction, "wait")
            self.now = until

    def _record(self, lane: str, start: float, end: float, instruction: Instruction, kind: str):
        label = _label(self.module, instruction)
        self.result.events.append(Event(lane, start, end, instruction.name, kind, label))

    def _call(self, instruction: Instruction):
        """Add the runs of a loop's body, a called computation or the slowest branch."""
        callee, runs = self.simulator.callee(instruction), self.simulator.runs_of(instruction)
        end = self.now + runs * callee.makespan
        if end > self.now:
            self._record("compute", self.now, end, instruction, "loop")
        self.now = end
        if callee.communication and runs:
            self.link_free = max(self.link_free, end)
        self.result.compute += runs * callee.compute
        self.result.matmul_bound += runs * callee.matmul_bound
        self.result.cost += callee.cost.times(runs)
        if runs:
            self.result.collectives += [timed.times(runs) for timed in callee.collectives]


def _label(module: Module, instruction: Instruction) -> str:
    """Return a loop's source line, a matmul's einsum, or else the last part of JAX's path."""
    if instruction.opcode == "while":
        return module.source(instruction).rsplit("/", 1)[-1] or instruction.name
    *path, last = instruction.op_name.split("/")
    return (path[-1] if path and last == "dot_general" else last) or instruction.name
