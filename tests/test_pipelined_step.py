"""The training step in pipeline stages equals the step without, in every loss, gradient and load.

Float32: gradients agree to 2e-6 of the largest number of each tensor, losses to 2e-6.
"""

import math

import chex
import jax
import jax.extend.core
import numpy as np
import pytest
from reference.small_step import config_of, loss_of, placed
from reference.stages import batch_of, config_with, parameters, plain, run

from dsv3_jax.config_cli import override
from dsv3_jax.losses import Batch
from dsv3_jax.mesh_checks import check_mesh
from dsv3_jax.params import param_specs
from dsv3_jax.pipeline_plan import make_pipeline, stage_sizes
from dsv3_jax.training.state import make_layout
from dsv3_jax.training.step import loss_and_gradients
from sharding.mesh import parse_mesh


def check(mesh: str, n_layers: int, n_rows: int, *settings: str):
    losses, stats, grads = run(mesh, config_with(n_layers, n_rows, *settings))
    model = [s for s in settings if not s.startswith(("pipeline.", "parallel."))]
    want = plain(n_layers, n_rows, *model)
    chex.assert_trees_all_close(losses, want[0], rtol=2e-6, atol=0)
    np.testing.assert_array_equal(stats.load, want[1].load)
    np.testing.assert_array_equal(stats.n_received, stats.load.sum(-1))
    wanted = dict(jax.tree.flatten_with_path(want[2])[0])
    for path, grad in jax.tree.flatten_with_path(grads)[0]:
        error = np.abs(grad - wanted[path]).max() / np.abs(wanted[path]).max()
        assert error <= 2e-6, f"{jax.tree_util.keystr(path)}: off by {error:.1e} of the largest"


def test_equals_the_plain_step():
    check("pp2,ep2", 5, 8, "pipeline.schedule=dualpipe")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_all_schedules(schedule):
    """In two levels of expert parallelism; stages are uneven."""
    check("pp2,ep2x2", 7 if schedule == "dualpipev" else 6, 16, f"pipeline.schedule={schedule}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, n_layers, n_rows, settings",
    [
        ("pp4,dp2", 7, 16, ["pipeline.schedule=dualpipev"]),  # the ends have no layer
        ("pp8", 9, 16, ["pipeline.schedule=dualpipe", "pipeline.max_deferred_wgrads=1"]),
        ("pp2,ep4", 5, 16, ["pipeline.schedule=dualpipe", "parallel.remat=full"]),
        ("pp2", 5, 6, ["pipeline.schedule=zb1p", "model.mtp_depth=0", "parallel.remat=none"]),
        ("pp2,dp2", 5, 16, ["pipeline.schedule=dualpipe", "pipeline.micro_batch_size=2"]),
        ("pp4,ep2", 5, 16, ["pipeline.schedule=zb1p", "model.n_dense=0", "model.mtp_depth=2"]),
    ],
)
def test_more_shapes_of_model_and_mesh(mesh, n_layers, n_rows, settings):
    check(mesh, n_layers, n_rows, *settings)


@pytest.mark.slow
def test_masks_and_crowded_experts():
    """Targets differ from micro-batch to micro-batch, and the exchange takes several rounds."""
    config = config_with(5, 8, "pipeline.schedule=dualpipe")
    rng, whole = np.random.default_rng(3), batch_of(8)
    batch = Batch(
        whole.tokens, rng.uniform(size=whole.loss_mask.shape) < np.linspace(0, 1, 8)[:, None]
    )
    params, bias = parameters(config)
    crowded = jax.tree.map(
        lambda x: x + np.where(np.arange(x.shape[-1]) < 2, 1e3, 0)[None, :], bias
    )
    bias = jax.tree.map(lambda x, like: x.astype(like.dtype), crowded, bias)
    want, got = (run(mesh, config, batch, bias) for mesh in ("dp1", "pp2,ep2"))
    assert got[1].rounds.min() > 1
    chex.assert_trees_all_close(got[0], want[0], rtol=1e-5, atol=0)
    np.testing.assert_array_equal(got[1].load, want[1].load)
    for a, b in zip(*map(jax.tree.leaves, (got[2], want[2])), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


@pytest.mark.slow
def test_fp8():
    """The same codes meet; what float32 sums change moves a code here and there."""
    config = config_with(5, 8, "pipeline.schedule=dualpipe", "precision.matmul=fp8")
    want, got = (run(mesh, config) for mesh in ("dp1", "pp2,ep2"))
    np.testing.assert_allclose(got[0].total, want[0].total, rtol=1e-4)
    for a, b in zip(*map(jax.tree.leaves, (got[2], want[2])), strict=True):
        assert np.linalg.norm(a - b) <= 0.08 * np.linalg.norm(b)


@pytest.mark.parametrize(
    "setting, expected",
    [
        ("parallel.remat=report", 20752),
        pytest.param("parallel.remat=full", 2064, marks=pytest.mark.slow),
        pytest.param("precision.matmul=fp8", 11984, marks=pytest.mark.slow),
    ],
)
def test_no_weight_is_saved_per_micro_batch(setting, expected):
    """The bytes of a layer's residuals: what the remat policy names, its input and two scalars."""
    config = config_with(5, 8, "pipeline.schedule=dualpipe", setting)
    mesh, layout = placed("pp2,ep2", config)
    fn = loss_and_gradients(config, mesh, layout, loss_of(config))
    jaxpr = jax.make_jaxpr(fn)(*parameters(config), batch_of(8), np.float32(0), None).jaxpr
    pipeline = make_pipeline(config, layout.mesh)
    lead = (pipeline.table.n_residuals, max(pipeline.sizes))
    (ticks,) = (
        equation
        for equation in equations(jaxpr)
        if equation.primitive.name == "scan"
        and equation.params["length"] == len(pipeline.table.rows)
    )
    saved = [v.aval for v in ticks.outvars if v.aval.shape[:2] == lead]
    assert sum(x.size * x.dtype.itemsize for x in saved) == expected * math.prod(lead)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("mesh, flat", [("pp4,dp2", "dp8"), ("pp2,dp2,ep2", "dp4,ep2")])
def test_parameters_lie_as_without_stages(mesh, flat):
    """So a checkpoint of the one is a checkpoint of the other."""
    config = config_of()
    params, _ = parameters(config)
    stages, plain = (
        param_specs(params, make_layout(config, parse_mesh(text))) for text in (mesh, flat)
    )

    def axes(spec):
        dims = [(dim,) if isinstance(dim, str) else tuple(dim or ()) for dim in spec]
        return [tuple(axis for axis in dim if axis != "pp") for dim in dims]

    pairs = list(zip(*map(jax.tree.leaves, (stages, plain)), strict=True))
    assert all(axes(a) == axes(b) for a, b in pairs)
    assert all(str(a).count("'pp', 'dp'") == str(b).count("'dp'") for a, b in pairs)
    assert sum("'pp', 'dp'" in str(a) for a, _ in pairs) > 20


def test_auto_takes_what_the_run_allows():
    config = override(config_of(), "model.n_layers=9")
    found = {}
    for n_rows in (4, 16):
        config = override(config, f"train.batch={n_rows}")
        found[n_rows] = make_pipeline(config, parse_mesh("pp4")).table.schedule.name
    assert found[4] == "zb1p" and found[16] in ("dualpipe", "dualpipev")
    assert make_pipeline(config, parse_mesh("pp3")).table.schedule.name == "dualpipev"


def test_stage_sizes():
    assert stage_sizes(8, 4, 0.0, 0.0) == [2, 2, 2, 2]
    assert stage_sizes(58, 8, 3.0, 3.0) == [5, 8, 8, 8, 8, 8, 8, 5]
    assert stage_sizes(2, 3, 5.0, 0.5) == [0, 1, 1]
    assert sum(stage_sizes(61, 16, 0.5, 4.2)) == 61


ERRORS = [
    ("pp4", ["pipeline.schedule=dualpipe"], "train.batch=8 works"),
    ("pp2,dp4", ["pipeline.schedule=dualpipev"], "train.batch=16 works"),
    ("pp3", ["pipeline.schedule=dualpipe", "model.n_layers=9"], "an even number of stages"),
    ("pp8", ["pipeline.schedule=1f1b"], "at most pp=4 works"),
    ("pp4", ["pipeline.schedule=dualpipev", "train.batch=8"], "at most pp=2 works"),
    ("pp2", ["pipeline.micro_batch_size=3"], "no multiple of pipeline.micro_batch_size=3"),
    ("pp2", ["model.n_dense=3"], "model.n_dense=3 leaves none"),
    ("pp2,ep2", ["model.moe.n_redundant=2"], "model.moe.n_redundant=2 with pipeline stages"),
    ("pp2,dp8", [], "train.batch=4 sequences cannot be divided over dp"),
]


@pytest.mark.parametrize("mesh, settings, message", ERRORS)
def test_errors(mesh, settings, message):
    config = override(config_of(), "train.batch=4", *settings)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        check_mesh(config, parse_mesh(mesh))


def test_bad_settings():
    for setting, message in (
        ("schedule=zbv", "must be"),
        ("micro_batch_size=0", "positive"),
        ("max_deferred_wgrads=-1", "negative"),
    ):
        with pytest.raises(ValueError, match=message):
            override(config_of(), f"pipeline.{setting}")
