"""Where parameters are stored, and how they come together and their gradients come apart."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from configs import load_preset, preset_names
from dsv3_jax.model.deepseek import abstract_model, count_parameters
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.params import param_specs
from dsv3_jax.training.state import split_model
from sharding.collectives import gather_steps
from sharding.layout import MODEL_PARALLEL_AXES, Layout
from sharding.mesh import BATCH, DATA_AXES, EXPERT_AXES, make_mesh, manual_region, parse_mesh

MESHES = {
    "tiny": ["dp1", "dp8", "ep8", "dp4,ep8", "dp2,ep2x4"],
    "dsv3_16b": ["dp4,ep16", "dp64,ep8x4"],
    "dsv3_671b": ["dp16,ep64", "dp1,ep8x8", "dp128,ep8x8", "dp3,ep32"],
    "tiny_long": ["dp2"],
    "tiny_recipe": ["dp2,ep4"],
    "dsv3_671b_long": ["dp16,ep64"],
}
ON_MESHES = [(preset, mesh) for preset, meshes in MESHES.items() for mesh in meshes]
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


@functools.cache
def parameters(preset: str):
    return split_model(abstract_model(load_preset(preset).model, Policy()))[1]


def flat(tree) -> dict:
    leaves = jax.tree.flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def axes_of(spec: PartitionSpec) -> list[str]:
    """Mesh axes that a spec uses, with repetitions."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return [axis for entry in entries for axis in entry]


def test_every_preset_is_here():
    assert set(MESHES) == set(preset_names())


@pytest.mark.parametrize("preset, mesh", ON_MESHES)
def test_param_spec(preset, mesh):
    """Every axis once, sizes divide, model-parallel dims over the expert axes, others whole."""
    spec = parse_mesh(mesh)
    layout = Layout(mesh=spec)
    for path, variable in flat(parameters(preset)).items():
        names, sizes = variable.axes, variable.global_shape
        assert len(names) == len(sizes), path
        stored = layout.param_spec(names, sizes)
        used = axes_of(stored)
        assert len(used) == len(set(used)) and set(used) <= set(DATA_AXES), (path, stored)
        for name, size, entry in zip(names, sizes, stored, strict=False):
            axes = axes_of(PartitionSpec(entry))
            assert size % spec.size(*axes) == 0, (path, size, stored)
            assert (name not in MODEL_PARALLEL_AXES) or tuple(axes) == EXPERT_AXES, (path, stored)
        rest = [axis for axis in DATA_AXES if axis not in used and spec.size(axis) > 1]
        assert sorted(layout.replicated_axes(names, sizes)) == sorted(rest), path


@pytest.mark.parametrize("preset, mesh", ON_MESHES)
def test_specs_describe_the_stacked_arrays(preset, mesh):
    """The spec of an array: nothing over the stack of layers, then what one layer says."""
    layout = Layout(mesh=parse_mesh(mesh))
    placed = flat(param_specs(parameters(preset), layout))
    variables = flat(parameters(preset))
    assert len(placed) == len(variables)
    for variable, spec in zip(variables.values(), placed.values(), strict=True):
        stack = len(variable.shape) - len(variable.global_shape)
        assert stack in (0, 1) and tuple(variable.shape[stack:]) == variable.global_shape
        assert tuple(spec[:stack]) == (None,) * stack
        assert PartitionSpec(*spec[stack:]) == layout.param_spec(
            variable.axes, variable.global_shape
        )


@pytest.mark.parametrize("mesh", ["dp16,ep64", "dp16,ep8x8"])
def test_671b_is_spread_evenly(mesh):
    """All matrices lie over all 1024 devices; what is whole (norm scales) is under 0.2 percent."""
    spec = parse_mesh(mesh)
    layout = Layout(mesh=spec)
    total = share = 0
    for path, variable in flat(parameters("dsv3_671b")).items():
        shards = spec.size(*axes_of(layout.param_spec(variable.axes, variable.global_shape)))
        assert shards == (1024 if len(variable.global_shape) > 1 else 1), path
        total += math.prod(variable.shape)
        share += math.prod(variable.shape) // shards
    counts = count_parameters(load_preset("dsv3_671b").model)
    biases = 59 * 256
    assert total == counts["main"] + counts["mtp"] - biases
    assert 1.0 <= share * 1024 / total < 1.002


TOYS = {  # names, sizes of one layer
    "matrix": (("embed", "mlp"), (24, 10)),
    "second dim": (("embed", "mlp"), (6, 40)),
    "two dims": (("embed", "mlp"), (6, 12)),  # neither divides by 8: dp on one, ep on the other
    "dp only": (("embed", "mlp"), (6, 7)),
    "nothing": (("embed", "mlp"), (5, 7)),
    "vector": (("embed",), (16,)),
    "experts": (("expert", "embed", "mlp"), (8, 6, 10)),
    "experts, odd": (("expert", "embed", "mlp"), (4, 5, 7)),
    "head": (("vocab_shard", "embed"), (12, 14)),
    "table": (("vocab", "embed_shard"), (10, 16)),
}
STORED_ON_DP2_EP4 = {
    "matrix": (DATA_AXES, None),
    "second dim": (None, DATA_AXES),
    "two dims": (("dp",), EXPERT_AXES),
    "dp only": (("dp",), None),
    "nothing": (None, None),
    "vector": (None,),
    "experts": (EXPERT_AXES, ("dp",), None),
    "experts, odd": (EXPERT_AXES, None, None),
    "head": (EXPERT_AXES, ("dp",)),
    "table": (("dp",), EXPERT_AXES),
}


@pytest.mark.parametrize("mesh", ["dp2,ep4", "dp2,ep2x2"])
def test_param_spec_of_toys(mesh):
    layout = Layout(mesh=parse_mesh(mesh))
    for name, (names, sizes) in TOYS.items():
        assert layout.param_spec(names, sizes) == PartitionSpec(*STORED_ON_DP2_EP4[name]), name


def used_spec(names, sizes) -> PartitionSpec:
    """What a layer works with: model-parallel dims split, all others whole."""
    return PartitionSpec(*(EXPERT_AXES if name in MODEL_PARALLEL_AXES else None for name in names))


@pytest.mark.parametrize("n_layers", [None, 3])
@pytest.mark.parametrize(
    "mesh, rings",
    [("dp8", {}), ("dp2,ep4", {}), ("dp2,ep2x2", {}), ("ep1", {})]
    + [("dp2,ep4", {"rank": (2, 2)}), ("ep4", {"rank": (2, 2)}), ("dp2,ep2x2", {"rank": (2,)})],
)
def test_gather_and_its_gradient(mesh, rings, n_layers):
    """Gathered equals whole; its gradient is the sum of all devices', in the stored shards.

    With `rings`, as on a torus, both take one collective per ring.
    """
    spec = parse_mesh(mesh)
    if rings:
        sizes = {axis: (size,) for axis, size in spec.sizes.items()} | rings
        spec = dataclasses.replace(spec, rings=tuple(sizes.items()))
        steps = gather_steps(DATA_AXES, spec)
        sizes = [len(groups[0]) if groups else spec.size(axis) for axis, groups in steps]
        assert math.prod(sizes) == spec.n_data_shards and len(sizes) > 1
    layout = Layout(mesh=spec)
    stack = () if n_layers is None else (n_layers,)
    free = (None,) * len(stack)
    rng = np.random.default_rng(0)
    values = {k: rng.normal(size=(*stack, *s)).astype(np.float32) for k, (_, s) in TOYS.items()}
    # one cotangent a device: of the whole array, of which a device takes its model-parallel shard
    cotangents = {
        k: rng.integers(-4, 5, (spec.n_data_shards, *v.shape)).astype(np.float32)
        for k, v in values.items()
    }
    stored = {k: PartitionSpec(*free, *layout.param_spec(*toy)) for k, toy in TOYS.items()}
    used = {k: PartitionSpec(*free, *used_spec(*toy)) for k, toy in TOYS.items()}

    def model_parallel_shard(x, names):
        for dim, name in enumerate(names):
            if name in MODEL_PARALLEL_AXES:
                dim += len(stack)
                size = x.shape[dim] // spec.ep
                first = jax.lax.axis_index(EXPERT_AXES) * size
                x = jax.lax.dynamic_slice_in_dim(x, first, size, dim)
        return x

    def shard(values, cotangents):
        full, grads = {}, {}
        for name, (names, sizes) in TOYS.items():
            gather = functools.partial(
                layout.gather_param, axes=names, global_shape=sizes, dtype=FLOAT32
            )
            full[name], pull = jax.vjp(gather, values[name])
            (grad,) = pull(model_parallel_shard(cotangents[name][0], names))
            grads[name] = layout.psum_replicated(grad, names, sizes)
        return full, grads

    device_mesh = make_mesh(spec, jax.devices()[: spec.n_devices])
    run = jax.jit(
        manual_region(shard, device_mesh, in_specs=(stored, BATCH), out_specs=(used, stored))
    )
    full, grads = run(values, cotangents)
    for name in TOYS:
        np.testing.assert_array_equal(full[name], values[name], err_msg=name)
        want = sum_over_users(cotangents[name], TOYS[name][0], len(stack), spec)
        np.testing.assert_array_equal(grads[name], want, err_msg=name)


def sum_over_users(cotangents, names, n_stack, spec):
    """Sum over devices; a shard of a model-parallel dim is used by one expert rank."""
    dims = [n_stack + dim for dim, name in enumerate(names) if name in MODEL_PARALLEL_AXES]
    if not dims:
        return cotangents.sum(0)
    by_rank = cotangents.reshape(spec.dp, spec.ep, *cotangents.shape[1:]).sum(0)
    parts = [np.split(by_rank[rank], spec.ep, dims[0])[rank] for rank in range(spec.ep)]
    return np.concatenate(parts, dims[0])


def test_gather_leaves_alone_what_is_whole():
    """A weight gathered before the first layer passes through the layer's own gather."""
    layout = Layout(mesh=parse_mesh("dp2,ep4"))
    names, sizes = TOYS["matrix"]

    def shard(x):
        once = layout.gather_param(x, names, sizes, FLOAT32)
        return layout.gather_param(once, names, sizes, FLOAT32)

    run = manual_region(
        shard, make_mesh(layout.mesh), layout.param_spec(names, sizes), PartitionSpec()
    )
    x = np.arange(240.0, dtype=np.float32).reshape(sizes)
    np.testing.assert_array_equal(jax.jit(run)(x), x)


def test_gather_narrows_before_and_sums_wide():
    """Weights travel in the compute format; gradients are summed in the stored one, float32."""
    layout = Layout(mesh=parse_mesh("dp8"))
    names, sizes = TOYS["matrix"]

    def shard(x, cotangent):
        full, pull = jax.vjp(lambda x: layout.gather_param(x, names, sizes, BFLOAT16), x)
        return full, pull(cotangent[0])[0]

    stored = layout.param_spec(names, sizes)
    run = manual_region(shard, make_mesh(layout.mesh), (stored, BATCH), (PartitionSpec(), stored))
    x = np.random.default_rng(0).normal(size=sizes).astype(np.float32)
    cotangent = np.full((8, *sizes), 2.0**-9, jnp.bfloat16)
    cotangent[0] = 1.0  # 1 + 7 / 512 has no bfloat16
    full, grad = jax.jit(run)(x, cotangent)
    assert full.dtype == BFLOAT16 and grad.dtype == FLOAT32
    np.testing.assert_array_equal(full, x.astype(BFLOAT16))
    np.testing.assert_array_equal(grad, np.full(sizes, 1.0 + 7.0 / 512.0, np.float32))
    lines = str(jax.make_jaxpr(run)(x, cotangent)).splitlines()
    assert all("bf16[24,10]" in line for line in lines if "= all_gather" in line)
    assert any("= all_gather" in line for line in lines)
