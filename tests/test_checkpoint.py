import gc
import json
import random
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.checkpoint import Checkpoints, DamagedCheckpoint
from dsv3_jax.checkpoint.fingerprints import fingerprints

# Orbax abandons the other reads of a step once one of them has failed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]

EXTRA = {"tokens": 12_345, "loader": {"position": [3, 7], "seed": 0}, "rate": 0.1}


@pytest.fixture(scope="module", autouse=True)
def collect_abandoned_reads():
    """Let them go while their warnings are off, not when the session ends."""
    yield
    gc.collect()


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


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def same_bits(a, b) -> bool:
    equal = jax.tree.map(
        lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b
    )
    return jax.tree.all(equal)


def saved(directory: Path, steps: list[int], keep: int = 3):
    checkpoints = Checkpoints(directory, keep)
    state = placed(mesh_of(4, 2))
    for step in steps:
        checkpoints.save(step, state, EXTRA | {"step": step})
    checkpoints.wait()
    return checkpoints, state


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


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    state = {"w": jnp.arange(300_000, dtype=jnp.float32)}
    target = abstract(state)
    checkpoints.save(1, state, {})
    jax.jit(lambda x: x * 0, donate_argnums=0)(state["w"]).block_until_ready()
    restored, _ = checkpoints.restore(target)
    np.testing.assert_array_equal(restored["w"], np.arange(300_000, dtype=np.float32))
    checkpoints.close()


def test_some_are_kept_for_good(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, keep_every=4)
    for step in range(2, 13, 2):
        checkpoints.save(step, {"w": jnp.arange(3.0)}, {})
    assert checkpoints.steps() == [4, 8, 10, 12]
    checkpoints.close()


def test_newest_are_kept_and_old_steps_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none" / "yet", 2)
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


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (1, 8), (1, 1)])
def test_fingerprint_does_not_depend_on_the_sharding(sizes):
    arrays = {str(i): x for i, x in enumerate(jax.tree.leaves(placed(mesh_of(*sizes)))) if x.size}
    alone = {name: jnp.asarray(np.asarray(x)) for name, x in arrays.items()}
    assert fingerprints(arrays) == fingerprints(alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8", "int32"])
def test_fingerprint_shows_every_flipped_bit_and_exchange(dtype):
    values = np.arange(35).reshape(5, 7).astype(dtype)
    before = fingerprints({"x": jnp.asarray(values)})
    width = values.itemsize * 8
    for bit in range(0, 35 * width, 11):
        raw = bytearray(values.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        flipped = np.frombuffer(bytes(raw), values.dtype).reshape(5, 7)
        assert fingerprints({"x": jnp.asarray(flipped)}) != before
    assert fingerprints({"x": jnp.asarray(values[::-1])}) != before
    assert fingerprints({"x": jnp.asarray(np.roll(values, 1, axis=1))}) != before


def test_fingerprint_equals_its_formula_in_numpy():
    def mix(x):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))

    values = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    words = values.view(np.uint32).ravel()
    total = mix(words ^ mix(np.arange(words.size, dtype=np.uint32))).sum(dtype=np.uint32)
    assert fingerprints({"x": jnp.asarray(values)}) == {"x": f"{total:08x}"}


def test_no_flipped_bit_restores_other_values(tmp_path):
    checkpoints, state = saved(tmp_path, [1])
    target, expected = abstract(state), checkpoints.restore(abstract(state))
    files = sorted(path for path in (tmp_path / "1").rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    rng, by_fingerprint = random.Random(0), 0
    picks = rng.choices(files, weights=sizes, k=40) + rng.choices(files, k=20)
    for path in picks:
        sound = path.read_bytes()
        position, bit = rng.randrange(len(sound)), rng.randrange(8)
        path.write_bytes(
            sound[:position] + bytes([sound[position] ^ 1 << bit]) + sound[position + 1 :]
        )
        try:
            restored, extra = checkpoints.restore(target)
            assert same_bits(restored, expected[0]) and extra == expected[1], path
        except DamagedCheckpoint as error:
            by_fingerprint += "bits changed" in str(error)
        path.write_bytes(sound)
    assert by_fingerprint >= 10  # Orbax alone would have restored these silently
    checkpoints.close()


@pytest.mark.parametrize("damage", ["missing", "cut", "emptied"])
def test_lost_files_are_named_with_the_way_out(tmp_path, damage):
    checkpoints, state = saved(tmp_path, [3, 6])
    folder = tmp_path / "6"
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "missing":
        largest.unlink()
    elif damage == "cut":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    else:
        shutil.rmtree(folder / "state")
    with pytest.raises(DamagedCheckpoint, match=rf"{folder} is damaged") as caught:
        checkpoints.restore(abstract(state))
    assert f"Move {folder} out of {tmp_path}" in str(caught.value)
    assert "what is left are steps [3]" in str(caught.value)
    assert caught.value.__cause__ is not None
    shutil.move(folder, tmp_path / "damaged")
    assert checkpoints.latest_step() == 3
    assert same_bits(checkpoints.restore(abstract(state))[0], state)
    checkpoints.close()


def test_a_changed_position_in_the_manifest_is_caught(tmp_path):
    checkpoints, state = saved(tmp_path, [1])
    path = tmp_path / "1" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    manifest["extra"]["tokens"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match="manifest does not match the checksum"):
        checkpoints.restore(abstract(state))
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
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, state, {})
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(abstract(state | change))
    checkpoints.close()


def test_a_killed_save_leaves_the_step_before(tmp_path):
    checkpoints, state = saved(tmp_path, [1, 2])
    checkpoints.close()
    left = tmp_path / "3.orbax-checkpoint-tmp"  # the name under which Orbax writes a step
    shutil.copytree(tmp_path / "2", left)
    shutil.rmtree(left / "manifest")
    again = Checkpoints(tmp_path, 2)
    assert again.steps() == [1, 2]
    assert same_bits(again.restore(abstract(state))[0], state)
    again.save(3, state, EXTRA)
    assert again.steps() == [2, 3]
    assert not left.exists()
    again.close()


def test_a_failed_write_names_its_step_and_spares_the_others(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    small = {"w": jnp.arange(8.0)}
    checkpoints.save(1, small, EXTRA)
    checkpoints.wait()
    noise = {"w": jax.random.bits(jax.random.key(0), (1 << 20,), jnp.uint32)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # as a disk with 1 MB left
    try:
        with pytest.raises(OSError, match=r"(?s)saving step 2 in .* failed.*Intact: steps \[1\]"):
            checkpoints.save(2, noise, EXTRA)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.steps() == [1]
    assert same_bits(checkpoints.restore(abstract(small))[0], small)
    checkpoints.save(2, noise, EXTRA)
    assert checkpoints.steps() == [2]
    assert same_bits(checkpoints.restore(abstract(noise))[0], noise)
    checkpoints.close()
