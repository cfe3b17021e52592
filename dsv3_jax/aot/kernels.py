"""FLOPs of the custom kernels in our programs: those of the products that they make.

Under balanced routing, which the tunnel assumes, the rows of a ragged product fill 1 / capacity of
their buffer; kernels skip the rest. Products in FP8 count as others do and are given the time of
bfloat16's, though by the compiler's cycles their kernels take longer (README).
"""

import math

from dsv3_jax.aot.hlo import Instruction, Shape
from dsv3_jax.aot.work import KERNELS, Kernels
from dsv3_jax.numerics.attention import KERNEL_BLOCK


def kernels(capacity: float = 1.0) -> Kernels:
    """The table for `work.work`; on GPUs all kernels of ours are grouped products.

    Args:
        capacity: rows of a ragged product's buffer over those that are there.
    """

    def ragged(call: Instruction, operands: list[Shape], results: list[Shape]) -> float:
        """Rows [r D] by weights [e D F], or transposed [r D] by [r F] to gradients [e D F]."""
        rows, _ = [shape for shape in operands if len(shape.dims) > 1][-2:]
        return 2.0 * math.prod(rows.dims) * results[0].dims[-1] / capacity

    def scaled(call: Instruction, operands: list[Shape], results: list[Shape]) -> float:
        """The same in FP8, where a dense product is one group, and fills its buffer."""
        codes = [shape for shape in operands if shape.dtype.startswith("f8")]
        rows = math.prod(codes[0].dims) * results[0].dims[-1]
        n_groups = max(shape.dims[0] for shape in (*codes, *results) if len(shape.dims) == 3)
        return 2.0 * rows / (capacity if n_groups > 1 else 1.0)

    attention = {
        "fwd_residuals": _attention(products=(1, 1)),
        "fwd_no_residuals": _attention(products=(1, 1)),
        "dq_no_residuals": _attention(products=(2, 1)),
        "dkv_no_residuals": _attention(products=(2, 2)),
    }
    table = {f"splash_mha_{name}": kernel for name, kernel in attention.items()}
    free = dict.fromkeys(("ragged-dot-metadata", "swiglu_quantize"), lambda *_: 0.0)
    grouped = {"ragged-dot-none": ragged, "__gpu$xla.gpu.triton": ragged}
    grouped |= {"grouped_scaled_matmul": scaled, "grouped_fp8_wgrad": scaled}
    return {**KERNELS, **grouped, **table, **free}


def _attention(products: tuple[int, int]):
    """So many products of scores with keys' dims, and with values' dims."""

    def flops(call: Instruction, operands: list[Shape], results: list[Shape]) -> float:
        arrays = [shape for shape in operands if len(shape.dims) > 2 and shape.dtype[0] != "s"]
        q, k, v = arrays[:3]  # [... T D], with heads and perhaps sequences in front
        *heads, n_queries, key_dim = q.dims
        past = k.dims[-2] - n_queries
        pairs = n_queries * (past + (n_queries + min(KERNEL_BLOCK, n_queries)) / 2)
        return 2.0 * math.prod(heads) * pairs * (products[0] * key_dim + products[1] * v.dims[-1])

    return flops
