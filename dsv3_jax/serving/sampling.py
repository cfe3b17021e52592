"""The next token from its logits: greedy, or by temperature and top-p (nucleus) sampling."""

import dataclasses

import jax
import jax.numpy as jnp

from dsv3_jax.shapes import Array, Float32, Int, UInt32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The way tokens are drawn: temperature 0 takes the likeliest, top_p 1 leaves none out."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or positive")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


GREEDY = Sampling()


def sample(
    logits: Float32[Array, "B V"],
    keys: UInt32[Array, "B 2"],
    positions: Int[Array, " B"],
    sampling: Sampling,
) -> Int[Array, " B"]:
    """Return one token per row; the draw of a row depends on its own key and position only."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = top_p(logits / sampling.temperature, sampling.top_p)

    def draw(key, position, row):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), position)
        return jax.random.categorical(key, row).astype(jnp.int32)

    return jax.vmap(draw)(keys, positions, logits)


def top_p(logits: Float32[Array, "B V"], p: float) -> Float32[Array, "B V"]:
    """Return logits with -inf outside of the fewest tokens whose probabilities reach `p`.

    Tokens as likely as the least likely of them stay. Source: arXiv 1904.09751, sec. 3.1.
    """
    if p == 1.0:
        return logits
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(ranked, axis=-1)
    needed = jnp.cumsum(probability, axis=-1) - probability < p  # those before are too few
    least = jnp.where(needed, ranked, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
