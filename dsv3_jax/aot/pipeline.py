"""The predicted time of a compiled step whose layers lie in pipeline stages.

In the program every part of a tick (forward, backward, both at once, head and loss, ...) is a loop
or conditional of its own in a named scope (sharding/pipeline.py). The simulator gives the seconds
of each part; the tick table says how often each rank runs it in each tick; a rank ends a tick
together with its neighbours. All figures of the program but its time (cost, bytes, exposed share)
are means over the ranks, without their waiting.
"""

import re
from typing import NamedTuple

import numpy as np

from dsv3_jax.aot.hlo import Instruction, Module
from dsv3_jax.aot.simulator import Simulator
from dsv3_jax.pipeline_plan import Pipeline
from sharding.pipeline import SCOPE
from sharding.ticks import lockstep_time, trip_counts

PART = re.compile(rf"{SCOPE}(\w+)/(?:while|cond)$")
LAYERS = {"F_BW": "forward beside backward", "F": "forward", "BW": "backward"}


def tick_parts(module: Module) -> dict[str, Instruction]:
    """Return the loop or conditional of every part of a tick, by the part's name."""
    return {
        found[1]: instruction
        for instruction in module.instructions("while", "conditional")
        if (found := PART.search(instruction.op_name))
    }


def mean_runs(module: Module, pipeline: Pipeline) -> dict[str, float]:
    """Return how often each part runs per tick and rank, by the name of its instruction."""
    counts = trip_counts(pipeline.table, pipeline.sizes)
    return {part.name: float(counts[name].mean()) for name, part in tick_parts(module).items()}


def layer_bodies(module: Module) -> dict[str, str]:
    """Return the loop bodies that run a layer, by direction."""
    parts = tick_parts(module)
    return {LAYERS[name]: module.body(part).name for name, part in parts.items() if name in LAYERS}


class PipelineTimes(NamedTuple):
    """Seconds of a step."""

    step: float
    busy: float  # mean over the ranks
    parts: dict[str, float]  # one run of each part of a tick


def times(simulator: Simulator, pipeline: Pipeline) -> PipelineTimes:
    """Return the times of a program whose parts are simulated as often as `mean_runs` says.

    Raises:
        ValueError: the program lacks a part that the tick table uses.
    """
    parts = tick_parts(simulator.module)
    counts = trip_counts(pipeline.table, pipeline.sizes)
    if missing := {name for name, n in counts.items() if n.any()} - set(parts):
        raise ValueError(f"the program has no part {', '.join(sorted(missing))} of the pipeline")
    seconds = {name: simulator.callee(part).makespan for name, part in parts.items()}
    tick = next(
        computation.name
        for computation in simulator.module.computations.values()
        if next(iter(parts.values())).name in computation.by_name
    )
    in_parts = sum(counts[name] * seconds[name] for name in parts)  # [ticks ranks]
    between = simulator.computation(tick).makespan - in_parts.mean()
    busy = simulator.step().makespan
    outside = busy - len(in_parts) * (in_parts.mean() + between)
    return PipelineTimes(outside + lockstep_time((in_parts + between).tolist()), busy, seconds)


def figures(simulator: Simulator, pipeline: Pipeline) -> dict:
    """Return the report's entries on the pipeline."""
    found, counts = times(simulator, pipeline), trip_counts(pipeline.table, pipeline.sizes)
    return {
        "schedule": pipeline.table.schedule.name,
        "stages": list(pipeline.sizes),
        "micro_batches": pipeline.table.schedule.n_micro,
        "step_seconds": found.step,
        "waiting_share": 1.0 - found.busy / found.step,
        "seconds": found.parts,
        "trips_of_the_busiest_rank": {
            name: int(np.max(n.sum(0))) for name, n in counts.items() if n.any()
        },
    }
