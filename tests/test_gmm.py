"""Grouped matmul against a loop over groups: values and both gradients, whatever the sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.grouped import assert_close, grouped_matmuls

from dsv3_jax.numerics.gmm import grouped_matmul
from dsv3_jax.numerics.kernels.gmm_ref import _block_sizes

WIDTH, HIDDEN = 6, 5
CASES = {
    "balanced": (700, [175, 175, 175, 175]),
    "uneven": (700, [300, 1, 389, 10]),
    "empty groups": (700, [0, 450, 0, 250]),
    "empty ends": (700, [0, 320, 380, 0]),
    "all in the first": (700, [700, 0, 0, 0]),
    "all in the last": (700, [0, 0, 0, 700]),
    "whole blocks": (700, [256, 128, 0, 316]),
    "rows left over": (700, [130, 0, 257, 64]),
    "all rows left over": (700, [0, 0, 0, 0]),
    "few rows": (20, [9, 0, 4, 7]),
    "few rows, some left over": (20, [3, 0, 9, 4]),
    "one row": (1, [0, 0, 1, 0]),
    "whole blocks of 8": (32, [8, 16, 0, 8]),
    "parts of blocks of 8": (32, [9, 0, 17, 3]),
    "parts of blocks of 64": (200, [63, 1, 65, 64]),
    "fewer rows than 8": (5, [2, 0, 3, 0]),
    "7 rows, some left over": (7, [0, 4, 0, 1]),
    "more groups than rows": (11, [0, 1, 0, 0, 3, 0, 0, 1, 0, 0, 2, 0, 0, 0, 4, 0]),
    "more than all groups balanced": (1300, [2, 1290, 3, 1]),
    "blocks of every size": (2100, [512 + 256 + 128 + 64, 1, 1023, 65]),
}


def inputs(n_rows: int, n_groups: int):
    rng = np.random.default_rng(0)
    shapes = (n_rows, WIDTH), (n_groups, WIDTH, HIDDEN), (n_rows, HIDDEN)
    return [rng.normal(size=shape) for shape in shapes]


@functools.partial(jax.jit, static_argnums=4)
def run(rows, weights, grad, sizes, platform="cpu"):
    def matmul(rows, weights):
        return grouped_matmul(rows, weights, sizes, platform)

    out, pull = jax.vjp(matmul, rows, weights)
    return out, *pull(grad)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("case", CASES)
def test_matches_a_loop(case, platform):
    """The reference, and the ragged dot of TPUs, which XLA expands on the CPU."""
    n_rows, sizes = CASES[case]
    arrays = inputs(n_rows, len(sizes))
    want = grouped_matmuls(*arrays, sizes)
    wide = (jnp.asarray(x, jnp.float32) for x in arrays)
    out, d_rows, d_weights = run(*wide, jnp.asarray(sizes, jnp.int32), platform)
    inside = slice(sum(sizes))
    assert_close(out[inside], want[0][inside], 1e-5)  # float32
    assert_close(d_rows[inside], want[1][inside], 1e-5)
    assert_close(d_weights, want[2], 1e-5)


@pytest.mark.parametrize(
    "n_rows, sizes",
    [
        (1, [1]),
        (7, [7]),
        (8, [8]),
        (36, [16, 24, 32]),
        (200, [64, 96, 128]),
        (700, [64, 96, 128, 192, 256, 384, 512]),
        (9999, [64, 96, 128, 192, 256, 384, 512]),
    ],
)
def test_blocks_grow_from_a_balanced_group_to_512(n_rows, sizes):
    """From 8 at least, from 64 at most; never more than there are rows."""
    assert _block_sizes(n_rows, 4) == sizes


@pytest.mark.parametrize("case", ["uneven", "rows left over", "few rows", "fewer rows than 8"])
def test_bfloat16(case):
    n_rows, sizes = CASES[case]
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(n_rows, len(sizes))]
    want = grouped_matmuls(*arrays, sizes)
    got = run(*arrays, jnp.asarray(sizes, jnp.int32))
    for one, other in zip(got, want, strict=True):
        assert one.dtype == jnp.bfloat16
        assert_close(one, other, 2e-2)  # bfloat16


def test_bfloat16_weight_gradient_is_summed_wide():
    """3000 equal terms: a sum held in bfloat16 stops growing at 256 ones."""
    n_rows = 3000
    ones = jnp.ones((n_rows, WIDTH), jnp.bfloat16), jnp.ones((2, WIDTH, HIDDEN), jnp.bfloat16)
    grad = jnp.ones((n_rows, HIDDEN), jnp.bfloat16)
    _, _, d_weights = run(*ones, grad, jnp.array([2999, 1], jnp.int32))
    assert_close(d_weights[0], np.full((WIDTH, HIDDEN), 2999.0), 2.0**-8)  # one rounding at the end
    assert_close(d_weights[1], np.ones((WIDTH, HIDDEN)), 0.0)


def test_what_is_left_over_does_not_matter():
    """Rows beyond the last group may hold anything, as may their part of the gradient."""
    n_rows, sizes = CASES["rows left over"]
    rows, weights, grad = (np.float32(x) for x in inputs(n_rows, len(sizes)))
    sizes = jnp.asarray(sizes, jnp.int32)
    want = run(rows, weights, grad, sizes)
    rows[sizes.sum() :], grad[sizes.sum() :] = 1e6, -1e6
    out, d_rows, d_weights = run(rows, weights, grad, sizes)
    np.testing.assert_array_equal(out[: sizes.sum()], want[0][: sizes.sum()])
    np.testing.assert_array_equal(d_rows[: sizes.sum()], want[1][: sizes.sum()])
    np.testing.assert_array_equal(d_weights, want[2])


def test_under_a_scan_of_stacked_weights():
    """As in the model: layer after layer, with gradients through all of them."""
    rng, (n_rows, sizes) = np.random.default_rng(1), CASES["few rows, some left over"]
    rows = rng.normal(size=(n_rows, WIDTH))
    stacked = rng.normal(size=(2, len(sizes), WIDTH, WIDTH))

    def loss(rows, stacked):
        def layer(x, weights):
            return grouped_matmul(x, weights, jnp.asarray(sizes)), None

        return jnp.square(jax.lax.scan(layer, rows, stacked)[0]).sum()

    narrow = rows.astype(np.float32), stacked.astype(np.float32)
    d_rows, d_stacked = jax.jit(jax.grad(loss, argnums=(0, 1)))(*narrow)
    zero = np.zeros_like(rows)
    first = grouped_matmuls(rows, stacked[0], zero, sizes)[0]
    second = grouped_matmuls(first, stacked[1], zero, sizes)[0]
    _, d_first, d_second_weights = grouped_matmuls(first, stacked[1], 2 * second, sizes)
    _, want_rows, d_first_weights = grouped_matmuls(rows, stacked[0], d_first, sizes)
    assert_close(d_rows, want_rows, 1e-5)
    assert_close(d_stacked[0], d_first_weights, 1e-5)
    assert_close(d_stacked[1], d_second_weights, 1e-5)
