"""Gathers and reduce-scatters over mesh axes, on a torus one ring of chips after the other.

A TPU moves data round one ring beside its products; for a gather over several torus axes at once
its products stop. So on a torus a gather takes one hop a ring, the minor one first, which keeps the
order of the shards; elsewhere it is a single collective.
"""

import jax
import numpy as np
from jax import lax

from sharding.mesh import MeshSpec

Hop = tuple[str | tuple[str, ...], list[list[int]] | None]  # mesh axes, groups within them


def hops(axes: tuple[str, ...], mesh: MeshSpec) -> list[Hop]:
    """The collectives that a gather over `axes` is made of, in their order."""
    axes = tuple(axis for axis in axes if mesh.size(axis) > 1)
    if not mesh.rings:
        return [(axes, None)] if axes else []
    rings = dict(mesh.rings)
    return [
        (axis, _groups(rings[axis], place) if len(rings[axis]) > 1 else None)
        for axis in reversed(axes)
        for place in reversed(range(len(rings[axis])))
    ]


def _groups(sizes: tuple[int, ...], place: int) -> list[list[int]]:
    """Positions along a mesh axis that share a ring, which is the one of `sizes` at `place`."""
    positions = np.moveaxis(np.arange(np.prod(sizes)).reshape(sizes), place, -1)
    return positions.reshape(-1, sizes[place]).tolist()


def gather(x: jax.Array, axes: tuple[str, ...], dim: int, mesh: MeshSpec) -> jax.Array:
    """The shards of all devices along `axes`, side by side along `dim`."""
    for names, groups in hops(axes, mesh):
        x = lax.all_gather(x, names, axis=dim, tiled=True, axis_index_groups=groups)
    return x


def scatter_sum(x: jax.Array, axes: tuple[str, ...], dim: int, mesh: MeshSpec) -> jax.Array:
    """The sum over all devices along `axes`, of which each gets its shard along `dim`."""
    for names, groups in reversed(hops(axes, mesh)):
        x = lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True, axis_index_groups=groups)
    return x
