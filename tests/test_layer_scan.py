"""Stacked layers: gathering ahead changes neither values nor gradients, and saves no weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from reference.cases import assert_close

from dsv3_jax.layer_scan import scan, scan_prefetch, stack
from dsv3_jax.model.layers import Linear
from dsv3_jax.params import param_specs
from sharding.collectives import psum_data
from sharding.layout import Layout
from sharding.mesh import BATCH, REPLICATED, make_mesh, manual_region, parse_mesh

WIDTH, HIDDEN, ROWS = 16, 24, 8
FLOAT32 = jnp.dtype("float32")


class Toy(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = Linear(WIDTH, HIDDEN, ("embed", "mlp"), 0.3, rngs=rngs)
        self.down = Linear(HIDDEN, WIDTH, ("mlp", "embed"), 0.3, rngs=rngs)


def step(layer, x, overlap_barrier=None):
    """One layer; what it saw: a number with a gradient, and one without."""
    hidden = checkpoint_name(jnp.tanh(layer.up(x)), "ffn_hidden")
    if overlap_barrier is not None:
        hidden = overlap_barrier(hidden)
    x = x + layer.down(hidden)
    return x, {"mean": jnp.square(x).mean(), "count": (x > 0).sum()}


@functools.cache
def layers(n: int) -> nnx.Module:
    return stack(Toy, n, nnx.Rngs(0))


def program(run, n: int, remat: str):
    """(parameters, rows) -> (loss, counts), gradients; on 8 devices."""
    spec = parse_mesh("dp2,ep4")
    layout = Layout(mesh=spec, zero=3)
    graphdef, params = nnx.split(layers(n))
    stored = param_specs(params, layout)

    def shard(params, rows):
        def loss(params, rows):
            how = {"layout": layout, "compute": FLOAT32, "remat": remat}
            x, out = run(step, nnx.merge(graphdef, params), rows, **how)
            weights = jnp.arange(1.0, n + 1)
            return jnp.sin(x).sum() + (out["mean"] * weights).sum(), out["count"]

        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (d_params, d_rows), counts = grad(params, rows)
        return psum_data(loss(params, rows)[0]), psum_data(counts), d_params, d_rows

    inside = manual_region(
        shard, make_mesh(spec), (stored, BATCH), (REPLICATED, REPLICATED, stored, BATCH)
    )
    return jax.jit(inside), params


def inputs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("remat", ["full", "report", "none"])
def test_gathering_ahead_changes_nothing(remat, n):
    ahead, params = program(scan_prefetch, n, remat)
    plain, _ = program(functools.partial(scan, xs=None), n, "none")
    got, want = ahead(params, inputs()), plain(params, inputs())
    np.testing.assert_array_equal(got[1], want[1])
    assert len(jax.tree.leaves(got)) == 5
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(one, np.asarray(other))


def stacked_shapes(jaxpr, n: int):
    """Shapes of what loops leave with an entry a layer, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield from (v.aval.shape for v in equation.outvars if v.aval.shape[:1] == (n,))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from stacked_shapes(inner, n)


@pytest.mark.parametrize("remat", ["full", "report"])
def test_no_gathered_weight_is_saved(remat):
    """Each loop leaves what the policy keeps, once a layer, and no whole weight."""
    n = 7
    run, params = program(scan_prefetch, n, remat)
    shapes = set(stacked_shapes(jax.make_jaxpr(run)(params, inputs()).jaxpr, n))
    assert (n, 1, WIDTH) in shapes  # the input of each layer: the search does find what is saved
    assert ((n, 1, HIDDEN) in shapes) == (remat == "report")
    assert not shapes & {(n, WIDTH, HIDDEN), (n, HIDDEN, WIDTH)}
