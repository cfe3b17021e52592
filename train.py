"""Train DeepSeek-V3 in JAX.

    python train.py --mesh=dp4,ep8                      the tiny preset on 32 virtual CPU devices
    python train.py --config=dsv3_16b --mesh=dp*,ep16   a preset on the accelerators that are there
    python train.py --set data.source=~/books/*.txt     your text: a file, folder, glob or .jsonl
    python train.py --set optimizer.peak_lr=1e-3        any field of the config
    python train.py --set init_from=~/DeepSeek-V3       begin with the weights in that folder
    python train.py --compile-only=v5p:4x4x4 ...        what it would be on devices not here

The same command again goes on from the newest checkpoint in --workdir. Ctrl-C saves first.
"""

import argparse
import sys
from pathlib import Path

import jax

from configs import load_preset, preset_names
from dsv3_jax.config import Config
from dsv3_jax.overrides import override
from dsv3_jax.training.host import with_huge_pages
from sharding.mesh import GRAMMAR, start_devices


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default="tiny", help=f"preset in configs/: {', '.join(preset_names())}"
    )
    parser.add_argument(
        "--mesh",
        default="dp*",
        help=f"{GRAMMAR}; dp* takes what devices are left, ep2x4 is 2 nodes of 4 (default: dp*)",
    )
    parser.add_argument(
        "--workdir", type=Path, help="where everything of the run is kept (default: runs/CONFIG)"
    )
    parser.add_argument("--steps", help="train to this step (short for --set train.steps=N)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override a field of the config, e.g. checkpoint.every=50; may be repeated",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the other hosts first (jax.distributed.initialize from the environment)",
    )
    parser.add_argument(
        "--compile-only",
        metavar="TOPOLOGY",
        help="train nothing; compile for a topology and report (python -m dsv3_jax.tunnel --help)",
    )
    return parser.parse_args()


def make_config(arguments: argparse.Namespace) -> Config:
    config = load_preset(arguments.config)
    steps = [f"train.steps={arguments.steps}"] if arguments.steps else []
    for assignment in arguments.set + steps:
        config = override(config, assignment)
    return config


def main():
    arguments = parse_arguments()
    try:
        config = make_config(arguments)
        if arguments.compile_only:
            from dsv3_jax.tunnel.run import Settings, run

            sys.exit(run(config, arguments.mesh, arguments.compile_only, Settings()))
        if arguments.distributed:
            jax.distributed.initialize()
        mesh = start_devices(arguments.mesh)
        from dsv3_jax.training.loop import train

        train(config, mesh, arguments.workdir or Path("runs") / config.name)
    except (ValueError, KeyError, NotImplementedError, OSError, FloatingPointError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        sys.exit(f"error: {message}")


if __name__ == "__main__":
    with_huge_pages()
    main()
