"""The arrays of a model by path, as shapes on a mesh, a whole model or one layer at a time."""

from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.deepseek import STACKS, DeepSeekV3, abstract_model
from dsv3_jax.numerics.fp8 import Fp8Weight, Platform
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.quantize import E4M3, QuantizedTensor
from dsv3_jax.params import param_specs
from sharding.layout import Layout
from sharding.mesh import named_sharding

AbstractParams = dict[str, jax.ShapeDtypeStruct]  # dotted path -> shape, dtype, sharding
Params = dict[str, jax.Array]  # dotted path, such as "moe.attention.out.kernel" -> array


class LayerSlice(NamedTuple):
    """One layer of a stack; ("", 0) is everything outside the stacks: embedding, norm, head."""

    stack: str
    layer: int


def layer_slices(config: ModelConfig) -> list[LayerSlice]:
    """Return the slices that make up the whole model."""
    counts = (config.n_dense, config.n_layers - config.n_dense, config.mtp_depth)
    layers = [LayerSlice(s, i) for s, n in zip(STACKS, counts, strict=True) for i in range(n)]
    return [LayerSlice("", 0), *layers]


def stack_of(path: str) -> str:
    """Return the stack that a parameter belongs to, or ""."""
    stack = path.partition(".")[0]
    return stack if stack in STACKS else ""


def abstract_slice(abstract: AbstractParams, part: LayerSlice) -> AbstractParams:
    """Return the parameters of one slice: those of a stack with one layer."""

    def one_layer(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return like.update(shape=(1, *like.shape[1:])) if part.stack else like

    return {path: one_layer(x) for path, x in abstract.items() if stack_of(path) == part.stack}


def abstract_params(
    config: ModelConfig, policy: Policy, mesh: Mesh, layout: Layout
) -> AbstractParams:
    """Return every array of a model, in the master format, where the layout stores it.

    With FP8 in the policy, matmul weights are their FP8 values, without the scales.
    """

    def abstract(variable) -> jax.ShapeDtypeStruct:
        is_param = isinstance(variable, nnx.Param)
        dtype = jnp.float32 if not is_param or variable.keep_fp32 else policy.master
        dtype = E4M3 if is_param and variable.fp8 and policy.fp8 else dtype
        sharding = named_sharding(mesh, param_specs(variable, layout))
        return jax.ShapeDtypeStruct(variable.shape, dtype, sharding=sharding)

    state = nnx.state(abstract_model(config, policy))
    return {".".join(path): abstract(variable) for path, variable in nnx.to_flat_state(state)}


def build_model(
    config: ModelConfig, policy: Policy, params: Params, scales: Params | None = None
) -> DeepSeekV3:
    """Return the model with these arrays, and for those in FP8 these scales."""
    graphdef, state = nnx.split(abstract_model(config, policy))
    return nnx.merge(graphdef, fill_state(state, params, scales or {}))


def fill_state(
    state: nnx.State, params: Params, scales: Params = MappingProxyType({})
) -> nnx.State:
    """Return a state of shapes with each shape replaced by the array of its path."""

    def fill(path, variable):
        name = ".".join(path)
        if name not in scales:
            return variable.replace(params[name])
        (device,) = {device.platform for device in params[name].devices()}
        quantized = QuantizedTensor(params[name], scales[name])
        return variable.replace(Fp8Weight(quantized, platform=Platform(device)))

    return nnx.map_state(fill, state)
