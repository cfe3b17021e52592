"""Collectives over mesh axes: sums over devices, and gathers that follow the rings of a torus.

A TPU moves data along one ring of chips beside its matrix products; for a gather over several torus
axes at once its matrix products stop. So on a torus a gather is made of one all-gather per ring,
the innermost ring first, which keeps the order of the shards. On other devices it is a single
collective.
"""

import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from sharding.mesh import AXES, DATA_AXES, MeshSpec

Axes = str | tuple[str, ...]
Groups = list[list[int]] | None  # positions along an axis that take part together; None for all


def psum_data(x):
    """Sum a pytree over all shards of the batch."""
    return lax.psum(x, DATA_AXES)


def pmax_data(x):
    """Return the maximum over all shards of the batch."""
    return lax.pmax(x, DATA_AXES)


def psum_all(x):
    """Sum a pytree over all devices."""
    return lax.psum(x, AXES)


def pmax_all(x):
    """Return the maximum over all devices."""
    return lax.pmax(x, AXES)


def all_gather(
    x: Shaped[Array, "..."], axes: tuple[str, ...], dim: int, mesh: MeshSpec
) -> Shaped[Array, "..."]:
    """Concatenate the shards of all devices along `axes` in dimension `dim`."""
    for names, groups in gather_steps(axes, mesh):
        x = lax.all_gather(x, names, axis=dim, tiled=True, axis_index_groups=groups)
    return x


def reduce_scatter(
    x: Shaped[Array, "..."], axes: tuple[str, ...], dim: int, mesh: MeshSpec
) -> Shaped[Array, "..."]:
    """Sum over all devices along `axes`; each device keeps its shard of dimension `dim`."""
    for names, groups in reversed(gather_steps(axes, mesh)):
        x = lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True, axis_index_groups=groups)
    return x


def gather_steps(axes: tuple[str, ...], mesh: MeshSpec) -> list[tuple[Axes, Groups]]:
    """Return the collectives that an all-gather over `axes` is made of, in their order."""
    axes = tuple(axis for axis in axes if mesh.size(axis) > 1)
    if not mesh.rings:
        return [(axes, None)] if axes else []
    rings = dict(mesh.rings)
    return [
        (axis, _ring_groups(rings[axis], ring) if len(rings[axis]) > 1 else None)
        for axis in reversed(axes)
        for ring in reversed(range(len(rings[axis])))
    ]


def _ring_groups(sizes: tuple[int, ...], ring: int) -> list[list[int]]:
    """Return the positions along a mesh axis that lie on the same ring of torus axis `ring`."""
    positions = np.moveaxis(np.arange(np.prod(sizes)).reshape(sizes), ring, -1)
    return positions.reshape(-1, sizes[ring]).tolist()
