"""The weights as inference programs use them: a view of a model that somebody else trains or loads.

Programs read an array per layer, in the format that matmuls use; a training state has float32
stacks of layers, sharded by ZeRO. So a view holds a copy of its own in the layout for inference,
and never keeps an array of the state that it was made from: training may donate that state to its
next step. `update_weights` replaces the copy, and the old one is freed first, so there are never
two. Programs take the weights as an argument: nothing is compiled again.

Who loads weights only to serve them has no use for the stacks. `ModelView.take` moves them out of a
model instead and frees each as soon as its layers are apart.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.deepseek import STACKS, DeepSeekV3
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.params import named_arrays, param_specs, take_arrays
from dsv3_jax.serving.decode import DecodeModel
from sharding.layout import Layout
from sharding.mesh import manual_region, mesh_spec, named_sharding


class ModelView:
    """A `DecodeModel` on a mesh, and the programs that run it.

    Make one with `ModelView.of_state` or `ModelView.take`.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy,
        mesh: Mesh,
        capacity_factor: float = 1.25,
    ):
        """Make a view without weights.

        Args:
            mesh: without pipeline stages.
            capacity_factor: as in `Layout`.
        """
        moe = config.moe and dataclasses.replace(config.moe, n_redundant=0)
        self.config, self.mesh = dataclasses.replace(config, moe=moe), mesh
        self.layout = Layout(mesh=mesh_spec(mesh), zero=0, capacity_factor=capacity_factor)
        model = nnx.eval_shape(lambda: DecodeModel(self.config, policy, rngs=nnx.Rngs(0)))
        self._graphdef, self._abstract = nnx.split(model)
        self._policy = policy
        self._leaves: list[jax.Array] = []  # flat, because every call flattens its arguments

    @classmethod
    def of_state(
        cls,
        config: ModelConfig,
        policy: Policy,
        mesh: Mesh,
        *states: nnx.State,
        capacity_factor: float = 1.25,
    ) -> "ModelView":
        """Return a view of a state that stays its owner's: parameters and balance biases.

        Args:
            policy: the compute format is that of the view's weights.
            states: such as `TrainState.params` and `TrainState.bias`, on the devices of `mesh`.
        """
        view = cls(config, dataclasses.replace(policy, fp8=False), mesh, capacity_factor)
        view.update_weights(*states)
        return view

    @classmethod
    def take(cls, model: DeepSeekV3, mesh: Mesh, capacity_factor: float = 1.25) -> "ModelView":
        """Return a view that owns the arrays of `model`, which has none afterwards.

        Stacked parameters are split and freed one after the other, so the model is never in memory
        twice. The arrays must be where `load_pretrained` puts them on the mesh.
        """
        view = cls(model.config, model.policy, mesh, capacity_factor)
        arrays = take_arrays(model)
        layers = {}
        for path in list(arrays):
            layers[path] = _unstack(arrays.pop(path)) if _is_stacked(path) else [arrays.pop(path)]
        view._set([layers[path][index] for path, index in view._sources()])
        return view

    def update_weights(self, *states: nnx.State):
        """Copy the weights of a model of the same config, in place of those held so far.

        Raises:
            ValueError: the view holds released FP8 weights.
        """
        if self._policy.fp8:
            raise ValueError("a view of released FP8 weights can't be updated; use bfloat16")
        arrays = {}
        for state in states:
            arrays |= named_arrays(state)
        wanted = {path: arrays[path] for path, _ in self._sources()}
        self._leaves = []  # before new ones are made
        self._set(self._copy(wanted))

    def program(self, fn: Callable, inputs: tuple, outputs, donate: tuple = ()) -> Callable:
        """Return `fn(model, *arguments)` with the view's weights, compiled for its mesh.

        Args:
            fn: takes a `DecodeModel`, and runs on the shards of one device.
            inputs, outputs: specs of the arguments and the results.
            donate: which arguments the results may overwrite.
        """

        def shard(leaves, *arguments):
            return fn(self._model(leaves), *arguments)

        region = manual_region(shard, self.mesh, (self._specs, *inputs), outputs)
        compiled = jax.jit(region, donate_argnums=tuple(1 + number for number in donate))
        return lambda *arguments: compiled(self._leaves, *arguments)

    @property
    def model(self) -> DecodeModel:
        """The model with the view's weights as they are now."""
        return self._model(self._leaves)

    def _model(self, leaves: list[jax.Array]) -> DecodeModel:
        return nnx.merge(self._graphdef, self._treedef.unflatten(leaves))

    def _sources(self) -> list[tuple[str, int]]:
        """Return for each variable its path in the stacked model, and its layer there (or 0)."""
        sources = []
        for path, _ in nnx.to_flat_state(self._abstract):
            index = [part for part in path if isinstance(part, int)]
            sources.append((".".join(part for part in path if isinstance(part, str)), sum(index)))
        return sources

    def _set(self, values: list):
        """Take these values of the variables, in the order of `_sources`."""
        flat = nnx.to_flat_state(self._abstract)
        state = nnx.from_flat_state(
            [(path, x.replace(value)) for (path, x), value in zip(flat, values, strict=True)]
        )
        self._leaves, self._treedef = jax.tree.flatten(state)
        self._specs = jax.tree.leaves(param_specs(state, self.layout))

    @functools.cached_property
    def _copy(self) -> Callable:
        """Return the compiled function from stacked arrays by path to values for `_set`."""
        variables = [variable for _, variable in nnx.to_flat_state(self._abstract)]
        shardings = [named_sharding(self.mesh, param_specs(x, self.layout)) for x in variables]
        keep_fp32 = [not isinstance(x, nnx.Param) or x.keep_fp32 for x in variables]

        def copy(arrays: dict[str, jax.Array]) -> list[jax.Array]:
            values = []
            for (path, index), fp32 in zip(self._sources(), keep_fp32, strict=True):
                value = arrays[path][index] if _is_stacked(path) else arrays[path]
                dtype = jnp.float32 if fp32 else self._policy.compute
                values.append(jnp.array(value, dtype, copy=True))
            return values

        return jax.jit(copy, out_shardings=shardings)


def _is_stacked(path: str) -> bool:
    return path.partition(".")[0] in STACKS


def _unstack(stacked) -> list:
    """Return a value for each layer of an array or FP8 weight [L ...]."""
    n_layers = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(n_layers)]
