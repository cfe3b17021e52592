"""Writing weights to a folder under the official names, as deepseek-ai and transformers read them.

Weights are converted one layer at a time, so a host holds one layer whatever the model's size.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import WEIGHT_DTYPES
from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.quantize import BLOCK, QuantizedTensor, requantize
from dsv3_jax.progress import Advance, byte_bar
from dsv3_jax.shapes import Array, Float, Float32
from dsv3_jax.weights.abstract_params import (
    AbstractParams,
    abstract_params,
    abstract_slice,
    layer_slices,
)
from dsv3_jax.weights.hf_config import official_config
from dsv3_jax.weights.hf_names import BIAS, SCALE, copies_in_mtp, fp8_names, to_official
from dsv3_jax.weights.safetensors import SHARD_BYTES, SafetensorsReader, SafetensorsWriter
from dsv3_jax.weights.sources import InMemory, Official, Source, open_weights
from sharding.layout import Layout
from sharding.mesh import MeshSpec, make_mesh

# Small files of tokenizer and generation; they are copied along with the weights.
AUX_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def save_pretrained(
    model: DeepSeekV3,
    directory: str | Path,
    dtype: str = "bfloat16",
    scales: SafetensorsReader | None = None,
):
    """Write a model that one process holds whole: safetensors, their index, config.json.

    Args:
        directory: a new folder; it appears when all is written.
        dtype: "float32", "bfloat16" or "fp8" (128 x 128 blocks; embedding, head, norms, router and
            MTP's projection of two inputs to one stay bfloat16). The balance bias is float32 in
            all of them.
        scales: the checkpoint that FP8 weights came from: its scales are kept wherever the
            weights are still exactly what was read, so that values and scales come out the same.
    """
    write_official(InMemory(model), directory, dtype, scales)


def export_weights(
    source: str | Path,
    directory: str | Path,
    dtype: str = "bfloat16",
    scales: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
):
    """Write the weights in any folder under the official names; see `save_pretrained`.

    Args:
        scales: the official FP8 folder whose scales are kept; that of `source` if it is one.
    """
    weights = open_weights(source)
    if isinstance(weights, Official):
        scales = scales or weights.directory
    known = None if scales is None else SafetensorsReader(scales)
    n_bytes = weights.n_bytes(_params_on_host(weights))
    with byte_bar(f"exporting {source}", n_bytes) as advance:
        write_official(weights, directory, dtype, known, shard_bytes, advance)


def write_official(
    source: Source,
    directory: str | Path,
    dtype: str,
    scales: SafetensorsReader | None = None,
    shard_bytes: int = SHARD_BYTES,
    advance: Advance = lambda n: None,
):
    """Write the weights of `source` into a new folder; arguments as in `save_pretrained`.

    Raises:
        FileExistsError: the folder is there and not empty.
        ValueError: no such format, or the model's config has no official form.
    """
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(WEIGHT_DTYPES)}")
    config = official_config(source.config, "bfloat16" if dtype == "fp8" else dtype, dtype == "fp8")
    with SafetensorsWriter(directory, shard_bytes) as writer:
        for name, value in _tensors(source, dtype, scales, advance):
            writer.add(name, value)
        writer.add_file("config.json", json.dumps(config, indent=2) + "\n")
        if source.directory is not None:
            for path in aux_files(source.directory):
                writer.add_file(path.name, path.read_text(encoding="utf-8"))


def aux_files(directory: Path) -> list[Path]:
    """Return the `AUX_FILES` that a folder holds."""
    return [path for name in AUX_FILES if (path := directory / name).is_file()]


def _params_on_host(source: Source) -> AbstractParams:
    """Return all parameters of a source, in its own type, on one CPU device."""
    host = make_mesh(MeshSpec(), jax.local_devices(backend="cpu")[:1])
    return abstract_params(source.config, Policy(master=jnp.dtype(source.dtype)), host, Layout())


def _tensors(
    source: Source, dtype: str, scales: SafetensorsReader | None, advance: Advance
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every official tensor in its format, and the scales of those in FP8."""
    config, host = source.config, jax.local_devices(backend="cpu")[0]
    abstract, fp8 = _params_on_host(source), fp8_names(config)
    for part in layer_slices(config):
        params = source.load(abstract_slice(abstract, part), part.layer, advance)
        official = to_official(params, config, part.layer)
        for copy, name in copies_in_mtp(config).items():
            if name in official:
                official[copy] = official[name]
        for name, view in official.items():
            value = jax.device_put(view, host)  # contiguous
            if dtype == "fp8" and name in fp8:
                has_scale = scales is not None and name + SCALE in scales
                known = scales.read(name + SCALE) if has_scale else None
                quantized = _requantize(value, known)
                yield name, np.asarray(quantized.values)
                yield name + SCALE, np.asarray(quantized.scale)
            else:
                in_fp32 = dtype == "float32" or name.endswith(BIAS)
                yield name, np.asarray(value.astype(jnp.float32 if in_fp32 else jnp.bfloat16))


@jax.jit
def _requantize(value: Float[Array, "D F"], known: Float32[Array, "_ _"] | None) -> QuantizedTensor:
    return requantize(value, BLOCK, known)
