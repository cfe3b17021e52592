"""Plan a training run on paper: its counts, the meshes that work, their speed, the bill.

    python -m dsv3_jax.plan --config=dsv3_671b                          1,024 chips of v5p
    python -m dsv3_jax.plan --config=dsv3_671b --topology=tpu7x:8x8x8   a slice as libtpu names it
    python -m dsv3_jax.plan --config=dsv3_671b --chip=h800 --devices=2048 --set train.batch=2048
    python -m dsv3_jax.plan --config=dsv3_671b --figure=ici_bandwidth=9e10 --dollars-per-hour=4.2
    python -m dsv3_jax.plan --config=dsv3_671b --step-seconds=31.5      bill the step you measured
    python -m dsv3_jax.plan --config=dsv3_671b --aot=report.json        bill the compiled step

The command ranks every dp x ep mesh of the devices by its predicted step time, lists the memory of
a device by part, and says of each mesh that does not work why. Nothing is run. Parameters and the
memory of weights are exact; other memory and all times are estimates (dsv3_jax/plan/memory.py,
speed.py, dsv3_jax/interconnect.py). All sequences of a device run at once, so --set train.batch=N
decides what fits. `python -m dsv3_jax.aot` compiles the real program and knows better; its --json
makes the report.json for --aot.
"""

import argparse
import json
from pathlib import Path

from configs import preset_names
from dsv3_jax.cli import add_figure_option, add_set_option
from dsv3_jax.errors import errors_as_messages
from dsv3_jax.hardware import CHIPS


class _Renamed(argparse.Action):
    """A flag that only answers with its new name."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} is now {self.metavar}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="tiny", help=f"preset in configs/: {', '.join(preset_names())}")
    add("--chip", help=f"{', '.join(CHIPS)} (default: v5p)")
    add("--devices", type=int, help="JAX devices (default: a power of 2 that divides the batch)")
    add("--topology", help="in place of both: v5p:8x8x16, v6e:16x16, h100:32x8 (hosts x GPUs)")
    add_figure_option(parser)
    add("--dollars-per-hour", help="price of a chip (known: the report's $2 for h800)")
    add("--tokens", type=float, help="tokens to pay for (default: all of the preset's run)")
    add("--step-seconds", type=float, help="also bill a step that you measured")
    add("--aot", type=Path, metavar="REPORT", help="also bill the step in a report of dsv3_jax.aot")
    add("--tunnel", action=_Renamed, metavar="--aot", help=argparse.SUPPRESS)
    add_set_option(parser)
    add("--json", action="store_true", help="print everything as one JSON object")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    with errors_as_messages():
        from dsv3_jax.plan import tables  # these import JAX, which --help need not
        from dsv3_jax.plan.report import make_plan

        plan = make_plan(arguments)
    if arguments.json:
        print(json.dumps(plan))
    else:
        tables.show(plan)


if __name__ == "__main__":
    main()
