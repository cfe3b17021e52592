"""Time of a compiled step whose layers lie in pipeline stages.

In the program every part of a tick is a loop or a branch of its own, under a name (`turns` in
sharding/pipeline.py). The walk through the program gives each part's seconds; the table says how
often each rank runs it in each tick; ranks end a tick together with their neighbours. All that is
said of the program apart from its time (work, bytes, what is exposed) is the mean over the ranks
while they are at work.
"""

import re
from typing import NamedTuple

import numpy as np

from dsv3_jax.aot.hlo import Instruction, Module
from dsv3_jax.aot.overlap import Walk
from dsv3_jax.pipeline_plan import Pipeline
from sharding.pipeline import turns
from sharding.ticks import joined

NAME = re.compile(r"pipeline_(\w+)/(?:while|cond)$")


def parts_of(module: Module) -> dict[str, Instruction]:
    """The loop or conditional of every part of a tick, by its name."""
    return {
        found[1]: instruction
        for computation in module.computations.values()
        for instruction in computation.instructions
        if instruction.opcode in ("while", "conditional")
        and (found := NAME.search(instruction.op_name))
    }


def means(module: Module, pipeline: Pipeline) -> dict[str, float]:
    """How often a part runs in a tick of a rank, on average, by the name of its instruction."""
    counts = turns(pipeline.table, pipeline.sizes)
    return {
        instruction.name: float(counts[name].mean())
        for name, instruction in parts_of(module).items()
    }


def bodies(module: Module) -> dict[str, str]:
    """The computations that run a layer, by what they do with it."""
    titles = {"FB": "forward beside backward", "F": "forward", "B": "backward"}
    return {
        titles[name]: part.attribute("body").lstrip("%")
        for name, part in parts_of(module).items()
        if name in titles
    }


class Times(NamedTuple):
    """Seconds of a step."""

    step: float
    busy: float  # mean over the ranks
    parts: dict[str, float]  # of one turn of every part of a tick


def times(walk: Walk, pipeline: Pipeline) -> Times:
    """Of a walk in which parts run as often as `means` says."""
    parts, counts = parts_of(walk.module), turns(pipeline.table, pipeline.sizes)
    if missing := {name for name, n in counts.items() if n.any()} - set(parts):
        raise ValueError(f"the program has no part {', '.join(sorted(missing))} of the pipeline")
    seconds = {name: body_of(walk, part).makespan for name, part in parts.items()}
    tick = next(
        computation.name
        for computation in walk.module.computations.values()
        if next(iter(parts.values())).name in computation.by_name
    )
    at_work = sum(counts[name] * seconds[name] for name in parts)  # [ticks ranks]
    besides = walk.computation(tick).makespan - at_work.mean()
    busy = walk.step().makespan
    outside = busy - len(at_work) * (at_work.mean() + besides)
    return Times(outside + joined((at_work + besides).tolist()), busy, seconds)


def body_of(walk: Walk, part: Instruction):
    """The walk through one turn of a part."""
    names = [part.attribute("body").lstrip("%")] if part.opcode == "while" else part.called
    return max((walk.computation(name) for name in names), key=lambda one: one.makespan)


def figures(walk: Walk, pipeline: Pipeline) -> dict:
    """What the report says of the pipeline."""
    found = times(walk, pipeline)
    counts = turns(pipeline.table, pipeline.sizes)
    return {
        "schedule": pipeline.table.schedule.name,
        "stages": list(pipeline.sizes),
        "micro_batches": pipeline.table.schedule.n_micro,
        "step_seconds": found.step,
        "waiting_share": 1.0 - found.busy / found.step,
        "seconds": found.parts,
        "turns_of_the_busiest_rank": {
            name: int(np.max(n.sum(0))) for name, n in counts.items() if n.any()
        },
    }
