"""FP8 in layers and steps: sharded weights, what is saved for the backward, counts, bad input.

FP8 values answer a difference in the last bit of a float32 sum by a step of 1/16, now and then, and
the next layer has one more difference to answer. So a whole model on a mesh equals the one on a
single device to the noise of FP8 itself, a few per cent of a gradient; what is in one layer alone
is compared closely.
"""

import dataclasses
import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import fp8 as reference
from reference import small_step

from configs import load_preset
from dsv3_jax.config import Config
from dsv3_jax.config_cli import override
from dsv3_jax.hardware import has_fp8_units
from dsv3_jax.layer_scan import scan
from dsv3_jax.model.block import MoEBlock
from dsv3_jax.model.layers import SwiGLU
from dsv3_jax.numerics.fp8 import Fp8Weight
from dsv3_jax.numerics.quant_stats import QuantStats
from dsv3_jax.numerics.quantize import BLOCK, quantize
from dsv3_jax.params import (
    all_gather_params,
    map_params,
    named_arrays,
    param_specs,
    quantize_params,
    zero_quant_stats,
)
from dsv3_jax.training.evaluation import OPERANDS, fp8_fractions, make_fp8_stats
from dsv3_jax.training.plots import plot_fp8
from dsv3_jax.training.step import loss_and_gradients
from sharding.layout import Layout
from sharding.mesh import BATCH, REPLICATED, make_mesh, manual_region, parse_mesh

WIDTH, HIDDEN = 136, 200  # a whole block and a part of one
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def layer() -> SwiGLU:
    return SwiGLU(WIDTH, HIDDEN, 0.1, rngs=nnx.Rngs(0))


def mesh_of(text: str):
    spec = parse_mesh(text)
    return make_mesh(spec, jax.devices()[: spec.n_data_shards]), spec


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("mesh_text", ["dp4,ep2", "dp2,ep2x2", "dp8"])
def test_values_of_shards_are_those_of_the_whole(mesh_text, zero):
    """Shares of 17 and 25 rows: blocks lie on several devices, and devices hold parts of two."""
    mesh, spec = mesh_of(mesh_text)
    layout = Layout(mesh=spec, zero=zero)
    graphdef, state = nnx.split(layer())

    def whole(state):
        used = nnx.merge(
            graphdef, all_gather_params(quantize_params(state, layout), layout, FLOAT32)
        )
        return used.gate_up.kernel.get_value().quantized, used.down.kernel.get_value().quantized

    got = jax.jit(manual_region(whole, mesh, (param_specs(state, layout),), REPLICATED))(state)
    for one, kernel in zip(got, (layer().gate_up.kernel, layer().down.kernel), strict=True):
        want = quantize(kernel[...], BLOCK)
        np.testing.assert_array_equal(
            np.asarray(one.values, np.float32), np.asarray(want.values, np.float32)
        )
        np.testing.assert_array_equal(one.scale, want.scale)


@functools.cache
def one_layer(mesh_text: str, zero: int):
    """Output and gradients of weights of a layer in FP8, 128 tokens a device of four."""
    mesh, spec = mesh_of(mesh_text)
    layout = Layout(mesh=spec, zero=zero)
    graphdef, state = nnx.split(layer())
    x, d_y = np.random.default_rng(0).standard_normal((2, 4, 128, WIDTH), np.float32)

    def shard(state, x, d_y):
        def f(state):
            used = all_gather_params(quantize_params(state, layout), layout, FLOAT32)
            return nnx.merge(graphdef, used)(x)

        y, pull = jax.vjp(f, state)
        grads = pull(d_y)[0]
        return y, map_params(
            lambda _, g, p: layout.psum_replicated(g, p.axes, p.global_shape), grads
        )

    stored = param_specs(state, layout)
    run = manual_region(shard, mesh, (stored, BATCH, BATCH), (BATCH, stored))
    y, grads = jax.jit(run)(state, x, d_y)
    return np.asarray(y), {path: np.asarray(g) for path, g in named_arrays(grads).items()}


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("mesh_text", ["dp2,ep2", "dp4", "ep2x2"])
def test_a_layer_on_a_mesh_equals_one_device(mesh_text, zero):
    y, grads = one_layer(mesh_text, zero)
    want, wanted = one_layer("dp1", 1)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-4 * np.abs(want).max())
    for path, grad in grads.items():
        close = 1e-3 * np.abs(wanted[path]).max()  # an FP8 value or two on the other side of a tie
        np.testing.assert_allclose(grad, wanted[path], rtol=0, atol=close, err_msg=path)


def fp8(zero: int = 1, remat: str = "none", matmul: str = "fp8") -> Config:
    """The small step with matmuls in FP8 and float32 between them."""
    config = small_step.config_of(zero, remat)
    precision = dataclasses.replace(config.precision, matmul=matmul, dispatch=matmul)
    return dataclasses.replace(config, precision=precision)


@functools.cache
def step_of(mesh_text: str, config: Config):
    """(loss, gradients by path)."""
    run = jax.jit(
        loss_and_gradients(
            config, *small_step.placed(mesh_text, config), small_step.loss_of(config)
        )
    )
    batch = small_step.batch_of(0)
    losses, _, grads = run(*small_step.parameters(), batch, np.float32(0), None)
    return float(losses.total), {k: np.asarray(x) for k, x in named_arrays(grads).items()}


def off(grads, wanted) -> dict[str, float]:
    """Norm of the difference over the norm, by path."""
    return {
        path: float(np.linalg.norm(grads[path] - wanted[path]) / np.linalg.norm(wanted[path]))
        for path in wanted
    }


@pytest.mark.parametrize(
    "mesh_text, zero, remat",
    [
        ("dp2,ep4", 1, "none"),
        pytest.param("dp2,ep4", 3, "full", marks=pytest.mark.slow),
        pytest.param("dp2,ep2x2", 3, "report", marks=pytest.mark.slow),
        pytest.param("dp8", 1, "report", marks=pytest.mark.slow),
    ],
)
def test_a_model_on_a_mesh_equals_one_device(mesh_text, zero, remat):
    loss, grads = step_of(mesh_text, fp8(zero, remat))
    want, wanted = step_of("dp1", fp8())
    assert loss == pytest.approx(want, rel=1e-4)
    assert max(off(grads, wanted).values()) < 0.08  # the noise of FP8: module docstring


@pytest.mark.slow
def test_fp8_is_near_float32_and_remat_changes_nothing():
    loss, grads = step_of("dp1", fp8())
    again, same = step_of("dp1", fp8(remat="report"))
    assert again == pytest.approx(loss, rel=1e-5)
    assert max(off(same, grads).values()) < 0.08
    wide, wanted = step_of("dp1", fp8(matmul="compute"))
    assert 1e-6 < abs(loss / wide - 1) < 1e-2  # really FP8, and near
    # Tokens whose experts flip are others: how near a matmul is, tests/test_fp8.py says.
    assert 1e-3 < off(grads, wanted)["head"] < 0.5


def saved(fn, *inputs) -> list[jax.ShapeDtypeStruct]:
    """What the backward of `fn` keeps, without the inputs themselves."""
    pull = jax.eval_shape(lambda *x: jax.vjp(fn, *x)[1], *inputs)
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(inputs)]
    return [x for x in jax.tree.leaves(pull) if (x.shape, x.dtype) not in shapes]


@pytest.mark.parametrize("remat", ["none", "report"])
def test_no_wide_copy_of_an_input_is_saved(remat):
    """Of a MoE block in bfloat16: tokens at their experts, hidden layers, in FP8 alone."""
    config = dataclasses.replace(load_preset("tiny").model, width=WIDTH)
    moe = dataclasses.replace(config.moe, hidden=HIDDEN)
    config, layout = dataclasses.replace(config, moe=moe), Layout()
    graphdef, state = nnx.split(
        nnx.vmap(lambda r: MoEBlock(config, rngs=r), in_axes=0)(nnx.Rngs(0).split(1))
    )
    x = jnp.zeros((1, 24, WIDTH), jnp.bfloat16)

    def run(state, x):
        prepared = quantize_params(state, layout)
        blocks = nnx.merge(graphdef, all_gather_params(prepared, layout, BFLOAT16))

        def step(block, x, _):
            return block(x, jnp.arange(24)[None], layout)

        return scan(step, blocks, x, None, layout=layout, compute=BFLOAT16, remat=remat)[0]

    found = saved(run, state, x)
    rows = 24 * moe.top_k
    bits = (jnp.uint8, jnp.float8_e4m3fn)
    values = {x.shape[-2:] for x in found if x.dtype in bits}
    assert {(rows, WIDTH), (rows, 2 * HIDDEN), (24, 2 * HIDDEN)} <= values
    floats = {x.shape[-2:] for x in found if x.dtype in (jnp.bfloat16, jnp.float32)}
    assert not {(rows, WIDTH), (rows, 2 * HIDDEN), (24, 2 * HIDDEN), (rows, HIDDEN)} & floats


def test_weights_are_quantized_once_whatever_passes_there_are():
    """No layer in the loop quantizes a weight, forward or back: stacks are made whole."""
    config = fp8(remat="full")
    step = loss_and_gradients(config, *small_step.placed("dp1", config), small_step.loss_of(config))
    params, bias = small_step.parameters()
    inputs = (params, bias, small_step.batch_of(0), np.float32(0), None)
    shapes = [
        e.outvars[0].aval.shape
        for e in equations(jax.make_jaxpr(step)(*inputs).jaxpr)
        if e.primitive.name == "convert_element_type"
        and e.outvars[0].aval.dtype == jnp.float8_e4m3fn
    ]
    weights = [params[stack]["ffn"]["gate_up"] for stack in ("moe",)]
    weights.append(params["mtp"]["block"]["ffn"]["gate_up"])
    for weight in weights:
        assert shapes.count(weight.shape) == 1 and shapes.count(weight.shape[1:]) == 0


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.slow
def test_counts_are_those_of_the_numbers():
    config = fp8()
    params, bias = small_step.parameters()
    run = make_fp8_stats(config, *small_step.placed("dp2,ep2", config))
    counts = run(params, bias, small_step.batch_of(0))
    found = {path: np.asarray(x) for path, x in named_arrays(counts).items()}
    down = params["dense"]["ffn"]["down"]["kernel"][...][0]
    n_tokens = small_step.BATCH_SIZE * small_step.LENGTH
    activations, gradients, weights = (QuantStats(*x) for x in found["dense.ffn.down.kernel"][0])
    assert activations.all == n_tokens * down.shape[0]
    assert gradients.all == n_tokens * down.shape[1]
    values = reference.quantized(down, (128, 128))
    assert weights.all == 4 * down.size and weights.underflow == 4 * (values == 0).sum()
    assert activations.saturated >= n_tokens  # the largest of each tile is taken to 448
    assert not found["embedding"].any() and not found["moe.ffn.router"].any()
    row = fp8_fractions(counts)
    assert set(row) == {f"fp8_{c}_{k}" for c in OPERANDS for k in QuantStats._fields[1:]}
    assert row["fp8_activations_not_finite"] == 0 and row["fp8_weights_underflow"] < 0.1


def test_nan_stays_visible():
    """In one token: its output and the gradients of all weights, not other tokens."""
    graphdef, state = nnx.split(layer())
    x = np.random.default_rng(0).standard_normal((1, 5, WIDTH)).astype(np.float32)
    x[0, 2, 7] = np.inf

    def f(state):
        return nnx.merge(
            graphdef, all_gather_params(quantize_params(state, Layout()), Layout(), FLOAT32)
        )(x)

    y, pull = jax.vjp(f, state)
    assert np.isnan(y[0, 2]).all() and np.isfinite(np.delete(y[0], 2, axis=0)).all()
    assert np.isnan(named_arrays(pull(jnp.ones_like(y))[0])["gate_up.kernel"]).any()


def test_bad_settings_are_refused():
    tiny = load_preset("tiny")
    with pytest.raises(ValueError, match="did you mean 'fp8'"):
        override(tiny, "precision=fp")
    with pytest.raises(ValueError, match="such as model.vocab_size"):
        override(tiny, "model=large")
    with pytest.raises(ValueError, match="precision.matmul='fp4' must be 'compute' or 'fp8'"):
        override(tiny, "precision.matmul=fp4")
    with pytest.raises(ValueError, match="add --set precision=fp8"):
        override(tiny, "fp8_stats=True")
    chosen = override(tiny, "precision=fp8").precision
    assert (chosen.compute, chosen.matmul, chosen.dispatch) == ("bfloat16", "fp8", "fp8")


def test_weights_of_another_format_are_refused():
    x = jnp.zeros((2, 256))
    w = quantize(jnp.ones((256, 128)), BLOCK)
    layer = SwiGLU(256, 64, 0.1, rngs=nnx.Rngs(0))
    layer.gate_up.kernel.set_value(Fp8Weight(w._replace(scale=jnp.ones((1, 1)))))
    with pytest.raises(ValueError, match=r"scale has shape \(1, 1\); \(256, 128\) in blocks"):
        layer(x)
    layer.gate_up.kernel.set_value(Fp8Weight(w._replace(values=jnp.ones((256, 128)))))
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        layer(x)


def test_chips_with_units_for_fp8():
    has = {
        kind: has_fp8_units(kind) for kind in ("TPU7x", "NVIDIA H100 80GB HBM3", "TPU v5", "cpu")
    }
    assert list(has.values()) == [True, True, False, False]


def test_no_counts_has_a_place_for_every_weight():
    _, state = nnx.split(layer())
    zeros = named_arrays(zero_quant_stats(state))
    assert {x.shape for x in zeros.values()} == {(3, 4)}


def test_plot_of_the_counts(tmp_path):
    counts = {f"fp8_{c}_{k}": 0.01 for c in OPERANDS for k in QuantStats._fields[1:]}
    rows = [{"step": 1, "loss": 5.0}, {"step": 2, "eval_loss": 5.0} | counts]
    plot_fp8(rows, tmp_path / "plots" / "fp8.png")
    assert (tmp_path / "plots" / "fp8.png").stat().st_size > 10_000
