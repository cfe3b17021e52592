"""The EMA weights on the host against NumPy, and placed back on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import EmaConfig
from dsv3_jax.training.ema import HostEma
from sharding.mesh import make_mesh, parse_mesh


def weights(seed: int, mesh) -> dict:
    """Split over all devices, over some, over none; and a scalar."""
    rng = np.random.default_rng(seed)
    sizes = {
        "all": ((8, 6), P(("dp", "rank"))),
        "some": ((6, 4), P(None, "rank")),
        "none": ((5,), P()),
    }
    sizes["scalar"] = ((), P())
    return {
        name: jax.device_put(rng.normal(size=size).astype(np.float32), NamedSharding(mesh, spec))
        for name, (size, spec) in sizes.items()
    }


@pytest.mark.parametrize("every", [1, 3])
def test_ema_equals_numpy(every):
    mesh = make_mesh(parse_mesh("dp4,ep2"))
    ema = HostEma(weights(0, mesh), EmaConfig(decay=0.9, every=every))
    want = {name: np.array(x) for name, x in weights(0, mesh).items()}
    for step in range(1, 8):
        now = weights(step, mesh)
        ema.update(step, now)
        for leaf in jax.tree.leaves(now):
            leaf.delete()  # as a step does that is given its buffers
        if step % every == 0:
            for name, x in weights(step, mesh).items():
                rate = np.float32(1 - 0.9**every)
                want[name] = want[name] + rate * (np.array(x) - want[name])
    got = ema.params()
    for name, x in weights(0, mesh).items():
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)
        assert got[name].sharding == x.sharding and got[name].dtype == x.dtype
    ema.close()


def test_an_ema_resumes_bit_for_bit():
    """Saved and begun again in between."""
    mesh, config = make_mesh(parse_mesh("dp2,ep4")), EmaConfig(decay=0.95)
    whole = HostEma(weights(0, mesh), config)
    part = HostEma(weights(0, mesh), config)
    for step in range(1, 6):
        if step == 3:
            part = HostEma(part.params(), config)
        for ema in (whole, part):
            ema.update(step, weights(step, mesh))
    for one, other in zip(*(jax.tree.leaves(x.params()) for x in (whole, part)), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_what_goes_wrong_in_the_thread_is_told():
    mesh = make_mesh(parse_mesh("dp8"))
    ema = HostEma(weights(0, mesh), EmaConfig(decay=0.9))
    ema.update(1, {name: jnp.zeros((3, 3)) for name in weights(0, mesh)})
    with pytest.raises((KeyError, ValueError)):
        ema.params()
