"""The table of what a folder with weights holds."""

import collections
from pathlib import Path

import rich.console
import rich.table

from dsv3_jax.model.deepseek import count_parameters
from dsv3_jax.weights.sources import Official, open_weights


def print_summary(folder: Path):
    """Open a folder, which checks every file and tensor of it, and print what it holds."""
    source = open_weights(folder)
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
        tensors = source.tensors.values()
        n_bytes = collections.Counter()
        for tensor in tensors:
            n_bytes[tensor.dtype] += tensor.n_bytes
        table.add_row("files", f"{len({tensor.file for tensor in tensors}):,}")
        table.add_row("tensors", f"{len(source.tensors):,}")
        for dtype, size in n_bytes.most_common():
            table.add_row(dtype, f"{size:,} bytes")
    rich.console.Console().print(table)
