"""The state that training carries from step to step, its placement, and its form on disk."""

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
    """The arrays that a step takes and returns; or their shapes, dtypes and placements."""

    step: jax.Array | jax.ShapeDtypeStruct  # [] updates made
    params: nnx.State  # master weights
    bias: nnx.State  # balance bias of every MoE layer
    optimizer: optax.OptState
    mean_grad_norm: jax.Array | jax.ShapeDtypeStruct  # [] over the last steps


class SavedState(NamedTuple):
    """The arrays of a checkpoint. They are stored by these names, which therefore must stay."""

    step: jax.Array | jax.ShapeDtypeStruct
    params: nnx.State
    bias: nnx.State
    optimizer: optax.OptState
    usual_norm: jax.Array | jax.ShapeDtypeStruct  # `TrainState.mean_grad_norm`
    ema: nnx.State | None = None  # EMA of the params


def to_saved(state: TrainState, ema_params: nnx.State | None) -> SavedState:
    """Return the state as a checkpoint holds it."""
    return SavedState(*state, ema_params)


def from_saved(saved: SavedState) -> TrainState:
    """Return the training state in a checkpoint."""
    return TrainState(*saved[:-1])


def make_layout(config: Config, mesh: MeshSpec) -> Layout:
    """Return the layout that the config asks for on `mesh`."""
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


def split_model(model: DeepSeekV3):
    """Return graph definition, parameters, balance bias and placement of redundant experts."""
    return nnx.split(model, nnx.Param, BalanceBias, RedundantExperts)


def make_model(config: Config) -> DeepSeekV3:
    """Return a model with random weights, the same on every mesh."""
    policy = Policy.of(config.precision)
    return DeepSeekV3(config.model, policy, rngs=nnx.Rngs(config.train.seed))


def new_state(
    params: nnx.State, bias: nnx.State, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the state before the first step with these weights."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        bias=bias,
        optimizer=optimizer.init(params),
        mean_grad_norm=jnp.zeros((), jnp.float32),
    )


def init_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step with random weights; call it under jit, see below."""
    policy = Policy.of(config.precision)
    _, params, bias, _ = split_model(make_model(config))
    params = jax.tree.map(lambda x: x.astype(policy.master), params)
    return new_state(params, bias, optimizer)


def abstract_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    layout: Layout,
) -> TrainState:
    """Return shapes, dtypes and placements of the state."""
    shapes = jax.eval_shape(lambda: init_state(config, optimizer))
    placements = jax.tree.map(lambda spec: named_sharding(mesh, spec), param_specs(shapes, layout))

    def place(sharding, subtree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), subtree
        )

    return jax.tree.map(place, placements, shapes)


def load_state(
    source: Source, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """Return the state before the first step with the weights and balance biases of `source`."""
    wanted = named_arrays(abstract.params) | named_arrays(abstract.bias)
    with byte_bar(f"loading {source.directory}", source.n_bytes(wanted)) as advance:
        arrays = source.load(wanted, advance=advance)

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    begin = functools.partial(new_state, optimizer=optimizer)
    start = jax.jit(begin, out_shardings=shardings, donate_argnums=(0, 1))
    return start(fill_state(abstract.params, arrays), fill_state(abstract.bias, arrays))


def init_sharded_state(
    config: Config, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """Return the state before the first step with random weights, made on the mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda: init_state(config, optimizer), out_shardings=shardings)()
