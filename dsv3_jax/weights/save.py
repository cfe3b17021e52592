"""Weights to a folder under the official names, as deepseek-ai and transformers read them."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.quantize import BLOCK, QuantizedTensor, requantize
from dsv3_jax.progress import Advance
from dsv3_jax.shapes import Array, Float, Float32
from dsv3_jax.weights.hf_config import official_config
from dsv3_jax.weights.hf_names import BIAS, SCALE, copies_in_mtp, fp8_names, to_official
from dsv3_jax.weights.safetensors import Folder
from dsv3_jax.weights.sources import (
    InMemory,
    Source,
    Wanted,
    parts,
    wanted_arrays,
    wanted_part,
)
from dsv3_jax.weights.writer import Writer
from sharding.layout import Layout
from sharding.mesh import MeshSpec, make_mesh

FORMATS = ("float32", "bfloat16", "fp8")
SHARD_BYTES = 5 * 10**9
# Small files that say how prompts are made; they go along with the weights.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def save_pretrained(
    model: DeepSeekV3, directory: str | Path, dtype: str = "bfloat16", scales: Folder | None = None
):
    """Write a model that one process holds whole: safetensors, their index, config.json.

    Args:
        directory: a new folder; it appears when all is written.
        dtype: "float32", "bfloat16" or "fp8" (128 x 128 blocks; embedding, head, norms, router and
            the joint of MTP stay bfloat16). The balance bias is float32 in all of them.
        scales: the checkpoint that FP8 weights came from: its scales are kept wherever the
            weights are still exactly what was read, so that codes and scales come out the same.
    """
    write_official(InMemory(model), directory, dtype, scales)


def write_official(
    source: Source,
    directory: str | Path,
    dtype: str,
    scales: Folder | None = None,
    shard_bytes: int = SHARD_BYTES,
    advance: Advance = lambda n: None,
):
    """The weights of `source`, part by part, in a new folder; arguments as in `save_pretrained`.

    Raises:
        FileExistsError: the folder is there and not empty.
        ValueError: no such format, or the model's config has no official form.
    """
    if dtype not in FORMATS:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(FORMATS)}")
    config = official_config(source.config, "bfloat16" if dtype == "fp8" else dtype, dtype == "fp8")
    with Writer(directory, shard_bytes) as writer:
        for name, value in _tensors(source, dtype, scales, advance):
            writer.add(name, value)
        writer.add_file("config.json", json.dumps(config, indent=2) + "\n")
        if source.directory is not None:
            for path in companions(source.directory):
                writer.add_file(path.name, path.read_text(encoding="utf-8"))


def companions(directory: Path) -> list[Path]:
    """The small files in a folder that belong to the weights."""
    return [path for name in COMPANIONS if (path := directory / name).is_file()]


def wanted_on_the_host(source: Source) -> Wanted:
    """All arrays of a source in its own type on one CPU device, for what is done part by part."""
    host = make_mesh(MeshSpec(), jax.local_devices(backend="cpu")[:1])
    return wanted_arrays(source.config, Policy(master=jnp.dtype(source.dtype)), host, Layout())


def _tensors(
    source: Source, dtype: str, scales: Folder | None, advance: Advance
) -> Iterator[tuple[str, np.ndarray]]:
    """Every official tensor in its format, and the scales of those in FP8."""
    config, host = source.config, jax.local_devices(backend="cpu")[0]
    wanted, fp8 = wanted_on_the_host(source), fp8_names(config)
    for part in parts(config):
        arrays = source.load(wanted_part(wanted, part), part.layer, advance)
        official = to_official(arrays, config, part.layer)
        for copy, name in copies_in_mtp(config).items():
            if name in official:
                official[copy] = official[name]
        for name, view in official.items():
            value = jax.device_put(view, host)  # contiguous
            if dtype == "fp8" and name in fp8:
                has = scales is not None and name + SCALE in scales
                known = scales.read(name + SCALE) if has else None
                scaled = _requantized(value, known)
                yield name, np.asarray(scaled.values)
                yield name + SCALE, np.asarray(scaled.scale)
            else:
                stays = dtype == "float32" or name.endswith(BIAS)
                yield name, np.asarray(value.astype(jnp.float32 if stays else jnp.bfloat16))


@jax.jit
def _requantized(
    value: Float[Array, "D F"], known: Float32[Array, "_ _"] | None
) -> QuantizedTensor:
    return requantize(value, BLOCK, known)
