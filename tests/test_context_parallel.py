"""Sequences that lie over several ranks, and documents that don't see each other.

A step equals that of whole sequences on one device in every loss, load and gradient. Float32:
gradients agree to 2e-6 of the largest number of each tensor, losses to 2e-6.
"""

import functools

import chex
import jax
import numpy as np
import pytest
from einops import rearrange
from reference.small_step import BATCH_SIZE, LENGTH, VOCAB, config_of, loss_of, placed
from reference.stages import parameters

from dsv3_jax.config import Config
from dsv3_jax.config_cli import override
from dsv3_jax.data.packing import Row, document_starts
from dsv3_jax.losses import Batch
from dsv3_jax.mesh_checks import check_mesh
from dsv3_jax.training.batches import abstract_batch, context_slices, device_batch
from dsv3_jax.training.step import loss_and_gradients
from sharding import context_parallel
from sharding.context_parallel import gather_sequence, heads_to_seq, psum_sequence, seq_to_heads
from sharding.layout import Layout
from sharding.mesh import (
    BATCH,
    make_mesh,
    manual_region,
    mesh_spec,
    parse_mesh,
    split_batch_and_sequence,
)

EXTRA, END = 2, 3  # tokens that only targets need; the one behind every document
DOCUMENTS = "data.mask_documents=True"
# A MoE layer and MTP. The balance loss is one of rows: it differs where documents have their own.
SMALL = (DOCUMENTS, "model.n_layers=1", "model.n_dense=0", "losses.balance_weight=0")


def config_with(*settings: str) -> Config:
    return override(config_of(), "model.attention.n_heads=4", *settings)


def text() -> np.ndarray:
    """Rows of documents, a few tokens each; the fourth row is a single one."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(END + 1, VOCAB, (BATCH_SIZE, LENGTH + EXTRA)).astype(np.int32)
    ends = rng.uniform(size=tokens.shape) < 0.25
    ends[3] = False
    return np.where(ends, END, tokens)


def rows_with_targets(tokens: np.ndarray, config: Config) -> Row:
    """Rows as packed text gives them."""
    doc_start = document_starts(tokens, END) if config.data.mask_documents else None
    return Row(tokens, np.ones(tokens.shape, bool), doc_start)


@functools.cache
def program(mesh_text: str, config: Config):
    return jax.jit(loss_and_gradients(config, *placed(mesh_text, config), loss_of(config)))


def run(mesh_text: str, config: Config, batch: Batch | None = None):
    """(losses, statistics, gradients) of the program on a mesh, as NumPy arrays."""
    mesh, _ = placed(mesh_text, config)
    if batch is None:
        tokens = text()[:, : LENGTH + 1 + config.model.mtp_depth]
        batch = Batch(*device_batch(rows_with_targets(tokens, config), config, mesh))
    found = program(mesh_text, config)(*parameters(config), batch, np.float32(0), None)
    return jax.tree.map(np.asarray, found)


@functools.cache
def of_whole_rows(*settings: str):
    return run("dp1", config_with(*settings))


def largest_error(grads, want) -> float:
    """Over all tensors, as a share of the largest number of each."""
    wanted = dict(jax.tree.flatten_with_path(want)[0])
    assert len(wanted) > 20
    return max(
        np.abs(grad - wanted[path]).max() / np.abs(wanted[path]).max()
        for path, grad in jax.tree.flatten_with_path(grads)[0]
    )


def check(mesh: str, *settings: str):
    losses, stats, grads = run(mesh, config_with(*settings))
    model = [s for s in settings if not s.startswith(("pipeline.", "parallel."))]
    want = of_whole_rows(*model, "parallel.remat=none")
    chex.assert_trees_all_close(losses, want[0], rtol=2e-6, atol=0)
    np.testing.assert_array_equal(stats.load, want[1].load)
    np.testing.assert_array_equal(stats.n_received, stats.load.sum(-1))
    np.testing.assert_allclose(stats.balance, want[1].balance, rtol=2e-6)
    assert largest_error(grads, want[2]) <= 2e-6


def test_slices_become_heads_and_come_back():
    """Two groups of 4 ranks; a rank has 3 tokens of 8 heads of 2 sequences, then 12 of 2 heads."""
    mesh = make_mesh(parse_mesh("ep8"))
    layout = Layout(mesh=mesh_spec(mesh), context=4)
    x = np.random.default_rng(0).normal(size=(8 * 2, 8, 3, 5)).astype(np.float32)

    def shard(x):
        heads, place = seq_to_heads(x, layout), context_parallel.positions(3, layout)[None, :]
        return (
            heads,
            heads_to_seq(heads, layout),
            gather_sequence(place, layout),
            psum_sequence(place, layout),
        )

    heads, again, place, total = jax.jit(manual_region(shard, mesh, BATCH, BATCH))(x)
    want = rearrange(x, "(g n b) (m h) t k -> (g m b) h (n t) k", g=2, n=4, m=4)
    np.testing.assert_array_equal(heads, want)
    np.testing.assert_array_equal(again, x)
    np.testing.assert_array_equal(place, np.tile(np.arange(12), (8, 1)))
    np.testing.assert_array_equal(total, np.tile([18, 22, 26], (8, 1)))


def test_slices_and_documents():
    """The group is smaller than that of the experts, whose exchange takes one round."""
    check("ep4", *SMALL, "parallel.context=2", "parallel.remat=none", "parallel.capacity_factor=4")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, settings",
    [
        ("dp2,ep4", [DOCUMENTS, "parallel.context=2", "parallel.zero=3"]),
        (
            "ep2x4",
            [DOCUMENTS, "parallel.context=2", "parallel.zero=3", "parallel.overlap_chunks=2"],
        ),
        ("dp2,ep4", ["parallel.context=4", "parallel.remat=full", "model.mtp_depth=0"]),
        ("dp2", [DOCUMENTS, "parallel.overlap_chunks=2"]),
        ("pp2,ep2", [DOCUMENTS, "parallel.context=2", "pipeline.schedule=zb1p"]),
    ],
)
def test_more_meshes(mesh, settings):
    check(mesh, *settings)


def rows_of(documents: list[list[np.ndarray]]) -> Batch:
    """A row of each list, and anything behind it; its tokens are all targets, with starts of 0."""
    rng = np.random.default_rng(1)
    rows = rng.integers(END + 1, VOCAB, (BATCH_SIZE, LENGTH + EXTRA)).astype(np.int32)
    mask = np.zeros(rows.shape, bool)
    for row, targets, parts in zip(rows, mask, documents, strict=False):
        text = np.concatenate(parts)
        row[: len(text)], targets[: len(text)] = text, True
    return Batch(rows, mask, np.zeros(rows.shape, np.int32))


def test_documents_are_as_if_each_was_alone():
    config = config_with(*SMALL, "parallel.remat=none")
    rng = np.random.default_rng(2)
    documents = [np.append(rng.integers(END + 1, VOCAB, n), END) for n in (4, 7, 2, 1, 6, 5)]
    together = rows_of([documents[:3], documents[3:]])
    packed = together._replace(doc_start=document_starts(together.tokens, END))
    np.testing.assert_array_equal(np.unique(packed.doc_start[0]), [0, 5, 13, 16])
    alone = rows_of([[one] for one in documents])
    (losses, _, grads), want = run("dp1", config, packed), run("dp1", config, alone)
    np.testing.assert_allclose(losses.terms["loss"], want[0].terms["loss"], rtol=2e-6)
    np.testing.assert_allclose(losses.terms["mtp_loss"], want[0].terms["mtp_loss"], rtol=2e-6)
    assert largest_error(grads, want[2]) <= 2e-6
    assert abs(run("dp1", config, together)[0].terms["loss"] - want[0].terms["loss"]) > 1e-3


def test_document_starts():
    tokens = np.array([[5, END, 6, 7, END, END, 8], [END, 9, 9, 9, 9, 9, END]], np.int32)
    want = [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(document_starts(tokens, END), want)


@pytest.mark.parametrize("mesh, context", [("dp2,ep4", 2), ("ep8", 4), ("dp2,ep2x2", 1)])
def test_where_slices_lie(mesh, context):
    """Neighbouring devices have the slices of the same sequences, with the documents' starts."""
    config = config_with(DOCUMENTS, f"parallel.context={context}")
    mesh, tokens, length = make_mesh(parse_mesh(mesh)), text(), LENGTH // context
    rows = rows_with_targets(tokens[:-1], config)  # the last row is missing
    batch = Batch(*device_batch(rows, config, mesh))
    n_rows = BATCH_SIZE * context // 8  # of a device
    starts = document_starts(tokens, END)
    for device, shard in enumerate(batch.tokens.addressable_shards):
        group, part = divmod(device, context)
        for row in range(n_rows):
            sequence = group * n_rows + row
            there = slice(part * length, (part + 1) * length + EXTRA)
            there_is_one = sequence < BATCH_SIZE - 1
            found = [np.asarray(x.addressable_shards[device].data)[row] for x in batch]
            assert (found[1] == there_is_one).all()
            if there_is_one:
                np.testing.assert_array_equal(found[0], tokens[sequence, there])
                np.testing.assert_array_equal(found[2], starts[sequence, there])
        assert shard.data.shape == (n_rows, length + EXTRA)
    want = [(x.shape, x.dtype, x.sharding) for x in abstract_batch(config, mesh)]
    assert [(x.shape, x.dtype, x.sharding) for x in batch] == want


def test_slices_are_rows_of_a_shorter_length():
    tokens = np.arange(3 * (12 + EXTRA)).reshape(3, -1)
    got = rearrange(context_slices(tokens, 4, EXTRA), "n b w -> b n w")
    for row, parts in zip(tokens, got, strict=True):
        np.testing.assert_array_equal(parts, [row[i : i + 3 + EXTRA] for i in (0, 3, 6, 9)])


@pytest.mark.parametrize(
    "part, n_parts, n_groups, wanted",
    [
        (1, 2, 4, ((1, 2), (0, 1))),  # two groups a process
        (3, 4, 4, ((3, 4), (0, 1))),
        (5, 8, 2, ((1, 2), (1, 4))),  # four processes a group
        (2, 3, 1, ((0, 1), (2, 3))),
    ],
)
def test_what_a_process_has(part, n_parts, n_groups, wanted):
    assert split_batch_and_sequence(part, n_parts, n_groups) == wanted


def test_processes_that_cut_groups_are_refused():
    with pytest.raises(ValueError, match="2 processes cannot share 3 groups"):
        split_batch_and_sequence(0, 2, 3)


ERRORS = [
    ("dp2,ep2", ["parallel.context=4"], "ep has 2; parallel.context=2 works, and so does ep4"),
    ("dp8", ["parallel.context=2"], "ep has 1; parallel.context=1 works, and so does ep2"),
    ("ep8", ["parallel.context=2", "train.batch=6"], "context=4; nearest that work: .*=3, or 4"),
    ("pp2,ep2", ["parallel.context=2", "pipeline.schedule=dualpipe", "train.batch=5"], "=6 works"),
]


@pytest.mark.parametrize("mesh, settings, message", ERRORS)
def test_meshes_that_do_not_fit(mesh, settings, message):
    config = config_with(*settings, "model.n_layers=5")
    with pytest.raises(ValueError, match=message):
        check_mesh(config, parse_mesh(mesh))


@pytest.mark.parametrize(
    "settings, message",
    [
        (["train.seq_len=18", "parallel.context=4"], "train.seq_len=18 must be a multiple"),
        (["model.attention.n_heads=6", "parallel.context=4"], "n_heads=6 must be a multiple"),
        (["parallel.context=0"], "parallel.context=0 must be positive"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        config_with(*settings)
