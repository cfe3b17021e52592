"""From a source with masks and document starts of its own to the loss, sliced and sharded.

Float32: a loss computed by hand from the model's logits agrees to 1e-5, another mesh to 2e-6.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference.small_step import BATCH_SIZE, LENGTH, VOCAB, config_of, loss_of, placed
from reference.stages import parameters

from dsv3_jax.config import Config
from dsv3_jax.config_cli import override
from dsv3_jax.data.loader import Loader
from dsv3_jax.data.packing import Row
from dsv3_jax.losses import Batch
from dsv3_jax.model.deepseek import abstract_model
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.schedules import BatchSizes
from dsv3_jax.training.batches import device_batch
from dsv3_jax.training.state import split_model
from dsv3_jax.training.step import loss_and_gradients

WIDTH = LENGTH + 2
CUT = 7  # where the second document of every row begins


def config_with(*settings: str) -> Config:
    model = ("model.attention.n_heads=4", "model.n_layers=1", "model.n_dense=0")
    plain = ("losses.balance_weight=0", "data.mask_documents=True", "parallel.remat=none")
    return override(config_of(), *model, *plain, *settings)


def rows_of(seed: int, n: int = BATCH_SIZE) -> list[Row]:
    """Two documents a row, without any token that ends one; few targets, in some rows none."""
    rng = np.random.default_rng(seed)
    doc_start = np.where(np.arange(WIDTH) < CUT, 0, CUT).astype(np.int32)
    return [
        Row(
            rng.integers(1, VOCAB, WIDTH).astype(np.int32),
            rng.uniform(size=WIDTH) < (0.3 if i % 3 else 0.0),
            doc_start,
        )
        for i in range(n)
    ]


@functools.cache
def program(mesh: str, config: Config):
    return jax.jit(loss_and_gradients(config, *placed(mesh, config), loss_of(config)))


def losses_of(mesh: str, rows: Row, *settings: str):
    config = config_with(*settings)
    batch = Batch(*device_batch(rows, config, placed(mesh, config)[0]))
    return jax.device_get(program(mesh, config)(*parameters(config), batch, 0.3, None)[0])


def in_order(source, *, batch: int = BATCH_SIZE, process: tuple[int, int] = (0, 1)) -> Loader:
    return Loader(source, BatchSizes((0,), (batch,), LENGTH), process=process, shuffle=False)


def log_probs(tokens: np.ndarray) -> np.ndarray:
    """log softmax of each next token of one document [t], which is read alone, [t - 1]."""
    config = config_with()
    graphdef, _, _, redundant = split_model(abstract_model(config.model, Policy()))
    weights = jax.tree.map(jnp.asarray, parameters(config))
    model = nnx.merge(graphdef, *weights, redundant)
    logits = np.asarray(model(tokens[None, :-1])[0], np.float64)
    every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return every[np.arange(len(tokens) - 1), tokens[1:]]


def test_the_loss_is_the_mean_over_the_masked_targets_of_each_document():
    rows = rows_of(0)
    found = []
    for row in rows:
        for document in (slice(0, CUT), slice(CUT, LENGTH + 1)):
            found += log_probs(row.tokens[document])[row.loss_mask[document][1:]].tolist()
    assert 10 < len(found) < 60
    loaded = next(in_order(rows))
    np.testing.assert_allclose(
        losses_of("dp1", loaded.rows).terms["loss"], -np.mean(found), rtol=1e-5
    )


@pytest.mark.parametrize(
    "mesh, context", [pytest.param("dp2,ep2", 1, marks=pytest.mark.slow), ("ep4", 2)]
)
def test_on_meshes(mesh, context):
    rows = next(in_order(rows_of(0))).rows
    want = losses_of("dp1", rows)
    found = losses_of(mesh, rows, f"parallel.context={context}", "parallel.capacity_factor=4")
    np.testing.assert_allclose(found.terms["loss"], want.terms["loss"], rtol=2e-6)
    np.testing.assert_allclose(found.terms["mtp_loss"], want.terms["mtp_loss"], rtol=2e-6)


@pytest.mark.parametrize("streams", [False, True])
def test_slices_of_processes_make_the_batch_and_resume_in_the_middle(streams):
    """The second of two batches, from a list and from a source that can only be iterated."""
    rows = rows_of(0) + rows_of(1)
    want = losses_of("dp1", jax.tree.map(lambda *x: np.stack(x), *rows[BATCH_SIZE:]))
    parts = []
    for process in range(2):
        source = (row for row in rows) if streams else rows
        loader = in_order(source, process=(process, 2))
        loader.start(1, BATCH_SIZE)
        parts.append(next(loader).rows)
    batch = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    assert losses_of("dp1", batch).terms["loss"] == want.terms["loss"]


class Weighted(NamedTuple):
    """Rows with a field that the trainer does not know."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    advantages: np.ndarray


@pytest.mark.parametrize("as_dict", [False, True])
def test_fields_of_any_name_are_filled_up_with_zeros_and_sliced(as_dict):
    """Six rows on four groups of two devices, each with half a row."""
    config = config_with("parallel.context=2")
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(6, WIDTH)).astype(np.float32)
    rows = Weighted(np.ones((6, WIDTH), np.int32), np.ones((6, WIDTH), bool), numbers)
    mesh, _ = placed("ep8", config)
    found = device_batch(rows._asdict() if as_dict else rows, config, mesh)
    found = Weighted(**found) if as_dict else found
    assert type(found) is Weighted
    half = LENGTH // 2
    for device, shard in enumerate(found.advantages.addressable_shards):
        group, part = divmod(device, 2)
        want = np.zeros((2, half + 2), np.float32)
        there = numbers[2 * group : 2 * group + 2, part * half : part * half + half + 2]
        want[: len(there)] = there
        np.testing.assert_array_equal(shard.data, want)
    assert found.loss_mask.sum() == 6 * 2 * (half + 2)
