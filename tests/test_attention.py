"""Attention that begins at some place: padding on the left, and documents packed in a row.

Against a dense mask in NumPy (values) and in JAX (gradients). Tolerance: float32 1e-5 of the
largest value.
"""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from reference.cases import assert_close

from dsv3_jax.numerics.attention import causal_attention
from dsv3_jax.numerics.kernels import attention_ref, attention_tpu, pick

N_ROWS, N_HEADS, LENGTH, KEY_DIM, VALUE_DIM, SCALE = 2, 3, 11, 7, 5, 0.3
OWN = np.arange(LENGTH, dtype=np.int32)[None, :]
STARTS = {
    "left padding": np.minimum(np.array([[4], [0]], np.int32), OWN),
    "documents": np.array([[0, 0, 0, 3, 3, 3, 3, 7, 8, 8, 8], [0] * 6 + [6] * 5], np.int32),
    "only itself": np.tile(OWN, (N_ROWS, 1)),
    "a window": np.tile(np.maximum(OWN - 3, 0), (N_ROWS, 1)),
}


@functools.cache
def arrays() -> tuple[np.ndarray, ...]:
    """Queries, keys, values and a gradient of the output."""
    dims = (KEY_DIM, KEY_DIM, VALUE_DIM, VALUE_DIM)
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(N_ROWS, N_HEADS, LENGTH, d)).astype(np.float32) for d in dims)


def twin(q, k, v, doc_start):
    """Place by place: softmax over the keys from `doc_start` to the query's own place."""
    out = np.zeros(v.shape)
    for row, head, t in np.ndindex(N_ROWS, N_HEADS, LENGTH):
        past = slice(doc_start[row, t], t + 1)
        scores = SCALE * k[row, head, past].astype(float) @ q[row, head, t]
        weights = np.exp(scores - scores.max())
        out[row, head, t] = weights / weights.sum() @ v[row, head, past]
    return out


def dense(q, k, v, doc_start):
    """The same with a mask over all T x T products, for jax.grad."""
    place = jnp.arange(LENGTH)
    seen = (place[None, None, :] <= place[None, :, None]) & (
        place[None, None, :] >= doc_start[:, :, None]
    )
    scores = jnp.einsum("BHTK,BHSK->BHTS", q, k) * SCALE
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("BHTS,BHSO->BHTO", weights, v)


def values_and_gradients(attention):
    def both(q, k, v, grad, doc_start):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, doc_start), q, k, v)
        return out, *pull(grad)

    return jax.jit(both)


@functools.cache
def program(chunk: int, spans: int = 8):
    """`causal_attention` with queries taken `chunk` at a time, and its gradients."""

    def chunked(q, k, v, doc_start):
        with pytest.MonkeyPatch.context() as patch:  # in force while it is traced
            patch.setattr(attention_ref, "QUERY_CHUNK", chunk)
            patch.setattr(attention_ref, "SPANS", spans)
            return causal_attention(q, k, v, SCALE, doc_start)

    return values_and_gradients(chunked)


wanted = values_and_gradients(dense)


@pytest.mark.parametrize("how", [(512,), (4,), (1,), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", STARTS)
def test_start(name, how):
    """All at once, in chunks, and in loops over chunks: 5 and 5 of one place, 2, 2 of two."""
    got = program(*how)(*arrays(), STARTS[name])
    assert_close(got[0], twin(*arrays()[:3], STARTS[name]))
    for one, want in zip(got, wanted(*arrays(), STARTS[name]), strict=True):
        np.testing.assert_allclose(one, want, rtol=0, atol=1e-5)  # the largest are near 1


@pytest.mark.parametrize("chunk", [512, 4])
def test_start_of_zeros_is_none(chunk):
    zeros = np.zeros((N_ROWS, LENGTH), np.int32)
    run = program(chunk)
    for one, want in zip(run(*arrays(), zeros), run(*arrays(), None), strict=True):
        assert_close(one, want)


def test_documents_do_not_see_each_other():
    """Neither values nor gradients of one depend on what another holds."""
    q, k, v, grad = arrays()
    doc_start = STARTS["documents"]

    @jax.jit
    def both(k, v):
        out, pull = jax.vjp(lambda k, v: causal_attention(q, k, v, SCALE, doc_start), k, v)
        return out, *pull(grad)

    first, other = slice(0, 3), slice(3, None)  # of row 0
    changed = [np.where(np.arange(LENGTH)[None, None, :, None] < 3, 9.0, x) for x in (k, v)]
    for got, want in zip(both(*(np.float32(x) for x in changed)), both(k, v), strict=True):
        np.testing.assert_array_equal(got[0, :, other], want[0, :, other])
        assert np.abs(got - want)[0, :, first].max() > 1e-3


@pytest.mark.parametrize("n_queries", [128, 256])
@pytest.mark.parametrize("text", ["one", "documents", "left padding"])
def test_the_tpu_kernel(n_queries, text):
    """In interpret mode, equal to the reference, with queries for all keys or for the last half."""
    rng, n_keys, begins = np.random.default_rng(1), 256, None
    own = np.arange(n_keys, dtype=np.int32)[None, :]
    if text == "documents":
        begins = np.where(own < 70, 0, np.where(own < 200, 70, 200)) + np.zeros((2, 1), np.int32)
    elif text == "left padding":
        begins = np.minimum(np.array([[0], [130]], np.int32), own)
    dims = (n_queries, 24), (n_keys, 24), (n_keys, 16), (n_queries, 16)
    q, k, v, grad = (rng.normal(size=(2, 3, *dim)).astype(np.float32) for dim in dims)

    def both(attend):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, SCALE, begins), q, k, v)
        return out, *pull(grad)

    fused = functools.partial(attention_tpu.splash_attention, interpret=True)
    for got, want in zip(both(fused), both(attention_ref.attention), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("n_queries, n_keys", [(384, 384), (256, 640)])
def test_ready_made_blocks_of_the_mask(n_queries, n_keys):
    ours, plain = (
        mask((n_queries, n_keys), offset=n_keys - n_queries)
        for mask in (attention_tpu._CausalMask, splash_attention_mask.CausalMask)
    )
    for query, key in itertools.product(range(0, n_queries, 128), range(0, n_keys, 64)):
        block = (slice(query, query + 128), slice(key, key + 64))
        np.testing.assert_array_equal(ours[block], plain[block])


def test_where_the_tpu_kernel_is_used(monkeypatch):
    """On TPUs, unless a length is no multiple of 128."""
    monkeypatch.setattr(attention_tpu, "splash_attention", lambda *_: "kernel")
    monkeypatch.setattr(attention_ref, "attention", lambda *_: "reference")

    def used(n_queries, n_keys, platform):
        shapes = (n_queries, n_keys, n_keys)
        q, k, v = (np.zeros((1, 1, n, 4), np.float32) for n in shapes)
        attention = inspect.unwrap(pick.__wrapped__(platform).attention)
        return attention(q, k, v, 1.0, None)

    assert used(128, 256, "tpu") == "kernel"
    assert used(100, 256, "tpu") == used(128, 200, "tpu") == used(128, 256, "cpu") == "reference"
