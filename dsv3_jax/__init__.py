"""DeepSeek-V3 in JAX and Flax."""
