"""One run of the tunnel: compile, walk, draw, report."""

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path

import rich.console

from dsv3_jax.aot import tables, timeline
from dsv3_jax.aot.compile import (
    Option,
    Target,
    compile_step,
    compiled_before,
    target_of,
)
from dsv3_jax.aot.memory import dumped
from dsv3_jax.aot.overlap import Event, Walk
from dsv3_jax.aot.report import HLO, STEP, bodies_of, report, walk_of
from dsv3_jax.config import Config
from dsv3_jax.config_cli import override


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to go about it."""

    to_schedule: bool = False
    reuse: bool = False
    as_json: bool = False
    dump: Path | None = None  # keep the compiler's texts here
    plot: Path | None = None
    figures: tuple[str, ...] = ()  # of the chip, "name=value"
    options: tuple[str, ...] = ()  # for XLA, "name=value"


def run(config: Config, mesh: str, topology: str, settings: Settings) -> int:
    """Print the report of a config on a mesh of a topology; 1 if it does not fit, else 0."""
    found = examine(config, mesh, topology, settings)
    if settings.as_json:
        print(json.dumps(found))
    else:
        tables.show(found)
    return 0 if found["fits"] else 1


def examine(config: Config, mesh: str, topology: str, settings: Settings) -> dict:
    """The report, with the paths of what it leaves behind."""
    target = target_of(config, mesh, topology)
    target = dataclasses.replace(target, chip=override(target.chip, *settings.figures))
    options = dict(parse_option(option) for option in settings.options)
    if settings.reuse and settings.dump is None:
        raise ValueError("--reuse reads what an earlier run left in --dump=DIR; give that too")
    with tempfile.TemporaryDirectory(prefix="tunnel-") as temporary:
        folder = settings.dump or Path(temporary)
        if settings.reuse:
            compilation = compiled_before(folder)
        else:
            with working(f"compiling {config.name} for {target.mesh} on {topology}"):
                compilation = compile_step(config, target, folder, options, settings.to_schedule)
        walk = walk_of(config, target, folder, compilation)
        found = report(config, target, folder, compilation, walk)
        hlo = dumped(folder, HLO, near=STEP)
    plot = settings.plot or (settings.dump or Path()) / "tunnel.png"
    timeline.draw(pictures(walk, config, target), plot)
    return found | {"plot": str(plot), "hlo": str(hlo) if settings.dump else None}


def parse_option(text: str) -> tuple[str, Option]:
    """An XLA option, e.g. "xla_tpu_enable_async_all_to_all=true"."""
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--option {text!r}: expected XLA_OPTION=VALUE")
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return name, kind(value)
    return name, value


def pictures(walk: Walk, config: Config, target: Target) -> dict[str, list[Event]]:
    """Events of the longest layer, forward and backward, by title; of the step if none loops."""
    walked = {f"a layer {way}": walk.computation(body) for way, body in bodies_of(walk).items()}
    return {
        f"{config.name} on {target.topology}, {target.mesh}: {what}, "
        f"{tables.clock(schedule.makespan)}": schedule.events
        for what, schedule in (walked or {"a step": walk.step()}).items()
    }


def working(what: str):
    """A line on a terminal's standard error that moves while the block runs."""
    console = rich.console.Console(stderr=True)
    return console.status(what) if console.is_terminal else contextlib.nullcontext()
