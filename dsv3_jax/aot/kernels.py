"""The FLOPs of the custom kernels in our programs: those of the matmuls that they compute.

Under balanced routing, which the analysis assumes, the rows of a grouped matmul fill 1 /
capacity_factor of their buffer; the kernels skip the rest. FP8 kernels get the time of bfloat16
matmuls, although by the compiler's cycle counts they take longer (docs/results.md).
"""

import math

from dsv3_jax.aot.hlo import Instruction, Shape
from dsv3_jax.aot.op_cost import KERNELS, KernelFlops, Kernels
from dsv3_jax.numerics.kernels.attention_tpu import MAX_BLOCK


def kernels(capacity_factor: float = 1.0) -> Kernels:
    """Return the table for `op_cost`; on GPUs all kernels of ours are grouped matmuls.

    Args:
        capacity_factor: rows of a grouped matmul's buffer over the rows that are in it.
    """

    def gmm(call: Instruction, operands: list[Shape], results: list[Shape]) -> float:
        """Rows [r D] by weights [e D F], or transposed: [r D] by [r F] to gradients [e D F]."""
        rows, _ = [shape for shape in operands if len(shape.dims) > 1][-2:]
        return 2.0 * math.prod(rows.dims) * results[0].dims[-1] / capacity_factor

    def fp8_gmm(call: Instruction, operands: list[Shape], results: list[Shape]) -> float:
        """The same in FP8, where a dense matmul is one group and fills its buffer."""
        values = [shape for shape in operands if shape.dtype.startswith("f8")]
        rows = math.prod(values[0].dims) * results[0].dims[-1]
        n_groups = max(shape.dims[0] for shape in (*values, *results) if len(shape.dims) == 3)
        return 2.0 * rows / (capacity_factor if n_groups > 1 else 1.0)

    attention = {
        "fwd_residuals": _attention(1, 1),
        "fwd_no_residuals": _attention(1, 1),
        "dq_no_residuals": _attention(2, 1),
        "dkv_no_residuals": _attention(2, 2),
    }
    table = {f"splash_mha_{name}": kernel for name, kernel in attention.items()}
    free = dict.fromkeys(("ragged-dot-metadata", "swiglu_quantize"), lambda *_: 0.0)
    grouped = {"ragged-dot-none": gmm, "__gpu$xla.gpu.triton": gmm}
    grouped |= {"grouped_scaled_matmul": fp8_gmm, "grouped_fp8_wgrad": fp8_gmm}
    return {**KERNELS, **grouped, **table, **free}


def _attention(n_key_matmuls: int, n_value_matmuls: int) -> KernelFlops:
    """Return the FLOPs of a kernel with so many matmuls of scores by keys and by values."""

    def flops(call: Instruction, operands: list[Shape], results: list[Shape]) -> float:
        arrays = [shape for shape in operands if len(shape.dims) > 2 and shape.dtype[0] != "s"]
        q, k, v = arrays[:3]  # [... T D], with heads and perhaps sequences in front
        *heads, n_queries, key_dim = q.dims
        past = k.dims[-2] - n_queries
        pairs = n_queries * (past + (n_queries + min(MAX_BLOCK, n_queries)) / 2)
        dims = n_key_matmuls * key_dim + n_value_matmuls * v.dims[-1]
        return 2.0 * math.prod(heads) * pairs * dims

    return flops
