"""Weights of DeepSeek-V3 checkpoints: look at them, and write them under the official names.

    python -m dsv3_jax.weights inspect FOLDER              what a folder holds, checked
    python -m dsv3_jax.weights export  FOLDER NEW_FOLDER   weights under the official names

FOLDER is an official folder (config.json and safetensors; F32, BF16 or FP8) or a workdir of
train.py. Nothing has to be converted: train.py --set init_from=FOLDER, load_pretrained, generate
and evaluation read either kind as it is.
"""

import argparse
import sys
from pathlib import Path

from dsv3_jax.config import WEIGHT_DTYPES
from dsv3_jax.errors import errors_as_messages

REMOVED = {
    "import": "released folders need no import: train.py --set init_from=FOLDER, load_pretrained, "
    "generate, evaluation and export read them as they are",
    "verify": "there is nothing to compare, because released folders are no longer converted; "
    "`inspect` checks every file and tensor of a folder",
}


def parse_arguments() -> argparse.Namespace:
    if len(sys.argv) > 1 and sys.argv[1] in REMOVED:
        sys.exit(f"error: `{sys.argv[1]}` is gone: {REMOVED[sys.argv[1]]}")
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="check a folder and say what it holds")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("export", help="any folder -> official safetensors")
    command.add_argument("folder", type=Path)
    command.add_argument("directory", type=Path)
    command.add_argument("--dtype", choices=WEIGHT_DTYPES, default="bfloat16")
    command.add_argument(
        "--scales", type=Path, help="FP8: keep the scales of this folder where they still fit"
    )
    command.add_argument(
        "--shard-gb", type=float, default=5.0, help="largest file (default: %(default)s)"
    )
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    with errors_as_messages():
        if arguments.command == "inspect":
            from dsv3_jax.weights.summary import print_summary

            print_summary(arguments.folder)
        else:
            from dsv3_jax.weights.save import export_weights

            export_weights(
                arguments.folder,
                arguments.directory,
                arguments.dtype,
                arguments.scales,
                int(arguments.shard_gb * 1e9),
            )
            print(f"wrote {arguments.directory}")


if __name__ == "__main__":
    main()
