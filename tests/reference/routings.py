"""Routings that break exchanges, and what is exchanged: small integers and one matrix an expert."""

import jax
import jax.numpy as jnp
import numpy as np

T, K, E, D, O = 88, 3, 24, 5, 4  # noqa: E741 - the letters of shapes.py


def integers(rng, *sizes):
    return rng.integers(-3, 4, sizes).astype(np.float32)


def pick(rng, probability, n=T):
    """Ids [n K], distinct within a row, drawn with the given probability of each expert."""
    noise = rng.gumbel(size=(n, E)) + np.log(np.maximum(probability, 1e-30))
    return np.argsort(-noise, axis=-1)[:, :K].astype(np.int32)


def only(experts):
    return np.isin(np.arange(E), experts).astype(float)


def adversarial(rng) -> dict[str, np.ndarray]:
    """Ids [T K] of routings that break exchanges; random in what the name leaves open."""
    tokens = np.arange(T)
    one, rank, node = rng.integers(E), rng.integers(8), rng.integers(2)
    to_one = pick(rng, 1.0 - only([one]))
    to_one[:, rng.integers(K)] = one
    lonely = pick(rng, only(range(3)))
    lonely[rng.integers(T)] = [E - 1, 0, E // 2]
    same = np.tile(pick(rng, np.ones(E), 1), (T, 1))
    own_rank = tokens[:, None] // 11 * 3 + np.argsort(rng.uniform(size=(T, K)), axis=-1)
    zipf = (1.0 / np.arange(1, E + 1) ** 1.5)[rng.permutation(E)]
    half = np.where(tokens[:, None] < T // 2, own_rank % 3, pick(rng, np.ones(E)))
    return {
        "one expert": to_one,
        "the same K experts": same,
        "one rank": pick(rng, only(np.arange(3) + 3 * rank)),
        "one node": pick(rng, only(np.arange(12) + 12 * node)),
        "the last rank": pick(rng, only(np.arange(E - 3, E))),
        "one token elsewhere": lonely,
        "empty ranks": pick(rng, only(rng.permutation(E)[: E // 4])),
        "odd experts": pick(rng, only(np.arange(1, E, 2))),
        "every token at home": own_rank.astype(np.int32),
        "every token next door": ((own_rank + 3) % E).astype(np.int32),
        "round robin": (tokens[:, None] * K + np.arange(K)[None, :]).astype(np.int32) % E,
        "sorted tokens": np.sort(pick(rng, np.ones(E)), axis=0),
        "half of the devices crowd": half.astype(np.int32),
        "zipf": pick(rng, zipf),
    }


def apply_matrices(matrices, rows, weights, sizes):
    """weight * M_expert row of rows grouped by expert; zero beyond the last group."""
    experts = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side="right")
    gates = jax.nn.one_hot(experts, matrices.shape[0]) * weights[:, None]
    return jnp.einsum("re,rD,eOD->rO", gates, rows, matrices)
