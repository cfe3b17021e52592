"""Train DeepSeek-V3 in JAX.

    python train.py --mesh=dp4,ep8                      the tiny preset on 32 virtual CPU devices
    python train.py --config=dsv3_16b --mesh=dp*,ep16   a preset on the accelerators that are there
    python train.py --set data.source=~/books/*.txt     your text: a file, folder, glob or .jsonl
    python train.py --set optimizer.peak_lr=1e-3        any field of the config
    python train.py --set init_from=~/DeepSeek-V3       begin with the weights in that folder
    python train.py --compile-only=v5p:4x4x4 ...        compile for devices that are not here
    python train.py --supervise                         start again whenever it crashes
    python train.py --processes=2 --mesh=dp2,ep4        two processes with 4 of the devices each

The same command again resumes from the newest checkpoint in --workdir. Ctrl-C and SIGTERM save
first. Exit codes: 0 done, 2 the same command would fail again, 130 and 143 stopped by a signal and
saved, others a crash.
"""

import argparse
import sys
from pathlib import Path

from configs import load_preset, preset_names
from dsv3_jax.cli import add_set_option
from dsv3_jax.config import Config
from dsv3_jax.config_cli import override
from dsv3_jax.errors import error_text
from dsv3_jax.training.supervisor import supervise, use_huge_pages
from sharding import GRAMMAR

HEARTBEAT = 30  # seconds after which a silent process counts as dead
PERMANENT = (ValueError, KeyError, NotImplementedError, FloatingPointError, FileNotFoundError)


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
        help="divide the mesh's virtual CPU devices over N processes on this machine, to try it",
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


def join_processes(arguments: argparse.Namespace) -> int:
    """Join the other processes of the run, if there are any; return how many share this host."""
    import jax  # not for --help, which it would slow down

    if arguments.join is not None:
        try:
            address, number, count = arguments.join.split(",")
            number, count = int(number), int(count)
        except ValueError as error:
            raise ValueError(
                f"--join={arguments.join}: write ADDRESS,NUMBER,COUNT, such as 10.0.0.1:8476,0,2"
            ) from error
        jax.distributed.initialize(
            address,
            num_processes=count,
            process_id=number,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
        return count
    if arguments.distributed:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    return 1


def train_here(config: Config, arguments: argparse.Namespace, workdir: Path):
    """Train in this process."""
    from sharding.mesh import start_devices

    mesh = start_devices(arguments.mesh, join_processes(arguments))
    from dsv3_jax.training.run import train  # once the mesh is known to fit

    train(config, mesh, workdir)


def compile_only(config: Config, arguments: argparse.Namespace) -> int:
    """Print the report of an AOT compilation; return 1 if the program does not fit in memory."""
    from dsv3_jax.aot import tables
    from dsv3_jax.aot.report import analyze

    report = analyze(config, arguments.mesh, arguments.compile_only)
    tables.show(report)
    return 0 if report["fits"] else 1


def main():
    arguments = parse_arguments()
    try:
        config = make_config(arguments)
        workdir = arguments.workdir or Path("runs") / config.name
        if arguments.compile_only:
            sys.exit(compile_only(config, arguments))
        elif arguments.processes > 1 or arguments.supervise:
            command = [sys.executable, *sys.argv, "--processes=1", "--no-supervise"]
            sys.exit(supervise(command, arguments.processes, arguments.supervise, workdir))
        else:
            train_here(config, arguments, workdir)
    except PERMANENT as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    use_huge_pages()  # restarts this process, so before JAX is imported
    main()
