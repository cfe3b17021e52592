"""The layers of DeepSeek-V3 in NumPy float64, one token, head or expert at a time.

Written from the report (arXiv 2412.19437, sec. 2.1, 2.2, 4.3) to be read, not to be run fast.
Matrices are [in, out]; every function takes one sequence, of T rows.
"""

import math

import numpy as np


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def silu(x):
    return x / (1.0 + np.exp(-x))


def swiglu(x, gate, up, down):
    return (silu(x @ gate) * (x @ up)) @ down


def softmax(x):
    raised = np.exp(x - x.max())
    return raised / raised.sum()


def rope_frequencies(dim, base, yarn=None):
    """Radians a token of each pair of dims (2i, 2i + 1).

    YaRN: pairs up to the last one that turns `beta_fast` times within the original length keep
    their frequency; from the first that turns at most `beta_slow` times on it is divided by the
    factor; between them the one goes over into the other linearly in the number of the pair.
    """
    own = [base ** (-2 * pair / dim) for pair in range(dim // 2)]
    if yarn is None:
        return np.array(own)

    def turns(pair):
        return yarn.original_length * base ** (-2 * pair / dim) / (2 * math.pi)

    fast = [pair for pair in range(dim) if turns(pair) >= yarn.beta_fast]
    slow = [pair for pair in range(dim) if turns(pair) <= yarn.beta_slow]
    first, last = max(fast, default=0), min(slow, default=dim - 1)
    out = []
    for pair, frequency in enumerate(own):
        slowed = min(max((pair - first) / max(last - first, 0.001), 0.0), 1.0)
        out.append(slowed * frequency / yarn.factor + (1.0 - slowed) * frequency)
    return np.array(out)


def rope(x, positions, frequencies):
    """Pairs (2i, 2i + 1) of x [T, dim] as complex numbers, turned by position * frequency."""
    out = np.empty_like(x)
    for t, position in enumerate(positions):
        turned = (x[t, 0::2] + 1j * x[t, 1::2]) * np.exp(1j * position * frequencies)
        out[t, 0::2], out[t, 1::2] = turned.real, turned.imag
    return out


def softmax_scale(a):
    scale = 1.0 / math.sqrt(a.nope_dim + a.rope_dim)
    if a.yarn is None:
        return scale
    return scale * (0.1 * math.log(a.yarn.factor) + 1.0) ** 2  # mscale = mscale_all_dim = 1


def mla(h, positions, w, a, eps):
    """Attention of h [T, D] (equations 1 to 11); `a` holds the sizes, `w` the weights by name.

    `w["q_up"]` and `w["kv_up"]` have a head's dims side by side: [nope; rope] and [nope; value].
    """
    frequencies = rope_frequencies(a.rope_dim, a.rope_base, a.yarn)
    c_kv = rms_norm(h @ w["kv_down"][:, : a.kv_rank], w["kv_norm"], eps)
    k_rope = rope(h @ w["kv_down"][:, a.kv_rank :], positions, frequencies)  # one for all heads
    c_q = h if a.q_rank is None else rms_norm(h @ w["q_down"], w["q_norm"], eps)
    q_dim, kv_dim = a.nope_dim + a.rope_dim, a.nope_dim + a.value_dim
    heads = []
    for head in range(a.n_heads):
        q = c_q @ w["q_up"][:, head * q_dim : (head + 1) * q_dim]
        kv = c_kv @ w["kv_up"][:, head * kv_dim : (head + 1) * kv_dim]
        q_nope, q_rope = q[:, : a.nope_dim], rope(q[:, a.nope_dim :], positions, frequencies)
        k_nope, v = kv[:, : a.nope_dim], kv[:, a.nope_dim :]
        out = np.zeros((len(h), a.value_dim))
        for t in range(len(h)):
            scores = [q_nope[t] @ k_nope[j] + q_rope[t] @ k_rope[j] for j in range(t + 1)]
            out[t] = softmax(np.array(scores) * softmax_scale(a)) @ v[: t + 1]
        heads.append(out)
    return np.concatenate(heads, axis=1) @ w["out"]


def affinities(h, router):
    return 1.0 / (1.0 + np.exp(-(h @ router)))


def route(scores, bias, m):
    """The experts of one token and their gate values, from its affinities [E]: {expert: gate}."""
    biased = scores + bias
    size = m.n_experts // m.n_groups
    members = [range(g * size, (g + 1) * size) for g in range(m.n_groups)]
    worth = [sum(sorted((biased[i] for i in group), reverse=True)[:2]) for group in members]
    best_groups = sorted(range(m.n_groups), key=lambda g: -worth[g])[: m.topk_groups]
    reachable = [i for g in best_groups for i in members[g]]
    chosen = sorted(reachable, key=lambda i: -biased[i])[: m.top_k]
    total = sum(scores[i] for i in chosen) if m.normalize else 1.0
    return {i: m.scale * scores[i] / total for i in chosen}


def moe(h, w, m):
    """Shared experts, and the routed ones that each token of h [T, D] chooses (equation 12)."""
    y = np.zeros_like(h)
    for t, token in enumerate(h):
        if m.n_shared:
            y[t] += swiglu(token, w["shared_gate"], w["shared_up"], w["shared_down"])
        for expert, gate in route(affinities(token, w["router"]), w["bias"], m).items():
            y[t] += gate * swiglu(token, w["gate"][expert], w["up"][expert], w["down"][expert])
    return y


def sequence_balance(scores, chosen, top_k):
    """sum_i f_i P_i of one sequence (equations 17 to 20), without alpha.

    Args:
        scores: affinities [T, E].
        chosen: for each token the experts it goes to.
    """
    length, n_experts = scores.shape
    loss = 0.0
    for expert in range(n_experts):
        count = sum(expert in experts for experts in chosen)
        f = n_experts / (top_k * length) * count
        p = sum(scores[t, expert] / scores[t].sum() for t in range(length)) / length
        loss += f * p
    return loss


def moe_block(x, positions, w, a, m, eps):
    """A decoder block: h = x + attention(norm(x)), then h + experts(norm(h))."""
    h = x + mla(rms_norm(x, w["attention_norm"], eps), positions, w, a, eps)
    return h + moe(rms_norm(h, w["ffn_norm"], eps), w, m)


def mtp(hidden, embedded, positions, w, a, m, eps):
    """One MTP module (equations 21 to 23) with its final norm: M [norm(h); norm(Emb)], block.

    M comes as two matrices, so that the order of the two halves is the caller's affair.
    """
    joined = rms_norm(hidden, w["hidden_norm"], eps) @ w["join_hidden"]
    joined = joined + rms_norm(embedded, w["embedding_norm"], eps) @ w["join_embedding"]
    return rms_norm(moe_block(joined, positions, w, a, m, eps), w["norm"], eps)


def mtp_chain(hidden, tokens, embedding, modules, a, m, eps):
    """Hidden states of each depth, for the positions that have all the tokens they need.

    Depth k joins position i with token i + k, so each depth is one position shorter; its head
    predicts token i + k + 1.
    """
    out = []
    for k, w in enumerate(modules, 1):
        hidden = hidden[: len(tokens) - k]
        embedded = np.stack([embedding[tokens[i + k]] for i in range(len(hidden))])
        hidden = mtp(hidden, embedded, np.arange(len(hidden)), w, a, m, eps)
        out.append(hidden)
    return out


def cross_entropy(hidden, head, labels, mask):
    """Mean of -log softmax(head hidden)[label] over the rows of the mask."""
    terms = [
        -np.log(softmax(head @ row)[label])
        for row, label, counts in zip(hidden, labels, mask, strict=True)
        if counts
    ]
    return sum(terms) / len(terms)
