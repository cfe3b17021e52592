"""Slow NumPy twins of the expert exchange, for experts that are one matrix each.

y_t = sum over k of w_tk M_{i_tk} x_t       (the routed half of report sec. 2.1.2, eq. 12)
"""

import jax.numpy as jnp
import numpy as np
from jax import lax


def expert_sum(matrices, rows, weights, ids):
    """[E O D], [T D], [T K], [T K] -> [T O], copy by copy over the experts."""
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


def n_rounds(ids, dp, nodes, ranks, n_experts, copies, rows):
    """How often the experts run in each node of each of the dp groups.

    Rows go to nodes, at most `rows` a round from each device to each, tokens in their order; from
    where they arrive their copies go to ranks, at most `copies` a round, the busiest way deciding.
    """
    out = []
    for group in ids.reshape(dp, nodes * ranks, -1, ids.shape[-1]):
        counts = {}  # (round to nodes, node, from rank, to rank) -> copies
        for device, tokens in enumerate(group):
            gone = np.zeros(nodes, int)
            for token in tokens:
                rank_of = token * nodes * ranks // n_experts
                for node in set(rank_of // ranks):
                    i = gone[node] // rows if nodes > 1 else 0
                    gone[node] += 1
                    for rank in rank_of[rank_of // ranks == node] % ranks:
                        way = (i, node, device % ranks, rank)
                        counts[way] = counts.get(way, 0) + 1
        outer = 1 + max(way[0] for way in counts)
        for node in range(nodes):  # once a round at least, for the first is always run
            ways = [[n for way, n in counts.items() if way[:2] == (i, node)] for i in range(outer)]
            out.append(sum(max(1, -(-max(n, default=0) // copies)) for n in ways))
    return np.array(out)


def emulated_ragged(x, output, begin, sent, there, received, *, axis_name):
    """`lax.ragged_all_to_all`, as its documentation says, of everything gathered everywhere."""
    del received  # it must be what the others send
    everyone = [lax.all_gather(part, axis_name) for part in (x, begin, sent, there)]
    me, size = lax.axis_index(axis_name), everyone[0].shape[0]
    n_slices = begin.size // size
    place = jnp.arange(output.shape[0])
    for peer in range(size):
        rows, *parts = (part[peer] for part in everyone)
        for i in range(n_slices):
            first, count, target = (part[me * n_slices + i] for part in parts)
            inside = (place >= target) & (place < target + count)
            moved = rows[jnp.clip(place - target + first, 0, rows.shape[0] - 1)]
            output = jnp.where(inside.reshape(-1, *[1] * (x.ndim - 1)), moved, output)
    return output
