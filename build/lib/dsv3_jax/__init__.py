"""DeepSeek-V3 in JAX and Flax: train, post-train and serve on TPU and GPU."""

from dsv3_jax.weights.pretrained import load_pretrained
from dsv3_jax.weights.save import save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
