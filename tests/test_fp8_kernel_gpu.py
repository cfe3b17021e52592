"""The GPU's FP8 matmul: its steps on the CPU, and what the compiler makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.aot.compile import gpu_devices
from dsv3_jax.numerics.kernels.fp8_gpu import grouped_scaled_matmul, scaled_matmul
from dsv3_jax.numerics.quantize import BLOCK, TILE, QuantizedTensor, dequantize, quantize

CASES = {
    "uneven": (300, [130, 1, 159, 10]),
    "empty groups": (256, [0, 190, 0, 66]),
    "few rows": (20, [9, 0, 4, 3]),
}


def inputs(case: str, width: int, hidden: int):
    """Rows, weights and gradient in FP8; rows behind the groups are NaN."""
    n_rows, sizes = CASES[case]
    rng = np.random.default_rng(0)
    shapes = (n_rows, width), (len(sizes), width, hidden), (n_rows, hidden)
    rows, weights, grad = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    rows[:, ::37] *= 100
    rows[sum(sizes) :] = grad[sum(sizes) :] = np.nan
    return (
        quantize(jnp.asarray(rows), TILE),
        quantize(jnp.asarray(weights), BLOCK),
        quantize(jnp.asarray(grad), TILE),
        jnp.asarray(sizes, jnp.int32),
    )


@pytest.mark.parametrize("width, hidden", [(256, 384), (200, 150), (70, 130)])
@pytest.mark.parametrize("case", CASES)
def test_matches_a_loop(case, width, hidden):
    rows, weights, grad, sizes = inputs(case, width, hidden)
    w, n = np.float64(dequantize(weights, BLOCK)), sum(CASES[case][1])
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for x, transposed in ((rows, False), (grad, True)):
        got = grouped_scaled_matmul(x, weights, sizes, jnp.float32, transposed, interpret=True)
        exact = np.float64(dequantize(x, TILE))
        want = np.stack([exact[i] @ (w[g].T if transposed else w[g]) for i, g in enumerate(groups)])
        np.testing.assert_allclose(got[:n], want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_a_dense_matmul_is_one_group():
    rows, weights, _, _ = inputs("empty groups", 256, 384)
    one = QuantizedTensor(*(x[2] for x in weights))
    got = scaled_matmul(rows, one, jnp.bfloat16, interpret=True)
    want = np.float64(dequantize(rows, TILE)) @ np.float64(dequantize(one, BLOCK))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(got), want, rtol=0, atol=2e-2 * np.abs(want).max())


def test_widths_that_differ_are_refused():
    rows, weights, _, sizes = inputs("few rows", 128, 256)
    with pytest.raises(ValueError, match="weights of width 256 don't meet rows of width 128"):
        grouped_scaled_matmul(rows, weights, sizes, jnp.float32, True, interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_compiles_for_an_h100(transposed, tmp_path):
    """One kernel on the tensor cores, and no float32 copy of a matrix."""
    pytest.importorskip("jax_cuda13_plugin")
    here = jax.sharding.SingleDeviceSharding(gpu_devices(1, 1)[0])

    def given(*shape, dtype=jnp.float8_e4m3fn):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    n_rows, width, n_groups = 512, 512, 2
    scales = functools.partial(given, dtype=jnp.float32)
    x = QuantizedTensor(given(n_rows, width), scales(n_rows, 4))
    w = QuantizedTensor(given(n_groups, width, width), scales(n_groups, 4, 4))
    function = functools.partial(grouped_scaled_matmul, dtype=jnp.bfloat16, transposed=transposed)
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    lowered = jax.jit(function).lower(x, w, given(n_groups, dtype=jnp.int32))
    text = lowered.compile(compiler_options=options).as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1
    assert " dot(" not in text and "f32[2,512,512]" not in text
    assert any("mma.sync" in path.read_text() for path in tmp_path.glob("*.ptx"))
