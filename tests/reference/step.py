"""Slow float64 NumPy twins of pieces of the training step."""

import numpy as np


def cross_entropy(rows, head, labels, share):
    """sum_t share_t * -log softmax(head rows_t)[label_t], and its gradients for rows and head."""
    rows, head, share = (np.asarray(x, np.float64) for x in (rows, head, share))
    logits = rows @ head.T
    shifted = logits - logits.max(-1, keepdims=True)
    probability = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    token = np.arange(len(labels))
    loss = (share * (np.log(np.exp(shifted).sum(-1)) - shifted[token, labels])).sum()
    d_logits = share[:, None] * probability
    d_logits[token, labels] -= share
    return loss, d_logits @ head, d_logits.T @ rows


def token_log_probs(rows, head, labels, cotangent):
    """log softmax(head rows_t)[label_t], and the gradients for rows and head of a cotangent."""
    one_row = (
        cross_entropy(rows[t : t + 1], head, labels[t : t + 1], [1]) for t in range(len(rows))
    )
    losses, d_rows, d_head = zip(*one_row, strict=True)
    cotangent = np.asarray(cotangent, np.float64)
    d_rows = -cotangent[:, None] * np.concatenate(d_rows)
    return -np.array(losses), d_rows, -np.einsum("t,tvd->vd", cotangent, np.array(d_head))


def updated_bias(bias, load, rate):
    """b_i + gamma if expert i had less than the mean load, b_i - gamma if more (sec. 2.1.2)."""
    out = np.array(bias, np.float64)
    for layer, experts in enumerate(np.asarray(load, np.float64)):
        for expert, tokens in enumerate(experts):
            if tokens < experts.mean():
                out[layer, expert] += rate
            elif tokens > experts.mean():
                out[layer, expert] -= rate
    return out
