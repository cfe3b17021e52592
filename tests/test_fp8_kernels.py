"""The TPU's FP8 kernels: their steps on the CPU, and what the compilers for TPUs make of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.grouped import assert_close

from dsv3_jax.aot.compile import ENVIRONMENT
from dsv3_jax.numerics.kernels.fp8_tpu import grouped_scaled_matmul, scaled_matmul, tile_schedule
from dsv3_jax.numerics.kernels.fp8_wgrad_tpu import fp8_wgrad, grouped_fp8_wgrad
from dsv3_jax.numerics.kernels.swiglu_tpu import swiglu_quantize
from dsv3_jax.numerics.quantize import BLOCK, TILE, TILE_T, QuantizedTensor, dequantize, quantize

EXACT = 1e-5  # of the largest value: both sum in float32 or wider
N_ROWS = 600  # of the buffer: one shape, so one compilation
GROUPS = {
    "balanced": [128, 128, 128, 128, 88],
    "straddling": [130, 1, 199, 60, 210],
    "empty groups": [0, 190, 0, 110, 0],
    "rows left over": [70, 0, 101, 64, 1],
    "all in the last": [0, 0, 0, 0, 600],
    "all rows left over": [0, 0, 0, 0, 0],
}


def scaled(
    seed: int, shape: tuple[int, ...], block: tuple[int, int]
) -> tuple[QuantizedTensor, np.ndarray]:
    """Numbers whose blocks differ much in size, and the same in float64."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(size=(*shape[:-2], shape[-2], -(-shape[-1] // 64))))
    x = rng.normal(size=shape) * np.repeat(size, 64, axis=-1)[..., : shape[-1]]
    found = quantize(jnp.asarray(x, jnp.float32), block)
    return found, np.asarray(dequantize(found, block), np.float64)


def spoiled(x: QuantizedTensor, n_rows: int, block: tuple[int, int]) -> QuantizedTensor:
    """NaN in all rows from `n_rows` on, and in the scales of tiles that hold no others."""
    tile = -(-n_rows // block[0])
    return QuantizedTensor(x.values.at[n_rows:].set(jnp.nan), x.scale.at[tile:].set(jnp.nan))


def repeated(x: QuantizedTensor, axis: int, n: int) -> QuantizedTensor:
    """Blocks twice as long along the axis, as two blocks of the usual length; n of those there."""
    return QuantizedTensor(
        x.values, jnp.repeat(x.scale, 2, axis)[(slice(None),) * axis + (slice(n),)]
    )


def transpose(w: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(w.values.mT, w.scale.mT)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def matmul(x, w, dtype=jnp.float32, transposed=False, depth=128):
    return scaled_matmul(x, w, dtype, transposed, interpret=True, depth=depth)


@functools.partial(jax.jit, static_argnums=(3,))
def grouped_matmul(x, w, sizes, transposed=False):
    return grouped_scaled_matmul(x, w, sizes, jnp.float32, transposed, interpret=True)


@jax.jit
def wgrad(x, g):
    return fp8_wgrad(x, g, interpret=True)


@jax.jit
def grouped_wgrad(x, g, sizes):
    return grouped_fp8_wgrad(x, g, sizes, interpret=True)


@pytest.mark.parametrize(
    "rows, width, columns",
    [(256, 384, 128), (200, 300, 140), (1, 128, 257), (7, 1152, 3)],
)
def test_matmul(rows, width, columns):
    (x, wide_x), (w, wide_w) = scaled(0, (rows, width), TILE), scaled(1, (width, columns), BLOCK)
    want = wide_x @ wide_w
    assert_close(matmul(x, w), want, EXACT)
    assert_close(matmul(x, transpose(w), transposed=True), want, EXACT)


def test_blocks_of_256():
    """Where neighbours along the sum have the same scale, it is that of both."""
    (x, wide_x), (w, wide_w) = scaled(0, (140, 300), (1, 256)), scaled(1, (300, 200), (256, 128))
    x, w = repeated(x, 1, 3), repeated(w, 0, 3)
    assert_close(matmul(x, w, depth=256), wide_x @ wide_w, EXACT)
    assert_close(matmul(x, transpose(w), jnp.float32, True, 256), wide_x @ wide_w, EXACT)


def test_matmul_in_the_dtype_asked_for():
    (x, wide_x), (w, wide_w) = scaled(0, (130, 256), TILE), scaled(1, (256, 128), BLOCK)
    got = matmul(x, w, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    assert_close(got, wide_x @ wide_w, 2**-8)  # half a step of bfloat16


@pytest.mark.parametrize("n, width, columns", [(256, 128, 384), (300, 130, 200), (1, 128, 70)])
def test_wgrad(n, width, columns):
    (x, wide_x), (g, wide_g) = scaled(0, (n, width), TILE_T), scaled(1, (n, columns), TILE_T)
    assert_close(wgrad(x, g), wide_x.T @ wide_g, EXACT)


@pytest.mark.parametrize("case", GROUPS)
def test_grouped(case):
    """Each group is a matmul of its own; NaN beyond the last does not matter."""
    sizes, width, columns = GROUPS[case], 200, 300
    inside = sum(sizes)
    x, wide_x = scaled(0, (N_ROWS, width), TILE)
    w, wide_w = scaled(1, (len(sizes), width, columns), BLOCK)
    group = np.repeat(np.arange(len(sizes)), sizes)
    want = np.einsum("rD,rDF->rF", wide_x[:inside], wide_w[group])
    x, n = spoiled(x, inside, TILE), jnp.asarray(sizes, jnp.int32)
    assert_close(grouped_matmul(x, w, n)[:inside], want, EXACT)
    assert_close(grouped_matmul(x, transpose(w), n, transposed=True)[:inside], want, EXACT)


@pytest.mark.parametrize("case", GROUPS)
def test_grouped_wgrad(case):
    """Tiles are those of the buffer and may hold rows of several groups; empty groups get 0."""
    sizes = GROUPS[case]
    inside = sum(sizes)
    (x, wide_x), (g, wide_g) = scaled(0, (N_ROWS, 130), TILE_T), scaled(1, (N_ROWS, 300), TILE_T)
    one = (np.arange(len(sizes))[:, None] == np.repeat(np.arange(len(sizes)), sizes)).astype(float)
    want = np.einsum("er,rD,rF->eDF", one, wide_x[:inside], wide_g[:inside], optimize=True)
    x, g = (spoiled(part, inside, TILE_T) for part in (x, g))
    assert_close(grouped_wgrad(x, g, jnp.asarray(sizes, jnp.int32)), want, EXACT)


@pytest.mark.parametrize("rows", [128, 512])
@pytest.mark.parametrize("case", GROUPS)
def test_every_row_is_visited_once(case, rows):
    sizes = GROUPS[case]
    schedule, n_visits = tile_schedule(jnp.asarray(sizes, jnp.int32), N_ROWS, rows)
    times = np.zeros((len(sizes), N_ROWS), int)
    for group, tile, start, stop in list(zip(*map(np.asarray, schedule), strict=True))[:n_visits]:
        times[group, max(start, tile * rows) : min(stop, (tile + 1) * rows)] += 1
    want = np.arange(len(sizes))[:, None] == np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(times[:, : sum(sizes)], want)
    assert not times[:, sum(sizes) :].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(bad):
    """It spoils its tile, and so a row of the result; nothing beside it."""
    x = np.ones((200, 256), np.float32)
    x[7, 130] = bad
    w, _ = scaled(1, (256, 140), BLOCK)
    got = np.asarray(matmul(quantize(jnp.asarray(x), TILE), w))
    assert np.isnan(got[7]).all() and np.isfinite(np.delete(got, 7, axis=0)).all()
    g, _ = scaled(2, (200, 140), TILE_T)
    got = np.asarray(wgrad(quantize(jnp.asarray(x), TILE_T), g))
    assert np.isnan(got[130]).all() and np.isfinite(np.delete(got, 130, axis=0)).all()


def test_widths_that_differ_are_refused():
    (x, _), (w, _) = scaled(0, (4, 70), TILE), scaled(1, (70, 150), BLOCK)
    with pytest.raises(ValueError, match="weights of width 150 don't meet rows of width 70"):
        scaled_matmul(x, w, jnp.float32, transposed=True, interpret=True)
    with pytest.raises(ValueError, match="4 rows of x don't meet 70 of grad"):
        fp8_wgrad(x, w, interpret=True)


def activation(hidden, gates):
    gate, up = jnp.split(hidden.astype(jnp.float32), 2, axis=1)
    y = jax.nn.silu(gate) * up
    return y if gates is None else y * gates[:, None]


swiglu_in_a_program = jax.jit(functools.partial(swiglu_quantize, interpret=True))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows, width", [(300, 256), (37, 140), (5, 64)])
def test_swiglu_quantize(rows, width, dtype):
    """Codes and scales of `quantize`. Gates from 32 on are their own silu: nothing is rounded."""
    rng = np.random.default_rng(0)
    hidden = rng.integers(-64, 64, size=(rows, 2 * width))
    hidden[:, :width] = np.abs(hidden[:, :width]) + 32
    hidden, gates = jnp.asarray(hidden, dtype), jnp.asarray(rng.integers(1, 9, rows) / 8, "float32")
    for weights in (None, gates):
        want = quantize(activation(hidden, weights), TILE)
        got = swiglu_in_a_program(hidden, weights)
        for part, wanted in zip(got, want, strict=True):
            assert part.dtype == wanted.dtype
            np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (part, wanted)))


def test_swiglu_quantize_of_any_numbers():
    """The activation may be rounded differently in its last bit, and a few FP8 values with it."""
    rng = np.random.default_rng(0)
    hidden, gates = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((300, 512), (300,)))
    want = quantize(activation(hidden, gates), TILE)
    got = swiglu_in_a_program(hidden, gates)
    np.testing.assert_allclose(got.scale, want.scale, rtol=1e-6)
    values, wanted = (np.asarray(x.values, np.float32) for x in (got, want))
    assert (values != wanted).mean() < 1e-4
    np.testing.assert_allclose(values, wanted, rtol=1 / 8)  # one E4M3 value apart
    bad = hidden.at[7, 130].set(jnp.nan).at[8, 300].set(jnp.inf)
    found = np.asarray(dequantize(swiglu_in_a_program(bad, gates), TILE))
    assert np.isnan(found[7, 130]) and np.isnan(found[8, :128]).all()
    assert np.isfinite(np.delete(found, (7, 8), axis=0)).all()


@pytest.mark.parametrize("topology", ["tpu7x:2x2x1", "v5p:2x2x1"])
def test_compiles_for_tpus(topology, monkeypatch):
    """One kernel each, whose operands are E4M3."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    here = jax.sharding.SingleDeviceSharding(device)

    def quantized(shape, block):
        rows, cols = (-(-n // size) for n, size in zip(shape[-2:], block, strict=True))
        return QuantizedTensor(given(shape, jnp.float8_e4m3fn), given((*shape[:-2], rows, cols)))

    def given(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    x, w, sizes = (
        quantized((256, 384), TILE),
        quantized((3, 384, 256), BLOCK),
        given((3,), jnp.int32),
    )
    transposed_tiles = quantized((256, 384), TILE_T), quantized((256, 256), TILE_T)
    programs = {
        "grouped_scaled_matmul": (grouped_scaled_matmul, (x, w, sizes, jnp.bfloat16)),
        "grouped_fp8_wgrad": (grouped_fp8_wgrad, (*transposed_tiles, sizes)),
        "swiglu_quantize": (swiglu_quantize, (given((256, 512), jnp.bfloat16), None)),
    }
    for name, (function, arguments) in programs.items():
        static = tuple(i for i, x in enumerate(arguments) if not isinstance(x, tuple | type(sizes)))
        text = jax.jit(function, static_argnums=static).lower(*arguments).compile().as_text()
        (call,) = (line for line in text.splitlines() if "tpu_custom_call" in line)
        assert name in call and "f8e4m3fn[" in call
