"""Rotary position embedding on interleaved pairs, and its YaRN extension (report sec. 4.3)."""

import math

import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import AttentionConfig, YarnConfig
from dsv3_jax.shapes import Array, Float, Float32, Int


def frequencies(config: AttentionConfig) -> np.ndarray:
    """Return the angle in radians per token of each of the rope_dim / 2 pairs, float32.

    Under YaRN, pairs that rotate more than `beta_fast` times within the original length keep their
    frequency, those that rotate less than `beta_slow` times are slowed by `factor`, and those
    between are blended linearly. Source: YaRN (arXiv 2309.00071), sec. 3.2.
    """
    exponent = np.arange(0, config.rope_dim, 2, dtype=np.float64) / config.rope_dim
    base = config.rope_base**-exponent
    if config.yarn is None:
        return base.astype(np.float32)
    low, high = _blend_range(config, config.yarn)
    ramp = np.clip((np.arange(config.rope_dim // 2) - low) / (high - low), 0.0, 1.0)
    return (base / config.yarn.factor * ramp + base * (1.0 - ramp)).astype(np.float32)


def _blend_range(config: AttentionConfig, yarn: YarnConfig) -> tuple[float, float]:
    """Return the first and last pair of the blend: those of beta_fast and beta_slow rotations."""

    def pair_that_rotates(times: float) -> float:
        ratio = yarn.original_length / (times * 2 * math.pi)
        return config.rope_dim * math.log(ratio) / (2 * math.log(config.rope_base))

    low = max(math.floor(pair_that_rotates(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_rotates(yarn.beta_slow)), config.rope_dim - 1)
    return low, max(high, low + 0.001)


def mscale(factor: float, weight: float) -> float:
    """Return YaRN's attention temperature, 0.1 * weight * ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: AttentionConfig) -> float:
    """Return (nope + rope dims)^-1/2, times mscale^2 under YaRN."""
    scale = (config.nope_dim + config.rope_dim) ** -0.5
    if config.yarn is not None:
        scale *= mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def rotations(
    config: AttentionConfig, positions: Int[Array, "B T"]
) -> tuple[Float32[Array, "B T R"], Float32[Array, "B T R"]]:
    """Return cosine and sine of the angle of each position and rope dim (equal within a pair)."""
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies(config))[None, None]
    angle = jnp.repeat(angle, 2, axis=-1)
    magnitude = 1.0
    if config.yarn is not None:
        yarn = config.yarn
        magnitude = mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def rotate(
    x: Float[Array, "B H T R"], cos: Float32[Array, "B T R"], sin: Float32[Array, "B T R"]
) -> Float[Array, "B H T R"]:
    """Return x with each pair (2i, 2i+1) of the last dim rotated by its angle, in float32.

    The pairs are interleaved, as in the released weights. Neighbours are swapped with two rolls,
    which keeps the last dim whole.
    """
    x32 = x.astype(jnp.float32)
    even = (jnp.arange(x.shape[-1]) % 2 == 0)[None, None, None]
    swapped = jnp.where(even, -jnp.roll(x32, -1, axis=-1), jnp.roll(x32, 1, axis=-1))
    return (x32 * cos[:, None] + swapped * sin[:, None]).astype(x.dtype)
