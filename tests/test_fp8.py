"""FP8 matmuls against a slow twin, golden C3, and what is saved for their backward."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference import fp8 as reference

from dsv3_jax.numerics.fp8 import Fp8Weight, GradTap, SavedInput, SwiGLUInput, fp8_matmul
from dsv3_jax.numerics.quantize import BLOCK, QuantizedTensor, quantize

# FP8 values are the same but where a float32 division lies on the other side of a tie; sums are
# in float32, the twin's in float64.
TOLERANCE = 1e-4  # of the largest value
SHAPES = [(40, 256, 384), (130, 200, 136), (7, 64, 40), (1, 128, 128)]


def weight_of(w) -> Fp8Weight:
    w = jnp.asarray(w, jnp.float32)
    return Fp8Weight(quantize(w, BLOCK), GradTap(jnp.zeros_like(w)))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(got, want, tolerance: float = TOLERANCE):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@functools.partial(jax.jit, static_argnums=0)
def run(save, x, w, grad, sizes=None):
    y, pull = jax.vjp(lambda x, w: fp8_matmul(save, x, w, sizes), x, w)
    d_x, d_w = pull(grad)
    return y, d_x, d_w.tap.weight


@pytest.mark.parametrize(
    "save", [SavedInput(), SavedInput(power_of_two=True), SavedInput(None, True, True)]
)
@pytest.mark.parametrize("rows, width, hidden", SHAPES)
def test_matmul_and_gradients_equal_the_twin(rows, width, hidden, save):
    x, w, grad = normal(0, rows, width), normal(1, width, hidden), normal(2, rows, hidden)
    x[:, :3] *= 50  # outliers
    y, d_x, d_w = run(save, x, weight_of(w), 1e-6 * grad)
    assert_close(y, reference.matmul(x, w, save.power_of_two))
    want = reference.gradients(x, w, 1e-6 * grad, save.power_of_two, save.e5m6)
    assert_close(d_x, want[0])
    assert_close(d_w, want[1])


def test_golden_matmul():
    """Activations and weights of golden C3 give its block-scaled matmul."""
    golden = dict(np.load(Path(__file__).parent / "goldens" / "C3_fp8_units" / "golden.npz"))
    values = golden["weight.bits_uint8"].view(ml_dtypes.float8_e4m3fn)
    w = Fp8Weight(QuantizedTensor(values.T, golden["weight.scale_inv"].T))
    got = fp8_matmul(SavedInput(), golden["act.x"], w)
    want = golden["gemm.out_float64acc"]
    row_max = np.abs(want).max(-1, keepdims=True)
    assert (np.abs(got - want) <= 1e-4 * row_max).all()


GROUPS = [[60, 0, 100, 40], [200, 0, 0, 0], [0, 0, 0, 0], [33, 50, 1, 70]]


@pytest.mark.parametrize("sizes", GROUPS)
def test_groups_equal_the_twin(sizes):
    """A tile of 128 rows may hold rows of two experts; what lies behind the groups is NaN."""
    x, w, grad = normal(0, 200, 130), normal(1, 4, 130, 200), normal(2, 200, 200)
    total, start = sum(sizes), 0
    x[total:] = grad[total:] = np.nan
    save = SavedInput(power_of_two=True)
    y, d_x, d_w = run(save, x, weight_of(w), grad, jnp.asarray(sizes, jnp.int32))
    x[total:] = grad[total:] = 0
    saved = reference.quantized(x, (1, 128), True)
    transposed = reference.quantized(saved, (128, 1), True), reference.quantized(grad, (128, 1))
    for i, size in enumerate(sizes):
        rows = slice(start, start := start + size)
        want = np.zeros((size, 130)) if not size else reference.gradients(x[rows], w[i], grad[rows])
        if size:
            assert_close(y[rows], reference.matmul(x[rows], w[i], True))
            assert_close(d_x[rows], want[0])
            assert_close(d_w[i], transposed[0][rows].T.astype(np.float64) @ transposed[1][rows])
        else:
            assert not np.asarray(d_w[i]).any()


def test_swiglu_is_computed_again_from_its_saved_input():
    """Forward from the input as it is, backward from what is saved of it in FP8."""
    hidden, gates, w = normal(0, 70, 2 * 136), normal(3, 70), normal(1, 136, 96)
    grad = normal(2, 70, 96)

    def f(hidden, gates, w):
        return fp8_matmul(SavedInput(), SwiGLUInput(hidden, gates), w)

    y, pull = jax.vjp(f, hidden, gates, weight_of(w))
    d_hidden, d_gates, d_w = pull(jnp.asarray(grad))
    assert_close(y, reference.matmul(reference.swiglu(hidden, gates), w))
    saved = reference.quantized(hidden, (1, 128))
    x = reference.swiglu(saved, gates).astype(np.float32)
    d_x = (
        reference.quantized(grad, (1, 128)).astype(np.float64)
        @ reference.quantized(w, (128, 128)).T
    )
    transposed = reference.quantized(x, (128, 1)), reference.quantized(grad, (128, 1))
    assert_close(d_w.tap.weight, transposed[0].T.astype(np.float64) @ transposed[1])
    gate, up = np.split(saved.astype(np.float64), 2, axis=1)
    sigmoid = 1 / (1 + np.exp(-gate))
    d_gated = d_x * gates[:, None]
    d_gate = d_gated * up * sigmoid * (1 + gate * (1 - sigmoid))
    assert_close(d_hidden, np.concatenate([d_gate, d_gated * gate * sigmoid], axis=1))
    assert_close(d_gates, (d_x * gate * sigmoid * up).sum(1))
