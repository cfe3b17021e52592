"""Slow NumPy twins of the expert exchange, for experts that are one matrix each.

y_t = sum over k of w_tk M_{i_tk} x_t       (the routed half of report sec. 2.1.2, eq. 12)
"""

import numpy as np


def expert_sum(matrices, rows, weights, ids):
    """[E O D], [T D], [T K], [T K] -> [T O], pair by pair over the experts."""
    y = np.zeros((len(rows), matrices.shape[1]), rows.dtype)
    for expert, matrix in enumerate(matrices):
        for k in range(ids.shape[1]):
            mine = ids[:, k] == expert
            y[mine] += weights[mine, k, None] * (rows[mine] @ matrix.T)
    return y


def expert_sum_gradients(matrices, rows, weights, ids, cotangent):
    """Gradients of sum(y * cotangent) for matrices, rows and weights."""
    d_matrices, d_rows, d_weights = map(np.zeros_like, (matrices, rows, weights))
    for expert, matrix in enumerate(matrices):
        for k in range(ids.shape[1]):
            mine = ids[:, k] == expert
            x, w, c = rows[mine], weights[mine, k, None], cotangent[mine]
            d_matrices[expert] += (w * c).T @ x
            d_rows[mine] += w * (c @ matrix)
            d_weights[mine, k] += (c * (x @ matrix.T)).sum(-1)
    return d_matrices, d_rows, d_weights


def pair_counts(ids, dp, ep, n_experts):
    """Pairs [dp, from, to] between the ranks; rows lie over dp first, then over ep."""
    counts = np.zeros((dp, ep, ep), int)
    share = ids.reshape(dp, ep, -1, ids.shape[-1])
    for group in range(dp):
        for sender in range(ep):
            for expert in share[group, sender].flat:
                counts[group, sender, expert * ep // n_experts] += 1
    return counts


def n_rounds(ids, dp, ep, n_experts, capacity):
    """Rounds that each of the dp groups needs: its busiest pair of ranks decides."""
    busiest = pair_counts(ids, dp, ep, n_experts).max((1, 2))
    return -(-busiest // capacity)
