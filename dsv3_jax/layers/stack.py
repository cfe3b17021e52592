"""Equal layers, stacked: one array a parameter, run by `lax.scan`."""

from collections.abc import Callable

import jax
from flax import nnx
from jax import lax

from dsv3_jax.layers.linear import assemble
from sharding.rules import Layout

# What the backward of a layer finds in memory under remat="report"; norms, MLA up-projections, the
# attention scores and the SwiGLU product are computed again (report sec. 3.2.3 and 3.3.3).
KEPT_BY_REPORT = (
    "residual",
    "q_latent",
    "kv_latent",
    "attention",
    "gates",
    "expert_ids",
    "dispatched",
    "expert_hidden",
    "ffn_hidden",
)


def stack(make: Callable[[nnx.Rngs], nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.Module:
    """`n` layers in one module whose parameters have a leading dim of `n`."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(n))


def scan(fn: Callable, layers: nnx.Module, carry, xs, *, layout: Layout, compute, remat: str):
    """Run stacked layers in turn.

    Args:
        fn: (layer, carry, x) -> (carry, out); the layer's parameters come ready to use.
        xs: further inputs with a leading dim of one entry a layer, or None.
        compute: dtype of the weights in use.
        remat: "report", "full" (the backward repeats the layer) or "none".

    Returns:
        The last carry, and the outs, stacked.
    """
    graphdef, state = nnx.split(layers)

    def body(carry, item):
        params, x = item
        layer = nnx.merge(graphdef, assemble(params, layout, compute))
        return fn(layer, carry, x)

    if remat == "report":
        policy = jax.checkpoint_policies.save_only_these_names(*KEPT_BY_REPORT)
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    elif remat == "full":
        body = jax.checkpoint(body, prevent_cse=False)
    return lax.scan(body, carry, (state, xs), unroll=layout.unroll)
