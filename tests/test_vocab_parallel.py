"""Embedding, logits and cross-entropy over the expert axes equal those of one whole table.

Inputs of the linear parts are small integers, so float32 is exact and they must be equal. The
loss is compared with a float64 twin, to 1e-5 of the largest value.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from reference.step import cross_entropy as reference_cross_entropy
from reference.step import token_log_probs as reference_token_log_probs

import dsv3_jax.losses
from dsv3_jax.losses import cross_entropy, token_log_probs
from sharding import vocab_parallel
from sharding.mesh import BATCH, EXPERT_AXES, REPLICATED, make_mesh, manual_region, parse_mesh
from sharding.vocab_parallel import n_vocab_chunks, scan_vocab_chunks

T, D, V = 40, 16, 48
MESHES = ["ep1", "ep4", "ep2x4", "dp2,ep4"]
COLUMNS, ROWS = PartitionSpec(None, EXPERT_AXES), PartitionSpec(EXPERT_AXES)


def integers(rng, *sizes):
    return rng.integers(-3, 4, sizes).astype(np.float32)


def compiled(mesh_text: str, shard, in_specs, out_specs):
    spec = parse_mesh(mesh_text)
    mesh = make_mesh(spec, jax.devices()[: spec.n_devices])
    return jax.jit(manual_region(functools.partial(shard, spec), mesh, in_specs, out_specs))


def over_dp(x):
    """The gradient of what is stored whole over dp."""
    return jax.lax.psum(x, "dp")


@pytest.mark.parametrize("mesh", MESHES)
def test_embed(mesh):
    def shard(spec, table, ids, cotangent):
        rows, pull = jax.vjp(
            lambda table: vocab_parallel.embed(table, ids, spec, jnp.dtype("float32")), table
        )
        return rows, over_dp(pull(cotangent)[0])

    run = compiled(mesh, shard, (COLUMNS, BATCH, BATCH), (BATCH, COLUMNS))
    rng = np.random.default_rng(0)
    table, cotangent = integers(rng, V, D), integers(rng, T, D)
    for ids in [rng.integers(0, V, T), np.zeros(T, int), np.full(T, V - 1), np.arange(T) % 3]:
        rows, d_table = run(table, ids.astype(np.int32), cotangent)
        np.testing.assert_array_equal(rows, table[ids])
        want = np.zeros_like(table)
        np.add.at(want, ids, cotangent)
        np.testing.assert_array_equal(d_table, want)


def test_embed_in_the_compute_format():
    run = compiled(
        "ep4",
        lambda spec, *x: vocab_parallel.embed(*x, spec, jnp.dtype("bfloat16")),
        (COLUMNS, BATCH),
        BATCH,
    )
    rng = np.random.default_rng(1)
    table, ids = rng.normal(size=(V, D)).astype(np.float32), rng.integers(0, V, T, np.int32)
    got = run(table, ids)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, table[ids].astype(jnp.bfloat16))


@pytest.mark.parametrize("mesh", MESHES)
def test_logits(mesh):
    def shard(spec, rows, head, cotangent):
        logits, pull = jax.vjp(lambda *x: vocab_parallel.logits(*x, spec), rows, head)
        d_rows, d_head = pull(cotangent)
        return logits, d_rows, over_dp(d_head)

    run = compiled(mesh, shard, (BATCH, ROWS, BATCH), (BATCH, BATCH, ROWS))
    rng = np.random.default_rng(2)
    rows, head, cotangent = integers(rng, T, D), integers(rng, V, D), integers(rng, T, V)
    logits, d_rows, d_head = run(rows, head, cotangent)
    np.testing.assert_array_equal(logits, rows @ head.T)
    np.testing.assert_array_equal(d_rows, cotangent @ head)
    np.testing.assert_array_equal(d_head, cotangent.T @ rows)


@pytest.mark.parametrize("mesh, n_chunks", [("ep1", 4), ("ep4", 1), ("ep2x4", 3), ("dp2,ep4", 4)])
def test_scan(mesh, n_chunks):
    """Each token id comes once, with its own row; outs are summed over the expert axes only."""
    spec = parse_mesh(mesh)

    def walked(rows, head):
        def fn(carry, chunk, ids):
            scores = jnp.einsum("tD,pD->tp", rows, chunk)
            out = jnp.einsum("tp,tD->pD", scores, rows)
            return carry + (scores * (ids + 1)[None, :]).sum(-1), out

        return scan_vocab_chunks(fn, jnp.zeros(rows.shape[0]), head, n_chunks, spec)

    def shard(spec, rows, head, c_carry, c_out):
        (carry, out), pull = jax.vjp(walked, rows, head)
        d_rows, d_head = pull((c_carry, c_out))
        return carry, out, d_rows, over_dp(d_head)

    stacked = PartitionSpec(("dp", *EXPERT_AXES))  # one out a dp group
    in_specs = (BATCH, ROWS, BATCH, stacked)
    run = compiled(mesh, shard, in_specs, (BATCH, stacked, BATCH, ROWS))
    rng = np.random.default_rng(3)
    rows, head, c_carry = integers(rng, T, D), integers(rng, V, D), integers(rng, T)
    c_out = integers(rng, spec.dp * V, D)

    def whole(rows, head):
        scores = rows @ head.T
        groups = scores.reshape(spec.dp, -1, V)
        out = jnp.einsum("gtV,gtD->gVD", groups, rows.reshape(spec.dp, -1, D))
        return (scores * (jnp.arange(V) + 1.0)[None, :]).sum(-1), out.reshape(-1, D)

    (carry, out), pull = jax.vjp(whole, rows, head)
    for got, want in zip(
        run(rows, head, c_carry, c_out), (carry, out, *pull((c_carry, c_out))), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_scan_without_outs():
    def shard(spec, head):
        count, out = scan_vocab_chunks(
            lambda n, chunk, ids: (n + ids.sum(), None), jnp.int32(0), head, 2, spec
        )
        assert out is None
        return count[None]

    run = compiled("ep4", shard, ROWS, BATCH)
    np.testing.assert_array_equal(run(np.zeros((V, D), np.float32)), [V * (V - 1) // 2] * 4)


@pytest.mark.parametrize("mesh", ["ep1", "ep8", "ep2x4"])
@pytest.mark.parametrize("n_local, most", [(12, 100), (12, 48), (12, 20), (13, 50), (2020, 8192)])
def test_n_vocab_chunks(mesh, n_local, most):
    spec = parse_mesh(mesh)
    fit = [n for n in range(1, n_local + 1) if n_local % n == 0 and n_local // n * spec.ep <= most]
    assert n_vocab_chunks(n_local, spec, most) == min(fit)


def test_n_vocab_chunks_when_one_row_per_rank_is_too_many():
    assert n_vocab_chunks(12, parse_mesh("ep8"), 4) == 12


CHUNKS = [("ep1", 8192, 1), ("ep1", 20, 3), ("ep4", 8192, 1), ("ep4", 20, 3), ("dp2,ep4", 12, 4)]
SHARES = ["some zeros", "one device zero", "all zero", "unequal"]


def share_of(name: str, rng) -> np.ndarray:
    mask = np.ones(T) if name == "unequal" else rng.uniform(size=T) < 0.6
    if name == "one device zero":
        mask[: T // 4] = 0
    if name == "all zero":
        mask[:] = 0
    weights = rng.uniform(size=T) if name == "unequal" else mask
    return (weights / max(weights.sum(), 1.0)).astype(np.float32)


@pytest.mark.parametrize("mesh, chunk_rows, n", CHUNKS)
def test_cross_entropy(mesh, chunk_rows, n, monkeypatch):
    """In one chunk and in several, with rows that do not count, and logits up to +-200."""
    spec = parse_mesh(mesh)
    monkeypatch.setattr(dsv3_jax.losses, "VOCAB_CHUNK", chunk_rows)
    assert n_vocab_chunks(V // spec.ep, spec, chunk_rows) == n

    def shard(spec, rows, head, labels, share):
        def loss_fn(rows, head):
            return cross_entropy(rows, head, labels, share, spec)

        loss, (d_rows, d_head) = jax.value_and_grad(loss_fn, argnums=(0, 1))(rows, head)
        return jax.lax.psum(loss, BATCH[0]), d_rows, over_dp(d_head)

    run = compiled(mesh, shard, (BATCH, ROWS, BATCH, BATCH), (REPLICATED, BATCH, ROWS))
    rng = np.random.default_rng(4)
    for name in SHARES:
        for size in (0.3, 3.0):
            rows, head = size * rng.normal(size=(T, D)), size * rng.normal(size=(V, D))
            rows, head = rows.astype(np.float32), head.astype(np.float32)
            labels, share = rng.integers(0, V, T, np.int32), share_of(name, rng)
            got = run(rows, head, labels, share)
            want = reference_cross_entropy(rows, head, labels, share)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1e-3, np.abs(b).max()))
            assert not np.asarray(got[1])[share == 0].any()


def test_cross_entropy_scales_its_gradient():
    """The cotangent of the loss is a factor of the gradients."""
    rng = np.random.default_rng(5)
    rows, head = rng.normal(size=(T, D)), rng.normal(size=(V, D))
    labels, share = rng.integers(0, V, T, np.int32), share_of("unequal", rng)
    rows, head = jnp.asarray(rows, jnp.float32), jnp.asarray(head, jnp.float32)

    def loss_fn(rows):
        return -7.0 * cross_entropy(rows, head, labels, share, parse_mesh("dp1"))

    want = -7.0 * reference_cross_entropy(rows, head, labels, share)[1]
    np.testing.assert_allclose(jax.grad(loss_fn)(rows), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mesh, chunk_rows, n", CHUNKS)
def test_token_log_probs(mesh, chunk_rows, n, monkeypatch):
    """Values, and gradients for a cotangent of every token, of both signs."""
    spec = parse_mesh(mesh)
    monkeypatch.setattr(dsv3_jax.losses, "VOCAB_CHUNK", chunk_rows)
    assert n_vocab_chunks(V // spec.ep, spec, chunk_rows) == n

    def shard(spec, rows, head, labels, cotangent):
        def log_probs(rows, head):
            return token_log_probs(rows, head, labels, spec)

        found, pull = jax.vjp(log_probs, rows, head)
        d_rows, d_head = pull(cotangent)
        return found, d_rows, over_dp(d_head)

    run = compiled(mesh, shard, (BATCH, ROWS, BATCH, BATCH), (BATCH, BATCH, ROWS))
    rng = np.random.default_rng(6)
    for size in (0.3, 3.0):
        rows, head = size * rng.normal(size=(T, D)), size * rng.normal(size=(V, D))
        rows, head = rows.astype(np.float32), head.astype(np.float32)
        labels, cotangent = rng.integers(0, V, T, np.int32), rng.normal(size=T).astype(np.float32)
        got = run(rows, head, labels, cotangent)
        want = reference_token_log_probs(rows, head, labels, cotangent)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_cross_entropy_is_a_weighted_sum_of_log_probs():
    """In value and gradient, to the rounding of float32."""
    rng, spec = np.random.default_rng(7), parse_mesh("dp1")
    rows, head = jnp.float32(rng.normal(size=(T, D))), jnp.float32(rng.normal(size=(V, D)))
    labels, share = rng.integers(0, V, T, np.int32), share_of("unequal", rng)

    def by_tokens(rows, head):
        return -(share * token_log_probs(rows, head, labels, spec)).sum()

    def at_once(rows, head):
        return cross_entropy(rows, head, labels, share, spec)

    got, want = (jax.jit(jax.value_and_grad(fn, (0, 1)))(rows, head) for fn in (by_tokens, at_once))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-7 * np.abs(b).max())
