"""Compile the real train step for devices that are not here, and read off what a run would be.

    python -m dsv3_jax.aot --config=dsv3_671b --mesh=dp16,ep64 --topology=v5p:8x8x16 \\
        --set train.batch=1024                       1,024 chips: minutes, and 3 GB of memory here
    python -m dsv3_jax.aot ... --stop-at=schedule        the same figures in a fifth of the time
    python -m dsv3_jax.aot ... --json > report.json      for programs, and for dsv3_jax.plan
    python -m dsv3_jax.aot ... --dump=DIR                keep the scheduled HLO and the rest
    python -m dsv3_jax.aot ... --dump=DIR --reuse --figure=ici_bandwidth=9e10
                                                     other figures, without compiling again

It lowers the step that train.py runs, compiles it in another process, and says whether it fits and
where memory goes, what is communicated and what of that is hidden, how long a step takes by a
roofline walk through the schedule, and what that is in MFU. Nothing runs on a device, none is
needed. The exit status is 1 if the program doesn't fit. A PNG shows a layer: its compute, its link.

Topologies: v5p:XxYxZ and tpu7x:XxYxZ in chips (2 devices a chip of tpu7x), v6e:XxY, and
h100:HOSTSxGPUS. Compilers: pip install -c constraints.txt -e '.[tpu]' or '.[cuda]'.
"""

import argparse
import sys
from pathlib import Path

from configs import load_preset, preset_names
from dsv3_jax.aot.run import Settings, run
from dsv3_jax.cli import add_settings, errors_told
from dsv3_jax.config_cli import override
from sharding.mesh import GRAMMAR


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="tiny", help=f"preset in configs/: {', '.join(preset_names())}")
    add("--mesh", default="dp*", help=f"{GRAMMAR} (default: dp*)")
    add("--topology", required=True, help="v5p:8x8x16, v6e:16x16, tpu7x:8x8x8, h100:32x8, ...")
    add("--stop-at", choices=["schedule"], help="make no machine code; all figures but XLA's peak")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--dump", type=Path, metavar="DIR", help="keep the compiler's texts and the PNG there")
    add("--reuse", action="store_true", help="don't compile: read what a run left in --dump")
    add("--plot", type=Path, help="the PNG (default: tunnel.png, in --dump if given)")
    repeated = {"action": "append", "default": []}
    add(
        "--figure",
        **repeated,
        metavar="NAME=VALUE",
        help="override a figure of the chip: a field of Chip in dsv3_jax/hardware.py",
    )
    add(
        "--option",
        **repeated,
        metavar="XLA_OPTION=VALUE",
        help="for the compiler, besides those of the chip; may be repeated",
    )
    add_settings(parser)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    with errors_told():
        config = override(load_preset(arguments.config), *arguments.set)
        settings = Settings(
            to_schedule=arguments.stop_at == "schedule",
            reuse=arguments.reuse,
            as_json=arguments.json,
            dump=arguments.dump,
            plot=arguments.plot,
            figures=tuple(arguments.figure),
            options=tuple(arguments.option),
        )
        status = run(config, arguments.mesh, arguments.topology, settings)
    sys.exit(status)


if __name__ == "__main__":
    main()
