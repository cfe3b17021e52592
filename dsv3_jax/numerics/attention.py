"""Causal attention: the contract that the kernels of every platform meet."""

from dsv3_jax.numerics.kernels import pick
from dsv3_jax.shapes import Array, Float, Int


def causal_attention(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B H S K"],
    v: Float[Array, "B H S O"],
    scale: float,
    doc_start: Int[Array, "B S"] | None = None,
    platform: str = "cpu",
) -> Float[Array, "B H T O"]:
    """Return softmax(q k^T * scale) v over the past, the softmax in float32.

    Queries are those of the last T of the S tokens of a sequence.

    Args:
        doc_start: position at which the document of each token begins, at most its own; None if 0.
            Attention leaves out keys before it: padding on the left, other documents of the row.
        platform: of the devices, which picks the kernel.
    """
    return pick(platform).attention(q, k, v, scale, doc_start)
