"""The next token from its logits: greedy, or by temperature and nucleus."""

import dataclasses

import jax
import jax.numpy as jnp

from dsv3_jax.shapes import Array, Float32, Int, UInt32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: temperature 0 takes the likeliest, top_p 1 leaves none out."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or positive")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


GREEDY = Sampling()


def choose_tokens(
    logits: Float32[Array, "B V"],
    keys: UInt32[Array, "B 2"],
    place: Int[Array, " B"],
    sampling: Sampling,
) -> Int[Array, " B"]:
    """One token a row; a row's draws depend on its own key and place only."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = nucleus(logits / sampling.temperature, sampling.top_p)

    def draw(key, place, row):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), place)
        return jax.random.categorical(key, row).astype(jnp.int32)

    return jax.vmap(draw)(keys, place, logits)


def nucleus(logits: Float32[Array, "B V"], top_p: float) -> Float32[Array, "B V"]:
    """Logits with -inf outside of the fewest tokens whose probabilities reach `top_p`.

    Tokens as likely as the last of those stay. Source: arXiv 1904.09751, sec. 3.1.
    """
    if top_p == 1.0:
        return logits
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(ranked, axis=-1)
    needed = jnp.cumsum(probability, axis=-1) - probability < top_p  # what comes before is short
    least = jnp.where(needed, ranked, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
