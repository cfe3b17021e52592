"""What training carries from step to step, and where it lies on the mesh."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import Config
from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.model.moe import BalanceBias, RedundantExperts
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.params import named_arrays, param_specs
from dsv3_jax.progress import byte_bar
from dsv3_jax.weights.abstract_params import fill_state
from dsv3_jax.weights.sources import Source
from sharding.layout import Layout
from sharding.mesh import MeshSpec, named_sharding


class TrainState(NamedTuple):
    """Everything that a checkpoint holds, apart from the position in the data."""

    step: jax.Array | jax.ShapeDtypeStruct  # [] updates made
    params: nnx.State  # master weights
    bias: nnx.State  # balance bias of every MoE layer
    optimizer: optax.OptState
    usual_norm: jax.Array | jax.ShapeDtypeStruct  # [] mean of the last gradient norms
    ema: nnx.State | None = None  # mean of the params; in checkpoints, else on the host


def layout_of(config: Config, mesh: MeshSpec) -> Layout:
    """The layout that the config asks for on `mesh`."""
    parallel = config.parallel
    return Layout(
        mesh=mesh,
        zero=parallel.zero,
        capacity_factor=parallel.capacity_factor,
        ragged=parallel.transport == "ragged",
        wire_format=Policy.of(config.precision).wire_format,
        unroll=parallel.unroll,
        overlap_chunks=parallel.overlap_chunks,
        context=parallel.context,
    )


def parts_of(model: DeepSeekV3):
    """Graph definition, parameters, balance bias, placement of redundant experts."""
    return nnx.split(model, nnx.Param, BalanceBias, RedundantExperts)


def make_model(config: Config) -> DeepSeekV3:
    """A model with fresh weights, the same on every mesh."""
    policy = Policy.of(config.precision)
    return DeepSeekV3(config.model, policy, rngs=nnx.Rngs(config.train.seed))


def first_state(
    params: nnx.State, bias: nnx.State, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step, with these numbers."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        bias=bias,
        optimizer=optimizer.init(params),
        usual_norm=jnp.zeros((), jnp.float32),
    )


def init_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; to be traced, so that it is born sharded."""
    policy = Policy.of(config.precision)
    _, params, bias, _ = parts_of(make_model(config))
    params = jax.tree.map(lambda x: x.astype(policy.master), params)
    return first_state(params, bias, optimizer)


def abstract_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    layout: Layout,
) -> TrainState:
    """Shapes, types and placements of the state, without its numbers."""
    shapes = jax.eval_shape(lambda: init_state(config, optimizer))
    placements = jax.tree.map(lambda spec: named_sharding(mesh, spec), param_specs(shapes, layout))

    def place(sharding, subtree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), subtree
        )

    return jax.tree.map(place, placements, shapes)


def state_from(
    source: Source, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """The state before the first step with the weights and balance biases of `source`."""
    wanted = named_arrays(abstract.params) | named_arrays(abstract.bias)
    with byte_bar(f"loading {source.directory}", source.n_bytes(wanted)) as advance:
        arrays = source.load(wanted, advance=advance)

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    begin = functools.partial(first_state, optimizer=optimizer)
    start = jax.jit(begin, out_shardings=shardings, donate_argnums=(0, 1))
    return start(fill_state(abstract.params, arrays), fill_state(abstract.bias, arrays))


def fresh_state(
    config: Config, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """The state before the first step, on the mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda: init_state(config, optimizer), out_shardings=shardings)()
