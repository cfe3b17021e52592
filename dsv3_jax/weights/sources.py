"""Folders that hold a model's weights, and one way to load them onto a mesh.

Official   config.json and safetensors under the official names (deepseek-ai's, transformers')
Imported   the same, read once and kept as a checkpoint a layer (`weights import`)
Workdir    a run of train.py
InMemory   a model that is there already
"""

import dataclasses
import difflib
import json
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.checkpoint import CheckpointReader
from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.config_cli import from_dict, with_new_names
from dsv3_jax.model.deepseek import DeepSeekV3, abstract_model
from dsv3_jax.numerics.fp8 import Fp8Weight, Platform
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.quantize import BLOCK, E4M3, QuantizedTensor
from dsv3_jax.params import named_arrays, param_specs, scale_spec
from dsv3_jax.progress import Advance
from dsv3_jax.weights.hf_config import length_of, read_config, read_length
from dsv3_jax.weights.hf_names import (
    BIAS,
    SCALE,
    copies_in_mtp,
    official_shapes,
    our_shapes,
)
from dsv3_jax.weights.load import bytes_to_read, load_arrays, load_scales
from dsv3_jax.weights.safetensors import Folder
from sharding.layout import Layout
from sharding.mesh import named_sharding

Wanted = dict[str, jax.ShapeDtypeStruct]  # dotted path of a parameter -> shape, dtype, sharding
Arrays = dict[str, jax.Array]
STACKS = ("dense", "moe", "mtp")


class Part(NamedTuple):
    """One layer of a stack; ("", 0) is all that lies in no stack: embedding, norm, head."""

    stack: str
    layer: int


def parts(config: ModelConfig) -> list[Part]:
    """The whole model, part by part."""
    counts = (config.n_dense, config.n_layers - config.n_dense, config.mtp_depth)
    layers = [Part(s, i) for s, n in zip(STACKS, counts, strict=True) for i in range(n)]
    return [Part("", 0), *layers]


def stack_of(path: str) -> str:
    """The stack that a parameter lies in, or ""."""
    stack = path.partition(".")[0]
    return stack if stack in STACKS else ""


def wanted_part(wanted: Wanted, part: Part) -> Wanted:
    """What is wanted of one part: stacks have one layer."""

    def of(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (1, *like.shape[1:]) if part.stack else like.shape
        return jax.ShapeDtypeStruct(shape, like.dtype, sharding=like.sharding)

    return {path: of(like) for path, like in wanted.items() if stack_of(path) == part.stack}


def wanted_arrays(config: ModelConfig, policy: Policy, mesh: Mesh, layout: Layout) -> Wanted:
    """Every array of a model, in the master format, where the layout stores it.

    Of a policy with FP8 the codes of the weights of products, without their scales.
    """

    def of(variable) -> jax.ShapeDtypeStruct:
        param = isinstance(variable, nnx.Param)
        dtype = jnp.float32 if not param or variable.keep_fp32 else policy.master
        dtype = E4M3 if param and variable.fp8 and policy.fp8 else dtype
        where = named_sharding(mesh, param_specs(variable, layout))
        return jax.ShapeDtypeStruct(variable.shape, dtype, sharding=where)

    state = nnx.state(abstract_model(config, policy))
    return {".".join(path): of(variable) for path, variable in nnx.to_flat_state(state)}


def as_model(
    config: ModelConfig, policy: Policy, arrays: Arrays, scales: Arrays | None = None
) -> DeepSeekV3:
    """The model of which these are the arrays, and of those in FP8 the scales."""
    graphdef, state = nnx.split(abstract_model(config, policy))
    return nnx.merge(graphdef, filled(state, arrays, scales or {}))


def filled(state: nnx.State, arrays: Arrays, scales: Arrays = MappingProxyType({})) -> nnx.State:
    """A state of shapes with the arrays of these paths in their places."""

    def one(path, variable):
        name = ".".join(path)
        if name not in scales:
            return variable.replace(arrays[name])
        (device,) = {device.platform for device in arrays[name].devices()}
        codes = QuantizedTensor(arrays[name], scales[name])
        return variable.replace(Fp8Weight(codes, platform=Platform(device)))

    return nnx.map_state(one, state)


class Source(Protocol):
    """A model's weights somewhere."""

    directory: Path | None
    config: ModelConfig
    max_length: int  # most tokens of a text that the model was trained for
    dtype: str  # the narrowest of float32 and bfloat16 that loses nothing of the matrices

    def load(self, wanted: Wanted, first: int = 0, advance: Advance = ...) -> Arrays:
        """The arrays asked for; of stacks the layers from `first` on, as many as asked for."""

    def n_bytes(self, wanted: Wanted, first: int = 0) -> int:
        """How many bytes `load` will report to `advance`."""


def open_weights(directory: str | Path) -> Source:
    """The weights in a folder of any of the kinds above.

    "FOLDER@ema" are the mean weights of a run that keeps them (`ema.decay`).

    Raises:
        FileNotFoundError: nothing of the kind is there.
        ValueError: what is there is damaged or does not fit together; says which file and tensor.
    """
    name, mean, kind = str(directory).rpartition("@")
    mean = bool(mean) and kind == "ema"
    directory = Path(name if mean else directory).expanduser()
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a folder with weights holds config.json and safetensors, or "
            "is a workdir of train.py, or was made by `python -m dsv3_jax.weights import`"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a JSON object, not {str(values)[:100]}")
    values = with_new_names(values)
    if mean and "train" not in values:
        raise ValueError(f"{directory}@ema: only workdirs of train.py hold mean weights")
    if "imported_from" in values:
        return Imported(directory, values)
    if "train" in values:
        return Workdir(directory, values, mean)
    return Official(directory)


class Official:
    """A checkpoint folder under the official names."""

    def __init__(self, directory: Path):
        self.directory, self.folder = directory, Folder(directory)
        self.config = _with_what_is_there(read_config(directory), self.folder)
        check_tensors(self.folder, self.config)
        self.max_length = read_length(directory)
        kinds = {x.dtype for name, x in self.folder.items() if not name.endswith((SCALE, BIAS))}
        narrow = kinds == {"BF16"}
        self.dtype = "bfloat16" if narrow else "float32"

    def load(self, wanted: Wanted, first: int = 0, advance: Advance = lambda n: None) -> Arrays:
        check_wanted(wanted, self.config, self.directory)
        return load_arrays(self.folder, wanted, self.config, first, advance)

    def scales(self, mesh: Mesh, layout: Layout) -> Arrays:
        """Of the weights of products, all of them in FP8.

        Raises:
            ValueError: the folder holds one in another format.
        """
        state = nnx.state(abstract_model(self.config, Policy()), nnx.Param)
        places = {
            ".".join(path): named_sharding(mesh, scale_spec(variable, layout))
            for path, variable in nnx.to_flat_state(state)
            if variable.fp8
        }
        return load_scales(self.folder, places, self.config)

    def n_bytes(self, wanted: Wanted, first: int = 0) -> int:
        check_wanted(wanted, self.config, self.directory)
        return bytes_to_read(self.folder, wanted, self.config, first)


class _Saved:
    """What our own kinds share: their size is that of the arrays."""

    def n_bytes(self, wanted: Wanted, first: int = 0) -> int:
        return sum(like.size * like.dtype.itemsize for like in wanted.values())


class Imported(_Saved):
    """A checkpoint of every part, numbered as `parts` has them."""

    def __init__(self, directory: Path, values: dict):
        self.directory = directory
        self.config = from_dict(ModelConfig, values["model"])
        self.max_length = length_of(self.config)
        self.dtype: str = values["dtype"]
        self.checkpoints = CheckpointReader(directory / "parts")
        missing = len(parts(self.config)) - len(self.checkpoints.steps())
        if missing:
            raise ValueError(
                f"{directory}: the import is not finished, {missing} of {len(parts(self.config))} "
                f"parts are missing; run `python -m dsv3_jax.weights import "
                f"{values['imported_from']} {directory}` again"
            )

    def load(self, wanted: Wanted, first: int = 0, advance: Advance = lambda n: None) -> Arrays:
        check_wanted(wanted, self.config, self.directory)
        pieces: dict[str, list[jax.Array]] = {path: [] for path in wanted}
        for step, part in enumerate(parts(self.config)):
            asked = {
                path: like
                for path, like in wanted_part(wanted, part).items()
                if part.stack == "" or first <= part.layer < first + wanted[path].shape[0]
            }
            if not asked:
                continue
            for path, array in self.checkpoints.restore_arrays(asked, step).items():
                pieces[path].append(array.astype(wanted[path].dtype))
                advance(pieces[path][-1].nbytes)
        return {path: _joined(pieces.pop(path), wanted[path]) for path in wanted}


def _joined(layers: list[jax.Array], like: jax.ShapeDtypeStruct) -> jax.Array:
    if len(layers) == 1:
        return layers[0]
    return jax.jit(lambda *layers: jnp.concatenate(layers), out_shardings=like.sharding)(*layers)


class Workdir(_Saved):
    """The newest checkpoint of a run: its weights, or the mean of them."""

    dtype = "float32"

    def __init__(self, directory: Path, values: dict, mean: bool = False):
        self.directory = directory
        run = from_dict(Config, values)
        self.config, self.max_length = run.model, run.train.seq_len
        self.checkpoints = CheckpointReader(directory / "checkpoints")
        if not self.checkpoints.steps():
            raise FileNotFoundError(f"{directory}: the run has no checkpoint yet")
        self._kinds = ("ema" if mean else "params", "bias")
        if mean and not any(name.startswith("ema.") for name in self.checkpoints.signatures()):
            raise ValueError(f"{directory}@ema: the run kept no mean weights; it needs ema.decay")
        self._whole: Arrays = {}  # stacks, kept because they may be asked for layer by layer

    def load(self, wanted: Wanted, first: int = 0, advance: Advance = lambda n: None) -> Arrays:
        check_wanted(wanted, self.config, self.directory)
        missing = {path: like for path, like in wanted.items() if path not in self._whole}
        if missing:
            names = self._names(missing)
            saved = self.checkpoints.restore_arrays(names)
            self._whole |= {path: saved[name] for path, name in zip(missing, names, strict=True)}
        out = {}
        for path, like in wanted.items():
            array = self._whole[path]
            if stack_of(path) and array.shape != like.shape:
                array = array[first : first + like.shape[0]]
            out[path] = array.astype(like.dtype)
            advance(out[path].nbytes)
        return out

    def _names(self, wanted: Wanted) -> Wanted:
        """What the run calls these arrays, whole."""
        there, shapes = self.checkpoints.signatures(), our_shapes(self.config)
        whole = {}
        for path, like in wanted.items():
            kinds = (f"{kind}.{path}.value" for kind in self._kinds)
            name = next(name for name in kinds if name in there)
            whole[name] = jax.ShapeDtypeStruct(shapes[path], like.dtype, sharding=like.sharding)
        return whole


class InMemory(_Saved):
    """A model's own arrays."""

    def __init__(self, model: DeepSeekV3):
        self.directory, self.config = None, model.config
        self.max_length = length_of(model.config)
        self.dtype = str(model.policy.master)
        self._arrays = named_arrays(nnx.state(model))

    def load(self, wanted: Wanted, first: int = 0, advance: Advance = lambda n: None) -> Arrays:
        out = {}
        for path, like in wanted.items():
            array = self._arrays[path]
            array = array[first : first + like.shape[0]] if stack_of(path) else array
            out[path] = jax.device_put(array.astype(like.dtype), like.sharding)
            advance(out[path].nbytes)
        return out


def check_wanted(wanted: Wanted, config: ModelConfig, directory: Path):
    """Raise a ValueError unless the weights of `config` hold what is asked for."""
    there = our_shapes(config)
    for path, like in wanted.items():
        shape = there.get(path)
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


def _with_what_is_there(config: ModelConfig, folder: Folder) -> ModelConfig:
    """`config` without MTP where no tensor of it is there, as transformers saves models."""
    prefixes = tuple(f"model.layers.{config.n_layers + i}." for i in range(config.mtp_depth))
    if not prefixes or any(name.startswith(prefixes) for name in folder):
        return config
    warnings.warn(
        f"{folder.directory}: config.json announces {config.mtp_depth} MTP layers, but the files "
        "hold none; going on without MTP",
        stacklevel=4,
    )
    moe = config.moe if config.n_dense < config.n_layers else None
    return dataclasses.replace(config, mtp_depth=0, moe=moe)


def check_tensors(folder: Folder, config: ModelConfig):
    """Raise a ValueError unless the folder holds just the tensors of `config`, in their shapes."""
    shapes = official_shapes(config)
    shapes |= {copy: shapes[name] for copy, name in copies_in_mtp(config).items() if copy in folder}
    if missing := [name for name in shapes if name not in folder]:
        raise ValueError(
            f"{folder.directory}: tensor {missing[0]} is missing ({len(missing)} of {len(shapes)} "
            "are); config.json asks for it, so download the files again"
        )
    for name, tensor in folder.items():
        where = f"{tensor.file}: tensor {name}"
        weight = name.removesuffix(SCALE)
        is_scale = weight != name and weight in shapes and folder[weight].dtype == "F8_E4M3"
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
        elif tensor.dtype == "F8_E4M3" and name + SCALE not in folder:
            raise ValueError(f"{where} is FP8, but its scales {name + SCALE} are missing")
