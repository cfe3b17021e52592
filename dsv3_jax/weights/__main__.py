"""Weights of DeepSeek-V3 checkpoints, in and out.

    python -m dsv3_jax.weights inspect DIR                 what a folder holds, checked
    python -m dsv3_jax.weights import  DIR CHECKPOINT      read it once for train.py and generate
    python -m dsv3_jax.weights verify  CHECKPOINT DIR      compare the two, tensor by tensor
    python -m dsv3_jax.weights export  FOLDER NEW_DIR      back to the official names

FOLDER is an import, a workdir of train.py, or an official folder. Start training from any of them
with `python train.py --set init_from=FOLDER`.
"""

import argparse
import collections
import sys
from pathlib import Path

import jax
import rich.console
import rich.table

from dsv3_jax.errors import errors_as_messages
from dsv3_jax.model.deepseek import count_parameters
from dsv3_jax.weights.convert import export_weights, import_weights, verify
from dsv3_jax.weights.pretrained import start_mesh
from dsv3_jax.weights.save import FORMATS, SHARD_BYTES
from dsv3_jax.weights.sources import Official, Source, open_weights
from sharding.mesh import GRAMMAR


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="check a folder and say what it holds")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("import", help="official folder -> checkpoint; goes on if killed")
    command.add_argument("source", type=Path)
    command.add_argument("checkpoint", type=Path)
    command.add_argument("--dtype", choices=FORMATS[:2], default="bfloat16")
    command.add_argument("--mesh", help=f"{GRAMMAR} (default: one device; dp* if --distributed)")
    command.add_argument("--distributed", action="store_true", help="join the other hosts first")
    command = commands.add_parser("verify", help="compare a checkpoint with its source")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("source", type=Path)
    command = commands.add_parser("export", help="any folder -> official safetensors")
    command.add_argument("folder", type=Path)
    command.add_argument("directory", type=Path)
    command.add_argument("--dtype", choices=FORMATS, default="bfloat16")
    command.add_argument(
        "--scales", type=Path, help="FP8: keep the scales of this folder where they still fit"
    )
    command.add_argument(
        "--shard-gb",
        type=float,
        default=SHARD_BYTES / 1e9,
        help="largest file (default: %(default)s)",
    )
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    with errors_as_messages():
        match arguments.command:
            case "inspect":
                print_summary(open_weights(arguments.folder))
            case "import":
                if arguments.distributed:
                    jax.distributed.initialize()
                mesh = start_mesh(arguments.mesh or ("dp*" if arguments.distributed else None))
                import_weights(arguments.source, arguments.checkpoint, arguments.dtype, mesh)
                print(f"{arguments.checkpoint} is ready: --set init_from={arguments.checkpoint}")
            case "verify":
                found = verify(arguments.checkpoint, arguments.source)
                if found.different:
                    some = "\n  ".join(found.different[:20])
                    sys.exit(
                        f"{len(found.different)} of {found.n_tensors} tensors differ:\n  {some}"
                    )
                print(f"all {found.n_tensors:,} tensors are equal, bit for bit")
            case "export":
                shard_bytes = int(arguments.shard_gb * 1e9)
                where = (arguments.folder, arguments.directory)
                export_weights(*where, arguments.dtype, arguments.scales, shard_bytes)
                print(f"wrote {arguments.directory}")


def print_summary(source: Source):
    """A table of the model, and of the files if they are official ones."""
    model, counts = source.config, count_parameters(source.config)
    table = rich.table.Table(title=str(source.directory), show_header=False)
    table.add_row("kind", type(source).__name__.lower())
    table.add_row("parameters", f"{counts['main']:,} + {counts['mtp']:,} MTP")
    table.add_row(
        "layers", f"{model.n_layers}, {model.n_dense} of them dense; {model.mtp_depth} MTP"
    )
    table.add_row("width, vocabulary", f"{model.width:,}, {model.vocab_size:,}")
    a = model.attention
    sizes = f"{a.n_heads} heads of {a.nope_dim} + {a.rope_dim}, values {a.value_dim}"
    table.add_row("attention", f"{sizes}; ranks {a.q_rank} and {a.kv_rank}")
    table.add_row("context extension", str(a.yarn) if a.yarn else "none")
    if m := model.moe:
        groups = f"{m.topk_groups} of {m.n_groups} groups"
        table.add_row(
            "experts",
            f"{m.n_experts} of width {m.hidden}, top {m.top_k} in {groups}; {m.n_shared} shared",
        )
    if isinstance(source, Official):
        tensors = source.folder.values()
        n_bytes = collections.Counter()
        for tensor in tensors:
            n_bytes[tensor.dtype] += tensor.n_bytes
        table.add_row("files", f"{len({tensor.file for tensor in tensors}):,}")
        table.add_row("tensors", f"{len(source.folder):,}")
        for dtype, size in n_bytes.most_common():
            table.add_row(dtype, f"{size:,} bytes")
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
