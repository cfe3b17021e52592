"""Train DeepSeek-V3 in JAX.

    python train.py --mesh=dp4,ep8                      the tiny preset on 32 virtual CPU devices
    python train.py --config=dsv3_16b --mesh=dp*,ep16   a preset on the accelerators that are there
    python train.py --set data.source=~/books/*.txt     your text: a file, folder, glob or .jsonl
    python train.py --set optimizer.peak_lr=1e-3        any field of the config
    python train.py --set init_from=~/DeepSeek-V3       begin with the weights in that folder
    python train.py --compile-only=v5p:4x4x4 ...        what it would be on devices not here
    python train.py --supervise                         start again whenever it crashes
    python train.py --processes=2 --mesh=dp2,ep4        two processes with 4 of the devices each

The same command again goes on from the newest checkpoint in --workdir. Ctrl-C and SIGTERM save
first. Exit codes: 0 done, 2 the same command would fail again, 130 and 143 stopped by a signal and
saved, others a crash.
"""

import argparse
import sys
from pathlib import Path

import jax

from configs import load_preset, preset_names
from dsv3_jax.cli import add_set_option
from dsv3_jax.config import Config
from dsv3_jax.config_cli import override
from dsv3_jax.errors import error_text
from dsv3_jax.training.host import with_huge_pages
from sharding.mesh import GRAMMAR, start_devices

HEARTBEAT = 30  # seconds after which a process that is silent counts as dead
REFUSED = (ValueError, KeyError, NotImplementedError, FloatingPointError, FileNotFoundError)


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
    add_set_option(parser)
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the other hosts first (jax.distributed.initialize from the environment)",
    )
    parser.add_argument(
        "--join",
        metavar="ADDRESS,NUMBER,COUNT",
        help="join them by hand: host:port of process 0, this one's number, how many there are",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="share the mesh's virtual CPU devices out over N processes on this machine, to try it",
    )
    parser.add_argument(
        "--supervise",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="start again after crashes, with longer and longer waits while nothing gets done",
    )
    parser.add_argument(
        "--compile-only",
        metavar="TOPOLOGY",
        help="train nothing; compile for a topology and report (python -m dsv3_jax.aot --help)",
    )
    return parser.parse_args()


def make_config(arguments: argparse.Namespace) -> Config:
    steps = [f"train.steps={arguments.steps}"] if arguments.steps else []
    return override(load_preset(arguments.config), *arguments.set, *steps)


def join(arguments: argparse.Namespace) -> int:
    """Join the other processes of the run, if there are any; returns how many share this host."""
    if arguments.join is not None:
        try:
            address, number, count = arguments.join.split(",")
            how = {"num_processes": int(count), "process_id": int(number)}
        except ValueError as error:
            example = "such as 10.0.0.1:8476,0,2"
            raise ValueError(
                f"--join={arguments.join}: write ADDRESS,NUMBER,COUNT, {example}"
            ) from error
        jax.distributed.initialize(address, heartbeat_timeout_seconds=HEARTBEAT, **how)
        return int(count)
    if arguments.distributed:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    return 1


def launch(arguments: argparse.Namespace, workdir: Path) -> int:
    """The same command in processes of its own."""
    from dsv3_jax.training.supervisor import run

    command = [sys.executable, *sys.argv, "--processes=1", "--no-supervise"]
    return run(command, arguments.processes, arguments.supervise, workdir)


def main():
    arguments = parse_arguments()
    try:
        config = make_config(arguments)
        workdir = arguments.workdir or Path("runs") / config.name
        if arguments.compile_only:
            from dsv3_jax.aot import tables
            from dsv3_jax.aot.report import analyze

            report = analyze(config, arguments.mesh, arguments.compile_only)
            tables.show(report)
            sys.exit(not report["fits"])
        if arguments.processes > 1 or arguments.supervise:
            sys.exit(launch(arguments, workdir))
        mesh = start_devices(arguments.mesh, join(arguments))
        from dsv3_jax.training.run import train

        train(config, mesh, workdir)
    except REFUSED as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    with_huge_pages()
    main()
