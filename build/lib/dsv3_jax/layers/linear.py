"""Parameters with logical axes, and the matrix product that most of them are for."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.shapes import Array, Float
from sharding.mesh import REPLICATED
from sharding.rules import Layout


def weight(
    rngs: nnx.Rngs, sizes: tuple[int, ...], names: tuple[str, ...], std: float, wide: bool = False
) -> nnx.Param:
    """A normal(0, std) parameter in float32.

    Args:
        sizes: global sizes.
        names: logical axis of each dimension, see `sharding/rules.py`.
        wide: stays float32 where it is used, instead of the policy's compute format.
    """
    value = std * jax.random.normal(rngs.params(), sizes, jnp.float32)
    return nnx.Param(value, names=names, sizes=sizes, wide=wide)


def assemble(state: nnx.State, layout: Layout, compute: jnp.dtype) -> nnx.State:
    """Stored shards of parameters -> the arrays that layers use, in the format they use.

    Does nothing to what is assembled already.
    """

    def one(variable):
        if not isinstance(variable, nnx.Param):
            return variable
        dtype = variable[...].dtype if variable.wide else compute
        used = layout.gather(variable[...], variable.names, variable.sizes, dtype)
        return variable.replace(used)

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def specs(tree, layout: Layout):
    """PartitionSpecs: of each parameter, and of the moments of it, where the layout stores it."""

    def of(leaf):
        if not (isinstance(leaf, nnx.Variable) and "names" in leaf.get_metadata()):
            return REPLICATED
        return layout.stored(leaf.names, leaf.sizes, stack=len(leaf.shape) - len(leaf.sizes))

    return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


class Linear(nnx.Module):
    """x W, without bias."""

    def __init__(
        self, n_in: int, n_out: int, names: tuple[str, str], std: float, *, rngs: nnx.Rngs
    ):
        self.kernel = weight(rngs, (n_in, n_out), names, std)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        return jnp.einsum("...D,DF->...F", x, self.kernel[...].astype(x.dtype))
