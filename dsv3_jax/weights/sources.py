"""Folders that hold a model's weights, and one way to load them onto a mesh.

Official   config.json and safetensors under the official names (deepseek-ai's, transformers')
Workdir    a run of train.py
InMemory   a model that is there already
"""

import dataclasses
import difflib
import json
import warnings
from pathlib import Path
from typing import Protocol

import jax
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.checkpoint import CheckpointReader
from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.config_cli import from_dict, with_new_names
from dsv3_jax.model.deepseek import DeepSeekV3, abstract_model
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.quantize import BLOCK
from dsv3_jax.params import named_arrays, scale_spec
from dsv3_jax.progress import Advance
from dsv3_jax.weights.abstract_params import AbstractParams, Params, stack_of
from dsv3_jax.weights.hf_config import max_length_of, read_config, read_max_length
from dsv3_jax.weights.hf_names import BIAS, SCALE, copies_in_mtp, official_shapes, param_shapes
from dsv3_jax.weights.load import bytes_to_read, load_arrays, load_scales
from dsv3_jax.weights.safetensors import SafetensorsReader
from sharding.layout import Layout
from sharding.mesh import named_sharding


class Source(Protocol):
    """A model's weights somewhere."""

    directory: Path | None
    config: ModelConfig
    max_length: int  # most tokens of a text that the model was trained for
    dtype: str  # the narrowest of float32 and bfloat16 that loses nothing of the matrices

    def load(
        self, abstract: AbstractParams, first_layer: int = 0, advance: Advance = ...
    ) -> Params:
        """Return the arrays asked for; of stacks as many layers as asked for, from `first_layer`.

        `advance` is called with the number of bytes that were loaded.
        """

    def n_bytes(self, abstract: AbstractParams, first_layer: int = 0) -> int:
        """Return how many bytes `load` will report to `advance`."""


def open_weights(directory: str | Path) -> Source:
    """Open the weights in a folder of any of the kinds above.

    "FOLDER@ema" is the EMA of the weights of a run that keeps one (`ema.decay`).

    Raises:
        FileNotFoundError: nothing of the kind is there.
        ValueError: what is there is damaged or does not fit together; says which file and tensor.
    """
    name, _, kind = str(directory).rpartition("@")
    ema = bool(name) and kind == "ema"
    directory = Path(name if ema else directory).expanduser()
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a folder with weights holds config.json and safetensors, or "
            "is a workdir of train.py"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a JSON object, not {str(values)[:100]}")
    if ema and "train" not in values:
        raise ValueError(f"{directory}@ema: only workdirs of train.py hold EMA weights")
    if "imported_from" in values:
        raise ValueError(
            f"{directory} was made by `python -m dsv3_jax.weights import` of an earlier version, "
            "and imports are no longer read. Use the folder that it was made from, "
            f"{values['imported_from']}: everything that takes weights reads it as it is"
        )
    if "train" in values:
        return Workdir(directory, with_new_names(values), ema)
    return Official(directory)


class Official:
    """A checkpoint folder under the official names."""

    def __init__(self, directory: Path):
        self.directory, self.tensors = directory, SafetensorsReader(directory)
        self.config = _without_absent_mtp(read_config(directory), self.tensors)
        check_tensors(self.tensors, self.config)
        self.max_length = read_max_length(directory)
        dtypes = {x.dtype for name, x in self.tensors.items() if not name.endswith((SCALE, BIAS))}
        self.dtype = "bfloat16" if dtypes == {"BF16"} else "float32"

    def load(
        self, abstract: AbstractParams, first_layer: int = 0, advance: Advance = lambda n: None
    ) -> Params:
        check_abstract(abstract, self.config, self.directory)
        return load_arrays(self.tensors, abstract, self.config, first_layer, advance)

    def scales(self, mesh: Mesh, layout: Layout) -> Params:
        """Return the scales of all matmul weights.

        Raises:
            ValueError: the folder holds one of the weights in another format than FP8.
        """
        state = nnx.state(abstract_model(self.config, Policy()), nnx.Param)
        shardings = {
            ".".join(path): named_sharding(mesh, scale_spec(variable, layout))
            for path, variable in nnx.to_flat_state(state)
            if variable.fp8
        }
        return load_scales(self.tensors, shardings, self.config)

    def n_bytes(self, abstract: AbstractParams, first_layer: int = 0) -> int:
        check_abstract(abstract, self.config, self.directory)
        return bytes_to_read(self.tensors, abstract, self.config, first_layer)


class _ArraysOfOurs:
    """The base of sources in our own format, whose size is that of the arrays."""

    def n_bytes(self, abstract: AbstractParams, first_layer: int = 0) -> int:
        return sum(like.size * like.dtype.itemsize for like in abstract.values())


class Workdir(_ArraysOfOurs):
    """The newest checkpoint of a run: its weights, or their EMA."""

    dtype = "float32"

    def __init__(self, directory: Path, values: dict, ema: bool = False):
        self.directory = directory
        run = from_dict(Config, values)
        self.config, self.max_length = run.model, run.train.seq_len
        self.checkpoints = CheckpointReader(directory / "checkpoints")
        if not self.checkpoints.steps():
            raise FileNotFoundError(f"{directory}: the run has no checkpoint yet")
        self._sections = ("ema" if ema else "params", "bias")  # of the saved training state
        if ema and not any(name.startswith("ema.") for name in self.checkpoints.signatures()):
            raise ValueError(f"{directory}@ema: the run kept no EMA weights; it needs ema.decay")
        self._whole: Params = {}  # stacks, kept because they may be asked for layer by layer

    def load(
        self, abstract: AbstractParams, first_layer: int = 0, advance: Advance = lambda n: None
    ) -> Params:
        check_abstract(abstract, self.config, self.directory)
        missing = {path: like for path, like in abstract.items() if path not in self._whole}
        if missing:
            saved = self._saved(missing)
            arrays = self.checkpoints.restore_arrays(saved)
            self._whole |= {path: arrays[name] for path, name in zip(missing, saved, strict=True)}
        params = {}
        for path, like in abstract.items():
            array = self._whole[path]
            if stack_of(path) and array.shape != like.shape:
                array = array[first_layer : first_layer + like.shape[0]]
            params[path] = array.astype(like.dtype)
            advance(params[path].nbytes)
        return params

    def _saved(self, abstract: AbstractParams) -> AbstractParams:
        """Return these parameters under their names in the checkpoint, with all their layers."""
        there, shapes = self.checkpoints.signatures(), param_shapes(self.config)
        saved = {}
        for path, like in abstract.items():
            names = (f"{section}.{path}.value" for section in self._sections)
            name = next(name for name in names if name in there)
            saved[name] = like.update(shape=shapes[path])
        return saved


class InMemory(_ArraysOfOurs):
    """A model's own arrays."""

    def __init__(self, model: DeepSeekV3):
        self.directory, self.config = None, model.config
        self.max_length = max_length_of(model.config)
        self.dtype = str(model.policy.master)
        self._arrays = named_arrays(nnx.state(model))

    def load(
        self, abstract: AbstractParams, first_layer: int = 0, advance: Advance = lambda n: None
    ) -> Params:
        params = {}
        for path, like in abstract.items():
            array = self._arrays[path]
            if stack_of(path):
                array = array[first_layer : first_layer + like.shape[0]]
            params[path] = jax.device_put(array.astype(like.dtype), like.sharding)
            advance(params[path].nbytes)
        return params


def check_abstract(abstract: AbstractParams, config: ModelConfig, directory: Path):
    """Raise a ValueError unless the weights of `config` hold what is asked for."""
    shapes = param_shapes(config)
    for path, like in abstract.items():
        shape = shapes.get(path)
        stacked = bool(stack_of(path))
        if shape is None or shape[stacked:] != like.shape[stacked:]:
            raise ValueError(
                f"{directory}: the weights there do not fit the model asked for: {path} is "
                f"{'absent' if shape is None else shape} there and {like.shape} in the model"
            )
        if stacked and like.shape[0] > shape[0]:
            raise ValueError(
                f"{directory}: {shape[0]} layers of {path} there, {like.shape[0]} in the model"
            )


def _without_absent_mtp(config: ModelConfig, tensors: SafetensorsReader) -> ModelConfig:
    """Return `config` without MTP if no tensor of it is there, as transformers saves models."""
    prefixes = tuple(f"model.layers.{config.n_layers + i}." for i in range(config.mtp_depth))
    if not prefixes or any(name.startswith(prefixes) for name in tensors):
        return config
    warnings.warn(
        f"{tensors.directory}: config.json announces {config.mtp_depth} MTP layers, but the files "
        "hold none; going on without MTP",
        stacklevel=4,
    )
    moe = config.moe if config.n_dense < config.n_layers else None
    return dataclasses.replace(config, mtp_depth=0, moe=moe)


def check_tensors(tensors: SafetensorsReader, config: ModelConfig):
    """Raise a ValueError unless a folder holds just the tensors of `config`, in their shapes."""
    shapes = official_shapes(config)
    copies = copies_in_mtp(config)
    shapes |= {copy: shapes[name] for copy, name in copies.items() if copy in tensors}
    if missing := [name for name in shapes if name not in tensors]:
        raise ValueError(
            f"{tensors.directory}: tensor {missing[0]} is missing ({len(missing)} of {len(shapes)} "
            "are); config.json asks for it, so download the files again"
        )
    for name, tensor in tensors.items():
        where = f"{tensor.file}: tensor {name}"
        weight = name.removesuffix(SCALE)
        is_scale = weight != name and weight in shapes and tensors[weight].dtype == "F8_E4M3"
        if is_scale and len(shapes[weight]) == 2:
            blocks = tuple(-(-n // b) for n, b in zip(shapes[weight], BLOCK, strict=True))
            if (tensor.dtype, tensor.shape) != ("F32", blocks):
                raise ValueError(
                    f"{where} is {tensor.dtype} {tensor.shape}, expected F32 {blocks}: a scale for "
                    f"every {BLOCK[0]}x{BLOCK[1]} block of {shapes[weight]}"
                )
        elif name not in shapes:
            near = difflib.get_close_matches(name, shapes, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where} is none of the model's that config.json describes{hint}")
        elif tensor.shape != shapes[name]:
            raise ValueError(
                f"{where} has shape {tensor.shape}, config.json asks for {shapes[name]}"
            )
        elif tensor.dtype == "F8_E4M3" and len(tensor.shape) != 2:
            raise ValueError(f"{where} of shape {tensor.shape} is FP8, which only matrices can be")
        elif tensor.dtype == "F8_E4M3" and name + SCALE not in tensors:
            raise ValueError(f"{where} is FP8, but its scales {name + SCALE} are missing")
