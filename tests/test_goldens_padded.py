"""Parity with transformers on padded rows: logits of all that is no padding, and losses.

Positions count the padding. The manifest's tolerances: logits 2e-4 + 1e-4 relative (3e-4 for the
dequantised B1), loss 2e-5.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference.goldens import CASES, assert_close, golden, model_of

from dsv3_jax.losses import cross_entropy
from sharding.layout import Layout
from sharding.mesh import MeshSpec

PADDED = [(case, 2e-4) for case in CASES] + [("B1_fp8", 3e-4)]


@nnx.jit
def logits_and_loss(model, tokens, real, doc_start):
    """Logits, and the mean over pairs of which both tokens are real."""
    hidden, _ = model.hidden_states(tokens, doc_start=doc_start)
    share = (real[:, :-1] & real[:, 1:]).reshape(-1).astype(jnp.float32)
    rows = hidden[:, :-1].reshape(share.size, -1)
    labels = tokens[:, 1:].reshape(-1)
    loss = cross_entropy(rows, model.head[...], labels, share / share.sum(), MeshSpec())
    return model.logits(hidden, Layout()), loss


def first_seen(real: np.ndarray) -> np.ndarray:
    """Every place sees its row from the first real token on, or from itself if it is padding."""
    own = np.arange(real.shape[1], dtype=np.int32)[None, :]
    return np.minimum(real.argmax(1).astype(np.int32)[:, None], own)


@functools.cache
def run(case: str, side: str, fill: int | None = None):
    want, model = golden(case), model_of(case)
    real = want[f"{side}pad.attention_mask"].astype(bool)
    tokens = want[f"{side}pad.input_ids"]
    tokens = tokens if fill is None else np.where(real, tokens, fill).astype(np.int32)
    logits, loss = logits_and_loss(model, tokens, real, first_seen(real))
    return np.asarray(logits)[real], float(loss)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case, atol", PADDED)
def test_padded_rows(case, atol, side):
    want = golden(case)
    real = want[f"{side}pad.attention_mask"].astype(bool)
    assert real[0].all() and not real[1].all()
    logits, loss = run(case, side)
    assert_close(logits, want[f"{side}pad.logits"][real], atol=atol)
    np.testing.assert_allclose(loss, want[f"{side}pad.loss"][0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_padding_holds_does_not_matter(side):
    """Bit for bit."""
    for one, other in zip(run("A1_basic", side), run("A1_basic", side, fill=7), strict=True):
        np.testing.assert_array_equal(one, other)


def test_right_padding_needs_no_start():
    want = golden("A1_basic")
    real = want["rightpad.attention_mask"].astype(bool)
    np.testing.assert_array_equal(first_seen(real), 0)
    logits = nnx.jit(lambda model, tokens: model(tokens))
    got = logits(model_of("A1_basic"), want["rightpad.input_ids"])
    assert_close(np.asarray(got)[real], want["rightpad.logits"][real])
