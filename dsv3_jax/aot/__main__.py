"""Compile the train step ahead of time, for devices that are not here, and report on it.

    python -m dsv3_jax.aot --config=dsv3_671b --mesh=dp16,ep64 --topology=v5p:8x8x16 \\
        --set train.batch=1024                       1,024 chips: minutes, and 3 GB of memory here
    python -m dsv3_jax.aot ... --stop-at=schedule    the same figures in a fifth of the time
    python -m dsv3_jax.aot ... --json > report.json  for programs, and for dsv3_jax.plan --aot
    python -m dsv3_jax.aot ... --dump=DIR            keep the scheduled HLO and the other texts
    python -m dsv3_jax.aot ... --dump=DIR --reuse --figure=ici_bandwidth=9e10
                                                     other figures, without compiling again

The command lowers the same step that train.py runs, compiles it in a child process, and reports
whether it fits in memory and which buffers fill it; the collectives and how much of their time
compute hides; and the predicted seconds and MFU of a step, from a roofline simulation of the
compiled schedule. Nothing runs on a device and none is needed. The exit status is 1 if the program
does not fit. A PNG shows one layer: its compute and its communication over time.

Topologies: v5p:XxYxZ and tpu7x:XxYxZ in chips (2 devices per chip of tpu7x), v6e:XxY, and
h100:HOSTSxGPUS. Compilers: pip install -c constraints.txt -e '.[tpu]' or '.[cuda]'.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from configs import load_preset, preset_names
from dsv3_jax.cli import add_figure_option, add_set_option
from dsv3_jax.config import Config
from dsv3_jax.config_cli import override
from dsv3_jax.errors import errors_as_messages


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="tiny", help=f"preset in configs/: {', '.join(preset_names())}")
    add("--mesh", default="dp*", help="e.g. dp16,ep64; dp* takes the devices left (default: dp*)")
    add("--topology", required=True, help="v5p:8x8x16, v6e:16x16, tpu7x:8x8x8, h100:32x8, ...")
    add("--stop-at", choices=["schedule"], help="make no machine code; all figures but XLA's peak")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--dump", type=Path, metavar="DIR", help="keep the compiler's texts and the PNG there")
    add("--reuse", action="store_true", help="don't compile: read what a run left in --dump")
    add("--plot", type=Path, help="the PNG (default: aot.png, in --dump if given)")
    add_figure_option(parser)
    add(
        "--option",
        action="append",
        default=[],
        metavar="XLA_OPTION=VALUE",
        help="a compiler option besides those of the chip; may be repeated",
    )
    add_set_option(parser)
    return parser.parse_args()


def parse_option(text: str) -> tuple[str, bool | int | float | str]:
    """Parse an XLA option, e.g. "xla_tpu_enable_async_all_to_all=true"."""
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--option {text!r}: expected XLA_OPTION=VALUE")
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return name, kind(value)
    return name, value


def report_on(config: Config, arguments: argparse.Namespace) -> int:
    """Print the report; return the exit status, 1 if the program does not fit in memory."""
    from dsv3_jax.aot import tables  # these import JAX and Matplotlib, which --help need not
    from dsv3_jax.aot.report import Settings, analyze

    settings = Settings(
        to_schedule=arguments.stop_at == "schedule",
        reuse=arguments.reuse,
        dump=arguments.dump,
        plot=arguments.plot,
        figures=tuple(arguments.figure),
        options=dict(parse_option(option) for option in arguments.option),
    )
    report = analyze(config, arguments.mesh, arguments.topology, settings)
    if arguments.json:
        print(json.dumps(report))
    else:
        tables.show(report)
    return 0 if report["fits"] else 1


def main():
    arguments = parse_arguments()
    with errors_as_messages():
        config = override(load_preset(arguments.config), *arguments.set)
        status = report_on(config, arguments)
    sys.exit(status)


if __name__ == "__main__":
    main()
