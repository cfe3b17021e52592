"""The GPU's grouped matmul: its steps on the CPU, and what the compiler for an H100 makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.grouped import assert_close, grouped_matmuls

from dsv3_jax.aot.compile import gpu_devices
from dsv3_jax.numerics.kernels import gmm_gpu
from dsv3_jax.numerics.kernels.gmm_gpu import gmm, tgmm

WIDTH, HIDDEN = 70, 150  # no multiples of a tile, and several tiles
CASES = {
    "balanced": (300, [75, 75, 75, 75]),
    "uneven": (300, [130, 1, 159, 10]),
    "empty groups": (300, [0, 190, 0, 110]),
    "empty ends": (300, [0, 120, 180, 0]),
    "all in the first": (300, [300, 0, 0, 0]),
    "all in the last": (300, [0, 0, 0, 300]),
    "whole tiles": (320, [64, 128, 0, 128]),
    "rows left over": (300, [70, 0, 101, 64]),
    "all rows left over": (300, [0, 0, 0, 0]),
    "two whole tiles a group": (300, [256, 44]),
    "few rows": (20, [9, 0, 4, 7]),
    "fewer rows than a tile": (5, [2, 0, 3, 0]),
    "one row": (1, [0, 0, 1, 0]),
    "more groups than rows": (11, [0, 1, 0, 0, 3, 0, 0, 1, 0, 0, 2, 0, 0, 0, 4, 0]),
    "two bands": (900, [500, 300, 90]),  # the tile before the second runs after it
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative to the largest value


def inputs(case: str, dtype: str = "float32", width: int = WIDTH, hidden: int = HIDDEN):
    """Rows, weights, gradient of the output and sizes; NaN in what lies behind the groups."""
    n_rows, sizes = CASES[case]
    rng = np.random.default_rng(0)
    shapes = (n_rows, width), (len(sizes), width, hidden), (n_rows, hidden)
    rows, weights, grad = (rng.normal(size=shape) for shape in shapes)
    rows[sum(sizes) :] = grad[sum(sizes) :] = np.nan
    arrays = (jnp.asarray(x, dtype) for x in (rows, weights, grad))
    return *arrays, jnp.asarray(sizes, jnp.int32)


@jax.jit
def run(rows, weights, grad, sizes):
    out = gmm(rows, weights, sizes, interpret=True)
    d_rows = gmm(grad, weights, sizes, transposed=True, interpret=True)
    return out, d_rows, tgmm(rows, grad, sizes, interpret=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_matches_a_loop(case, dtype):
    arrays = inputs(case, dtype)
    out, d_rows, d_weights = run(*arrays)
    assert out.dtype == d_rows.dtype == dtype and d_weights.dtype == jnp.float32
    want = grouped_matmuls(*arrays)
    inside = slice(sum(CASES[case][1]))
    assert_close(out[inside], want[0][inside], TOLERANCE[dtype])
    assert_close(d_rows[inside], want[1][inside], TOLERANCE[dtype])
    assert_close(d_weights, want[2], 1e-5)  # of the narrow inputs, summed in float32


@pytest.mark.parametrize("width, hidden", [(64, 256), (128, 3), (1, 512), (130, 64)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_widths(width, hidden, dtype):
    """Whole tiles of one or both, whose masks are left out, and less than a tile."""
    arrays = inputs("rows left over", dtype, width, hidden)
    inside = slice(sum(CASES["rows left over"][1]))  # of the groups, all of which it holds
    for got, want in zip(run(*arrays), grouped_matmuls(*arrays), strict=True):
        assert_close(got[inside], want[inside], TOLERANCE[dtype])


def test_tgmm_in_the_dtype_asked_for():
    rows, _, grad, sizes = arrays = inputs("uneven", "bfloat16")
    got = tgmm(rows, grad, sizes, dtype=jnp.bfloat16, interpret=True)
    assert got.dtype == jnp.bfloat16
    assert_close(got, grouped_matmuls(*arrays)[2], 2e-2)  # bfloat16


@pytest.mark.parametrize("case", CASES)
def test_row_tiles_cover_every_row_once(case):
    n_rows, sizes = CASES[case]
    for tile in (16, 128):
        found = gmm_gpu.row_tiles(jnp.asarray(sizes, jnp.int32), n_rows, tile)
        covered, n_tiles = np.full(n_rows, -1), 0
        for expert, start, stop in zip(*map(np.asarray, found), strict=True):
            rows = np.arange(start, min(start + tile, stop))
            assert (covered[rows] == -1).all() and not found.start.size % gmm_gpu.BAND
            covered[rows] = expert
            n_tiles += len(rows) > 0
        want = np.repeat(np.arange(len(sizes)), sizes)
        np.testing.assert_array_equal(
            covered, np.pad(want, (0, n_rows - len(want)), constant_values=-1)
        )
        assert n_tiles == sum(-(-size // tile) for size in sizes)  # the work is that of the rows


def test_widths_that_differ_are_refused():
    rows, weights, _, sizes = inputs("few rows")
    with pytest.raises(ValueError, match="weights of width 150 don't meet rows of width 70"):
        gmm(rows, weights, sizes, transposed=True, interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gmm", "transposed", "tgmm"])
def test_compiles_for_an_h100(name, tmp_path):
    """One kernel on the tensor cores, no copy of a matrix, no matmul of XLA's beside it."""
    pytest.importorskip("jax_cuda13_plugin")
    here = jax.sharding.SingleDeviceSharding(gpu_devices(1, 1)[0])
    n_rows, width, hidden, n_groups = 600, 256, 512, 3

    def given(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    rows, grad = given(n_rows, width), given(n_rows, hidden)
    weights, sizes = given(n_groups, width, hidden), given(n_groups, dtype=jnp.int32)
    function, *arguments = {
        "gmm": (gmm, rows, weights, sizes),
        "transposed": (functools.partial(gmm, transposed=True), grad, weights, sizes),
        "tgmm": (tgmm, rows, grad, sizes),
    }[name]
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    program = jax.jit(function).lower(*arguments).compile(compiler_options=options)
    text = program.as_text()
    assert text.count('custom_call_target="') == 1
    assert 'custom_call_target="__gpu$xla.gpu.triton"' in text
    assert " dot(" not in text and " while(" not in text
    assert program.memory_analysis().temp_size_in_bytes < 2**14  # which tile lies in which group
    assert any("wgmma.mma_async" in path.read_text() for path in tmp_path.glob("*.ptx"))
