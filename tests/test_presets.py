"""What the presets cost on paper, and that every one becomes a program, without a device of it.

Steps are lowered on an `AbstractMesh`. How whole arrays are looked for in the 671B program: its
StableHLO has one manual computation, whose types are those of a single device. 129,280 tokens are
2^8 * 5 * 101, and no other size of the model has the prime 101 in it; so within that computation,
and in the functions it calls, every tensor whose number of elements is a multiple of 101 comes from
the vocabulary. None may be as large as the embedding table, and only this device's columns of that
table may have all 129,280 tokens in one dimension.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from configs import load_preset, preset_names
from dsv3_jax.config import Config
from dsv3_jax.config_cli import override
from dsv3_jax.flops import activated_parameters, training_flops_per_token
from dsv3_jax.losses import Batch, next_token_loss
from dsv3_jax.mesh_checks import check_mesh
from dsv3_jax.model.deepseek import count_parameters
from dsv3_jax.model.rope import frequencies
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer
from dsv3_jax.training.state import abstract_state, make_layout
from dsv3_jax.training.step import make_step
from dsv3_jax.weights.hf_names import param_shapes
from sharding.mesh import AXES, BATCH, MeshSpec, parse_mesh

MESHES = {
    "tiny": "dp4,ep8",
    "tiny_long": "dp2",
    "tiny_recipe": "dp2,ep2",
    "dsv3_16b": "dp4,ep16",
    "dsv3_671b": "dp16,ep64",
    "dsv3_671b_long": "dp16,ep64",
}


def test_counts_of_671b():
    counts = count_parameters(load_preset("dsv3_671b").model)
    assert counts["main"] == 671_026_419_200
    assert counts["mtp"] == 11_610_068_224
    assert counts["released"] == 684_489_845_504


def test_activated_parameters_of_671b():
    model = load_preset("dsv3_671b").model
    activated = activated_parameters(model)
    assert activated == 37_552_297_472
    assert round((activated - model.vocab_size * model.width) / 1e9, 1) == 36.6


def test_training_flops_of_671b():
    """250 GFLOP a token at 4096: hardware paper (arXiv 2505.09343), table 2."""
    flops = training_flops_per_token(load_preset("dsv3_671b").model, 4096)
    assert round(flops / 1e9, 1) == 250.5


def test_attention_flops_grow_with_length():
    """A causal token meets half of the sequence: 2 FLOPs forward, 4 backward, a multiplied pair."""
    model = load_preset("dsv3_671b").model
    per_position = 3 * (2 / 2) * 61 * 128 * (128 + 64 + 128)
    longer = training_flops_per_token(model, 8192) - training_flops_per_token(model, 4096)
    assert longer == pytest.approx(4096 * per_position, rel=1e-12)


def test_sizes_of_671b():
    """The table in the report, sec. 4.2."""
    config = load_preset("dsv3_671b")
    model, attention, moe = config.model, config.model.attention, config.model.moe
    assert (model.n_layers, model.n_dense, model.width) == (61, 3, 7168)
    assert (model.vocab_size, model.dense_hidden, model.mtp_depth) == (129_280, 18_432, 1)
    assert (attention.n_heads, attention.q_rank, attention.kv_rank) == (128, 1536, 512)
    assert (attention.nope_dim, attention.rope_dim, attention.value_dim) == (128, 64, 128)
    assert (moe.n_experts, moe.n_shared, moe.hidden) == (256, 1, 2048)
    assert (moe.top_k, moe.n_groups, moe.topk_groups, moe.scale) == (8, 8, 4, 2.5)
    assert (model.init_std, model.norm_eps, attention.rope_base) == (0.006, 1e-6, 10_000.0)
    assert (config.train.batch, config.train.seq_len) == (15_360, 4096)
    precision = config.precision
    assert (precision.master, precision.moments) == ("float32", "bfloat16")


def test_sizes_of_16b():
    model = load_preset("dsv3_16b").model
    assert (model.n_layers, model.width, model.vocab_size) == (27, 2048, 102_400)
    assert (model.attention.n_heads, model.attention.q_rank) == (16, None)
    assert (model.moe.n_experts, model.moe.n_shared, model.moe.top_k) == (64, 2, 6)
    assert (model.moe.hidden, model.dense_hidden) == (1408, 10_944)
    assert round(count_parameters(model)["main"] / 1e9) == 16


def test_stages_of_context_extension():
    """Both take the weights of the run before; slow rotary pairs slow down as the length grows."""
    short, long = load_preset("tiny"), load_preset("tiny_long")
    longer = override(long, "train.seq_len=4096", "train.batch=1")
    for config in (long, longer):
        assert param_shapes(config.model) == param_shapes(short.model)
        yarn = config.model.attention.yarn
        assert yarn.original_length == short.train.seq_len
        assert yarn.factor * yarn.original_length >= config.train.seq_len
        slowed = frequencies(short.model.attention) / frequencies(config.model.attention)
        assert slowed[0] == 1.0 and slowed[-1] == pytest.approx(yarn.factor)
        tokens = config.train.batch * config.train.seq_len
        assert tokens == short.train.batch * short.train.seq_len  # a step, as in the report


@pytest.fixture
def any_mesh(monkeypatch):
    """Annotations say Mesh where an AbstractMesh does as well, so they are not checked here."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def abstract_step(config: Config, spec: MeshSpec):
    """The step function of a preset, with the shapes and placements of its arguments."""
    check_mesh(config, spec)
    sizes = tuple(spec.sizes.values())
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    layout, train = make_layout(config, spec), config.train
    policy = Policy.of(config.precision)
    optimizer = make_optimizer(config.optimizer, policy)
    shape = (train.batch, train.seq_len + 1 + config.model.mtp_depth)
    array = functools.partial(jax.ShapeDtypeStruct, shape, sharding=NamedSharding(mesh, BATCH))
    batch = Batch(array(jnp.int32), array(jnp.bool_))
    state = abstract_state(config, optimizer, mesh, layout)
    loss_fn = next_token_loss(config.losses, config.model.mtp_depth)
    return make_step(config, optimizer, mesh, layout, loss_fn), state, batch


@functools.cache
def lowered(name: str):
    """Text of a preset's step, and the shapes of the state before and of all that comes out."""
    step, state, batch = abstract_step(load_preset(name), parse_mesh(MESHES[name]))
    traced = step.trace(state, batch)
    return traced.lower(lowering_platforms=("tpu",)).as_text(), state, traced.out_info


def test_every_preset_has_a_mesh():
    assert sorted(MESHES) == preset_names()


@pytest.mark.parametrize(
    "name", ["tiny", "tiny_long", pytest.param("dsv3_16b", marks=pytest.mark.slow), "dsv3_671b"]
)
def test_step_lowers(name, any_mesh):
    text, state, (after, metrics) = lowered(name)
    spec, model = parse_mesh(MESHES[name]), load_preset(name).model
    assert f"mhlo.num_partitions = {spec.n_devices}" in text
    assert text.count("sdy.manual_computation") == 1  # the one region
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)  # steps can follow steps
    n_moe = model.n_layers - model.n_dense + model.mtp_depth
    assert metrics.router.load.shape == (n_moe, model.moe.n_experts)
    assert {x.dtype for x in jax.tree.leaves(metrics.losses)} == {jnp.dtype("float32")}


def per_device(text: str) -> str:
    """The part of a lowered step in which types are those of one device."""
    main, *functions = re.split(r"\n(?=  func\.func )", text)[1:]
    body = re.search(r"sdy\.manual_computation.*?\n(.*?)\n    } : \(", main, re.DOTALL)[1]
    return "\n".join([body, *functions])


def shapes_in(text: str) -> set[tuple[int, ...]]:
    found = re.findall(r"tensor<((?:\d+x)+)[a-z]\w*>", text)
    return {tuple(map(int, dims[:-1].split("x"))) for dims in set(found)}


def test_671b_holds_neither_whole_logits_nor_a_whole_head(any_mesh):
    model, mesh = load_preset("dsv3_671b").model, parse_mesh(MESHES["dsv3_671b"])
    text, _, _ = lowered("dsv3_671b")
    table = (model.vocab_size, model.width)
    assert table in shapes_in(text)  # outside: the whole program's arrays
    vocabulary = {shape for shape in shapes_in(per_device(text)) if math.prod(shape) % 101 == 0}
    share = (model.vocab_size // mesh.ep, model.width)
    columns = (model.vocab_size, model.width // mesh.ep)
    assert {share, columns} <= vocabulary  # the search finds what must be there
    assert not [shape for shape in vocabulary if math.prod(shape) >= math.prod(table)]
    assert {shape for shape in vocabulary if model.vocab_size in shape} == {columns}


def test_the_search_finds_whole_logits():
    """The searching test's own test, on a program with one device's logits over everything."""
    text = (
        "module {\n  func.func public @main() {\n    %0 = sdy.manual_computation() (tensor<8xi8>)\n"
        "      %1 = stablehlo.add : tensor<15x4096x129280xf32>\n    } : (tensor<9x129280xf32>)\n"
        "  func.func private @f() -> tensor<3x101xbf16>\n}"
    )
    assert shapes_in(per_device(text)) == {(15, 4096, 129280), (3, 101)}
