"""States with every kind of leaf, on meshes of the virtual devices, and checkpoints of them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.checkpoint import CheckpointManager

EXTRA = {"tokens": 12_345, "loader": {"position": [3, 7], "seed": 0}, "rate": 0.1}


def mesh_of(*sizes: int) -> jax.sharding.Mesh:
    return jax.make_mesh(sizes, ("dp", "ep"), axis_types=(AxisType.Auto,) * 2)


def placed(mesh: jax.sharding.Mesh, scale: float = 1.0) -> dict:
    """A state with every kind of leaf: NNX parameters, moments, counters, narrow, empty."""
    model = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
    params = jax.tree.map(lambda x: x * scale, nnx.state(model))
    key = jax.random.key(1)
    state = {
        "params": params,
        "optimizer": optax.adam(1e-3).init(params),
        "narrow": (
            jax.random.normal(key, (32, 40), jnp.bfloat16),
            jax.random.normal(key, (8, 24)).astype(jnp.float8_e4m3fn),
            jnp.arange(128).reshape(8, 16) % 3 == 0,
        ),
        "step": jnp.int32(7),
        "empty": jnp.zeros((0, 4)),
    }
    return jax.tree.map(lambda x: jax.device_put(x, sharding_of(mesh, x)), state)


def sharding_of(mesh: jax.sharding.Mesh, x: jax.Array) -> NamedSharding:
    return NamedSharding(mesh, P("dp", "ep") if x.ndim == 2 and x.size else P())


def abstract(state, mesh: jax.sharding.Mesh | None = None):
    """What to restore: `state` placed as it is, or on another mesh."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding if mesh is None else sharding_of(mesh, x)
        ),
        state,
    )


def same_bits(a, b) -> bool:
    equal = jax.tree.map(
        lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b
    )
    return jax.tree.all(equal)


def saved(directory: Path, steps: list[int], keep: int = 3) -> tuple[CheckpointManager, dict]:
    """Checkpoints of one state at these steps, and the state."""
    checkpoints = CheckpointManager(directory, keep)
    state = placed(mesh_of(4, 2))
    for step in steps:
        checkpoints.save(step, state, EXTRA | {"step": step})
    checkpoints.wait()
    return checkpoints, state
