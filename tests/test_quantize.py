"""Block scaling against the published kernels' unit values (golden C3), a slow twin, and itself.

Tolerances of C3 are those of the goldens' manifest: dequantized values and rounding exact, scales
1e-6, at most 1 E4M3 value in 1000 off by one step.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.numerics.quantize import (
    BLOCK,
    TILE,
    QuantizedTensor,
    dequantize,
    quantize,
    requantize,
)

E4M3 = ml_dtypes.float8_e4m3fn
SMALL = (3, 5)  # a block whose sides differ, for shapes of two by three blocks
quantize_jit = jax.jit(quantize, static_argnums=(1, 2))
dequantize_jit = jax.jit(dequantize, static_argnums=(1, 2))
requantize_jit = jax.jit(requantize, static_argnums=1)


@functools.cache
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).parent / "goldens" / "C3_fp8_units" / "golden.npz"))


def of_bits(bits) -> np.ndarray:
    return np.asarray(bits, np.uint8).view(E4M3)


def bits_of(values) -> np.ndarray:
    return np.asarray(values).view(np.uint8)


def assert_values_close(got, want):
    """Bits of one sign follow the order of their values, so one step is a difference of 1."""
    step = np.abs(bits_of(got).astype(int) - want.astype(int))
    assert step.max() <= 1 and (step > 0).mean() <= 1e-3, f"{(step > 0).sum()} of {step.size}"


def assert_quantized_equal(got: QuantizedTensor, values, scale):
    np.testing.assert_array_equal(bits_of(got.values), bits_of(values))
    np.testing.assert_array_equal(np.asarray(got.scale).view(np.uint32), scale.view(np.uint32))


# Golden C3


@pytest.mark.parametrize("name, power_of_two", [("act", False), ("act_ue8m0", True)])
def test_activation_tiles(name, power_of_two):
    want = golden()
    got = quantize_jit(want[f"{name}.x"], TILE, power_of_two)
    rtol = 0 if power_of_two else 1e-6
    np.testing.assert_allclose(got.scale, want[f"{name}.scale"], rtol=rtol)
    assert_values_close(got.values, want[f"{name}.q_bits_uint8"])


def test_weight_blocks():
    """Read back exactly; written with amax / 448, and scale 1 where all is zero."""
    want = golden()
    read = QuantizedTensor(of_bits(want["weight.bits_uint8"]), want["weight.scale_inv"])
    np.testing.assert_array_equal(dequantize_jit(read, BLOCK), want["weight.dequant"])
    got = requantize_jit(want["weight.original"], BLOCK)
    np.testing.assert_allclose(got.scale, want["weight.scale_inv"], rtol=1e-6)
    assert_values_close(got.values, want["weight.bits_uint8"])


def test_matmul_of_dequantized():
    want = golden()
    x = dequantize_jit(quantize_jit(want["act.x"], TILE), TILE)
    w = dequantize_jit(requantize_jit(want["weight.original"], BLOCK), BLOCK)
    got = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    row_max = np.abs(want["gemm.out_float64acc"]).max(-1, keepdims=True)
    assert (np.abs(got - want["gemm.out_float64acc"]) <= 1e-4 * row_max).all()


def test_all_e4m3_values_and_their_rounding():
    want = golden()
    values = of_bits(np.arange(256)).reshape(1, 256)
    one = np.ones((1, 2), np.float32)
    got = dequantize_jit(QuantizedTensor(values, one), TILE)
    np.testing.assert_array_equal(got[0], want["e4m3fn.code_values"])
    x = np.concatenate([want["e4m3fn.round_in"], [448.0]]).astype(np.float32)  # 448: scale is 1
    got = quantize_jit(x[None], (1, x.size))
    assert got.scale == 1.0
    np.testing.assert_array_equal(bits_of(got.values)[0, :-1], want["e4m3fn.round_out_bits"])


# The slow twin


def reference_quantize(x: np.ndarray, block: tuple[int, int], power_of_two: bool):
    """Block by block, from the report's sec. 3.3.2 and DESIGN.md section 5."""
    rows, cols = (-(-n // size) for n, size in zip(x.shape[-2:], block, strict=True))
    values = np.zeros(x.shape, E4M3)
    scale = np.zeros((*x.shape[:-2], rows, cols), np.float32)
    for *batch, i, j in np.ndindex(scale.shape):
        where = (*batch, *(slice(k * n, (k + 1) * n) for k, n in zip((i, j), block, strict=True)))
        s = max(np.abs(x[where]).max(), np.float32(1e-4)) / np.float32(448)
        if power_of_two:
            s = np.float32(2.0 ** np.ceil(np.log2(np.float64(s))))
        scale[(*batch, i, j)] = s
        values[where] = (x[where] / s).astype(E4M3)
    return values, scale


def reference_dequantize(values: np.ndarray, scale: np.ndarray, block: tuple[int, int]):
    out = np.zeros(values.shape, np.float32)
    for *batch, i, j in np.ndindex(values.shape):
        s = scale[(*batch, i // block[0], j // block[1])]
        out[(*batch, i, j)] = np.float32(values[(*batch, i, j)]) * s
    return out


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    "shape, block",
    [
        ((2, 7, 13), SMALL),
        ((6, 15), SMALL),
        ((1, 1), BLOCK),
        ((2, 3, 4, 130), TILE),
        ((2, 131, 150), BLOCK),
        ((0, 256), TILE),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_twin(shape, block, power_of_two, dtype):
    """To the last bit: in bfloat16 many numbers lie half-way between two E4M3 values."""
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 6, size=shape), dtype)
    values, scale = reference_quantize(x.astype(np.float32), block, power_of_two)
    got = quantize_jit(x, block, power_of_two)
    assert_quantized_equal(got, values, scale)
    back = dequantize_jit(QuantizedTensor(values, scale), block)
    np.testing.assert_array_equal(back, reference_dequantize(values, scale, block))


# Properties


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_is_half_a_step(dtype, power_of_two):
    """Rounding to 3 bits of fraction is off by at most 1/17, or half of the least step, 2^-9."""
    x = jnp.asarray(np.random.default_rng(1).standard_cauchy(size=(4, 384)), dtype)
    got = quantize_jit(x, TILE, power_of_two)
    x = np.asarray(x, np.float32)
    error = np.abs(np.asarray(dequantize_jit(got, TILE)) - x)
    scale = np.repeat(np.asarray(got.scale), 128, axis=-1)
    assert (error <= np.maximum(np.abs(x) / 17, scale * 2.0**-10) * (1 + 1e-5)).all()
    amax = np.abs(x).reshape(4, 3, 128).max(-1)
    of_amax = error.reshape(4, 3, 128).max(-1) / amax
    assert (of_amax <= (1 / 17 if power_of_two else 1 / 28) * (1 + 1e-5)).all()


def test_power_of_two_scale_is_the_least_that_holds():
    """Also where amax / 448 is a power of two: with the next floats on both sides."""
    at = np.float32(448.0) * np.float32(2.0) ** np.arange(-20, 100, dtype=np.float32)
    for amax in (np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(np.inf))):
        scale = np.asarray(quantize_jit(amax[:, None], TILE, True).scale)[:, 0]
        assert (np.frexp(scale)[0] == 0.5).all()
        assert (448.0 * np.float64(scale) >= amax).all()
        assert (448.0 * np.float64(scale) / 2 < amax).all()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("x, scale", [(0.0, 1e-4 / 448), (1e-7, 1e-4 / 448), (-3e38, 3e38 / 448)])
def test_zeros_and_extremes_are_finite(x, scale, power_of_two):
    got = quantize_jit(jnp.full((2, 130), x, jnp.float32), TILE, power_of_two)
    assert (scale * 0.999 < got.scale).all() and (got.scale < scale * 2.001).all()
    np.testing.assert_allclose(dequantize_jit(got, TILE), x, rtol=1 / 17, atol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("write", [quantize_jit, lambda x, b: quantize_jit(x, b, True), requantize])
def test_nan_and_infinity_stay_visible(write, bad):
    """The whole block shows it; the others are not touched."""
    x = np.ones((6, 15), np.float32)
    x[4, 6] = bad
    back = np.asarray(dequantize_jit(write(x, SMALL), SMALL))
    block = np.zeros(x.shape, bool)
    block[3:6, 5:10] = True
    np.testing.assert_array_equal(np.isnan(back), block)
    np.testing.assert_allclose(back[~block], 1.0, rtol=1 / 17)


def test_dequantize_rounds_once():
    """To bfloat16 from the float32 product, not from a product of bfloat16 numbers."""
    rng = np.random.default_rng(2)
    values = of_bits(rng.integers(0, 126, size=(6, 15)))
    scale = rng.uniform(1, 2, size=(2, 3)).astype(np.float32)
    want = reference_dequantize(values, scale, SMALL).astype(ml_dtypes.bfloat16)
    got = dequantize_jit(QuantizedTensor(values, scale), SMALL, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got), want)


def test_scale_of_a_wrong_shape_is_refused():
    values = of_bits(np.zeros((6, 15)))
    with pytest.raises(ValueError, match=r"scale has shape \(3, 2\).*needs \(2, 3\)"):
        dequantize(QuantizedTensor(values, np.ones((3, 2), np.float32)), SMALL)
    with pytest.raises(ValueError, match=r"scale has shape \(3, 2\).*needs \(2, 3\)"):
        requantize(np.ones((6, 15), np.float32), SMALL, np.ones((3, 2), np.float32))


# Export: the values and scales that weights were dequantized from


def random_quantized(seed: int, shape=(2, 7, 13), block=SMALL) -> QuantizedTensor:
    """Return all finite values, with +-448 and 1 (to tell neighbouring scales apart) per block."""
    rng = np.random.default_rng(seed)
    magnitude = rng.integers(0, 127, size=shape)
    magnitude[..., :: block[0], :: block[1]] = 126  # 448, first of its block
    magnitude[..., :: block[0], 1 :: block[1]] = 56  # 1.0, the second
    values = of_bits(magnitude + 128 * rng.integers(0, 2, size=shape))
    blocks = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return QuantizedTensor(values, (10.0 ** rng.uniform(-12, 4, size=blocks)).astype(np.float32))


@pytest.mark.parametrize("seed", range(20))
def test_float32_weights_give_back_values_and_scales(seed):
    made = random_quantized(seed, shape=(2, 8, 14))
    w = dequantize_jit(made, SMALL)
    assert_quantized_equal(requantize_jit(w, SMALL), *made)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_known_scale_gives_back_any_values(seed, dtype):
    made = random_quantized(seed)
    values = np.array(made.values)
    values[np.abs(values.astype(np.float32)) > 100] = 3.5  # so no block reaches 448
    values[0, :3, :5] = 0
    w = dequantize_jit(QuantizedTensor(values, made.scale), SMALL, dtype)
    assert_quantized_equal(requantize_jit(w, SMALL, made.scale), values, made.scale)


def test_golden_weights_give_back_values_and_scales():
    want = golden()
    got = requantize_jit(want["weight.dequant"], BLOCK)
    assert_quantized_equal(got, of_bits(want["weight.bits_uint8"]), want["weight.scale_inv"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_trained_blocks_leave_their_known_scale(dtype):
    """One element of one block grew: that block is quantized anew, the others keep their values."""
    made = random_quantized(3)
    w = np.array(dequantize_jit(made, SMALL, dtype))
    w[1, 4, 7] = 1.3 * np.abs(w[1, 3:6, 5:10]).max()
    got = requantize_jit(w, SMALL, made.scale)
    fresh = requantize_jit(w, SMALL)
    unchanged = np.ones(made.scale.shape, bool)
    unchanged[1, 1, 1] = False
    np.testing.assert_array_equal(np.asarray(got.scale)[unchanged], made.scale[unchanged])
    assert got.scale[1, 1, 1] == fresh.scale[1, 1, 1] != made.scale[1, 1, 1]
    amax = np.abs(w[1, 3:6, 5:10].astype(np.float32)).max()
    assert got.scale[1, 1, 1] == amax / np.float32(448)
    error = np.abs(np.asarray(dequantize_jit(got, SMALL)) - w.astype(np.float32))[1, 3:6, 5:10]
    assert 0 < error.max() <= amax / 28 * (1 + 1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.0, np.nan, np.inf, 1e30, 1e-30])
def test_useless_known_scale_is_not_used(scale):
    w = np.random.default_rng(4).normal(size=(7, 13)).astype(np.float32)
    got = requantize_jit(w, SMALL, np.full((3, 3), scale, np.float32))
    assert_quantized_equal(got, *map(np.asarray, requantize_jit(w, SMALL)))


@pytest.mark.parametrize("x", [0.0, 1e-38, -3e-36])
def test_weights_too_small_for_a_scale_become_zero(x):
    got = requantize_jit(jnp.full((3, 5), x, jnp.float32), SMALL)
    assert got.scale == 1.0 and not dequantize_jit(got, SMALL).any()


@pytest.mark.parametrize("block", [TILE, BLOCK, (128, 1)])
def test_a_nan_takes_its_whole_block_in_large_arrays(block):
    """XLA's maximum of floats loses a NaN on CPUs, from 16 rows on."""
    x = np.ones((256, 256), np.float32)
    x[100, 200] = np.nan
    got = np.array(dequantize_jit(quantize_jit(x, block), block))
    rows, cols = (slice(i // n * n, i // n * n + n) for i, n in zip((100, 200), block, strict=True))
    assert np.isnan(got[rows, cols]).all()
    got[rows, cols] = 1.0
    np.testing.assert_array_equal(got, 1.0)
