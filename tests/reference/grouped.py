"""A slow NumPy twin of grouped products, for every backend of them."""

import numpy as np


def grouped_matmuls(rows, weights, grad, sizes):
    """Output and gradients of rows and weights, one row at a time; 0 for what is left over."""
    rows, weights, grad = (np.asarray(x, np.float64) for x in (rows, weights, grad))
    out, d_rows, d_weights = np.zeros_like(grad), np.zeros_like(rows), np.zeros_like(weights)
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            out[row] = rows[row] @ weights[group]
            d_rows[row] = weights[group] @ grad[row]
            d_weights[group] += np.outer(rows[row], grad[row])
            row += 1
    return out, d_rows, d_weights


def assert_close(got, want, tolerance):
    """Within `tolerance` of the largest value."""
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max(initial=1.0))
