import contextlib
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.states import EXTRA, abstract, mesh_of, placed, same_bits, saved

from dsv3_jax.checkpoint import CheckpointManager


def test_restore_on_another_mesh_is_bitwise_equal(tmp_path):
    checkpoints, state = saved(tmp_path, [1, 2])
    target = abstract(placed(mesh_of(2, 4), scale=0.0))
    restored, extra = checkpoints.restore(target)
    assert same_bits(restored, state)
    assert extra == EXTRA | {"step": 2}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s.sharding, restored, target))
    assert checkpoints.restore(target, step=1)[1]["step"] == 1
    checkpoints.close()


def test_values_survive_a_chain_of_meshes(tmp_path):
    """8 devices, then 4, 1, and 8 again laid out otherwise."""
    checkpoints = CheckpointManager(tmp_path, 2)
    state = first = placed(mesh_of(8, 1))
    for step, sizes in enumerate([(2, 2), (1, 1), (4, 2)]):
        checkpoints.save(step, state, EXTRA)
        state, extra = checkpoints.restore(abstract(first, mesh_of(*sizes)))
        assert jax.tree.leaves(state)[0].sharding.mesh.size == np.prod(sizes)
        assert same_bits(state, first) and extra == EXTRA
    checkpoints.close()


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    checkpoints = CheckpointManager(tmp_path, 2)
    state = {"w": jnp.arange(300_000, dtype=jnp.float32)}
    target = abstract(state)
    checkpoints.save(1, state, {})
    jax.jit(lambda x: x * 0, donate_argnums=0)(state["w"]).block_until_ready()
    restored, _ = checkpoints.restore(target)
    np.testing.assert_array_equal(restored["w"], np.arange(300_000, dtype=np.float32))
    checkpoints.close()


def test_some_are_kept_for_good(tmp_path):
    checkpoints = CheckpointManager(tmp_path, 2, keep_every=4)
    for step in range(2, 13, 2):
        checkpoints.save(step, {"w": jnp.arange(3.0)}, {})
    assert checkpoints.steps() == [4, 8, 10, 12]
    checkpoints.close()


def test_the_newest_step_has_the_highest_number_whatever_the_clock(tmp_path, monkeypatch):
    now, now_ns = time.time, time.time_ns
    for hours, step in enumerate((1, 5, 9)):  # each save an hour before the one before it
        monkeypatch.setattr(time, "time", lambda back=hours * 3600: now() - back)
        monkeypatch.setattr(time, "time_ns", lambda back=hours * 3600: now_ns() - back * 10**9)
        with contextlib.closing(CheckpointManager(tmp_path, 2)) as checkpoints:
            checkpoints.save(step, {"x": jnp.full(3, step)}, {"step": step})
    os.utime(tmp_path / "9", (0, 0))
    again = CheckpointManager(tmp_path, 2)
    assert again.steps() == [5, 9]
    assert again.resume(abstract({"x": jnp.ones(3, int)})).extra == {"step": 9}
    again.close()


def test_newest_are_kept_and_old_steps_are_refused(tmp_path):
    checkpoints = CheckpointManager(tmp_path / "none" / "yet", 2)
    assert checkpoints.latest_step() is None
    with pytest.raises(FileNotFoundError, match="step None"):
        checkpoints.restore({})
    for step in (1, 5, 9):
        checkpoints.save(step, {"x": jnp.ones(3)}, {})
    assert checkpoints.steps() == [5, 9]
    assert checkpoints.latest_step() == 9
    with pytest.raises(ValueError, match="cannot save step 9 .* step 9 is there already"):
        checkpoints.save(9, {"x": jnp.ones(3)}, {})
    with pytest.raises(FileNotFoundError, match=r"no step 1 in .*\[5, 9\]"):
        checkpoints.restore({"x": jnp.ones(3)}, step=1)
    checkpoints.close()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"w": jnp.ones((3, 5))}, r"array w is float32\[3,4\] there and float32\[3,5\] in this"),
        ({"w": jnp.ones((3, 4), "bfloat16")}, r"w is float32\[3,4\] there and bfloat16\[3,4\]"),
        ({"b": None, "c": jnp.ones(2)}, r"array c is absent there and float32\[2\] .*2 of 3"),
        ({"b": None}, r"array b is float32\[2\] there and absent in this run \(1 of 2"),
    ],
)
def test_state_of_another_config_is_refused(tmp_path, change, message):
    state = {"w": jnp.ones((3, 4)), "b": jnp.ones(2)}
    checkpoints = CheckpointManager(tmp_path, 2)
    checkpoints.save(1, state, {})
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(abstract(state | change))
    checkpoints.close()
