"""The kernels of each platform, and the one place that picks them.

Every operation that has a kernel somewhere has a portable reference in XLA operations
(`attention_ref`, `gmm_ref`, `fp8_ref`, `swiglu_ref`), which defines its result: a kernel differs
from it in rounding alone. A row below names the function that each platform runs, the reference
where it has no kernel; all functions of a column take the same arguments. A new kernel is a file
`OPERATION_PLATFORM.py`, an entry in its platform's row, and its name in `dsv3_jax/aot/kernels.py`.

The kernels of a platform are imported when they are first asked for, so that a program imports no
other platform's.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple


class Kernels(NamedTuple):
    """The functions of one platform; `transposed` means the transposes of the weights.

    `sizes` counts the rows of each group, of rows sorted by group (as in a MoE layer's experts);
    rows beyond the last group may hold anything, and results are unspecified there.
    """

    attention: Callable  # (q, k, v, scale, doc_start) -> o, as `numerics.attention`
    gmm: Callable  # (rows [r D], weights [e D F], sizes, transposed) -> [r F]
    tgmm: Callable  # (rows [r D], grad [r F], sizes, dtype) -> [e D F], rows^T grad of each group
    scaled_matmul: Callable  # (x [r D] in tiles, w [D F] in blocks, dtype, transposed) -> [r F]
    grouped_scaled_matmul: Callable  # (x, w [e D F], sizes, dtype, transposed) -> [r F]
    fp8_wgrad: Callable  # (x [r D], grad [r F], both in transposed tiles) -> float32 [D F]
    grouped_fp8_wgrad: Callable  # (x, grad, sizes) -> float32 [e D F]
    swiglu_quantize: Callable  # (hidden [r 2F], gates [r] | None) -> SwiGLU's output in tiles


@functools.cache
def pick(platform: str) -> Kernels:
    """Return the kernels for devices of a platform ("tpu", "gpu" or "cuda", else the reference)."""
    match platform:
        case "tpu":
            return _tpu()
        case "gpu" | "cuda":
            return _gpu()
    return _reference()


def _reference() -> Kernels:
    from dsv3_jax.numerics.kernels import attention_ref, fp8_ref, gmm_ref, swiglu_ref

    return Kernels(
        attention=attention_ref.attention,
        gmm=gmm_ref.gmm,
        tgmm=gmm_ref.tgmm,
        scaled_matmul=fp8_ref.scaled_matmul,
        grouped_scaled_matmul=fp8_ref.grouped_scaled_matmul,
        fp8_wgrad=fp8_ref.fp8_wgrad,
        grouped_fp8_wgrad=fp8_ref.grouped_fp8_wgrad,
        swiglu_quantize=swiglu_ref.swiglu_quantize,
    )


def _tpu() -> Kernels:
    from dsv3_jax.numerics.kernels import attention_tpu, fp8_tpu, fp8_wgrad_tpu, gmm_tpu, swiglu_tpu

    return Kernels(
        attention=attention_tpu.attention,
        gmm=gmm_tpu.gmm,
        tgmm=gmm_tpu.tgmm,
        scaled_matmul=fp8_tpu.scaled_matmul,
        grouped_scaled_matmul=fp8_tpu.grouped_scaled_matmul,
        fp8_wgrad=fp8_wgrad_tpu.fp8_wgrad,
        grouped_fp8_wgrad=fp8_wgrad_tpu.grouped_fp8_wgrad,
        swiglu_quantize=swiglu_tpu.swiglu_quantize,
    )


def _gpu() -> Kernels:
    from dsv3_jax.numerics.kernels import fp8_gpu, gmm_gpu

    return _reference()._replace(
        gmm=gmm_gpu.gmm,
        tgmm=gmm_gpu.tgmm,
        scaled_matmul=fp8_gpu.scaled_matmul,
        grouped_scaled_matmul=fp8_gpu.grouped_scaled_matmul,
        grouped_fp8_wgrad=fp8_gpu.grouped_fp8_wgrad,
    )
