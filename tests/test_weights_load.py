"""Official folders onto meshes, bit for bit as a slow reading in NumPy has them."""

import functools
import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx
from reference.goldens import GOLDENS, assert_close, golden, model_of
from reference.official_weights import FIELDS, format_of, our_arrays, random_tensors, write
from reference.tensor_files import assert_same, count_bytes

from dsv3_jax import load_pretrained
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.params import named_arrays
from dsv3_jax.weights import load
from dsv3_jax.weights.abstract_params import LayerSlice, abstract_params, abstract_slice
from dsv3_jax.weights.pretrained import load_model
from dsv3_jax.weights.safetensors import SafetensorsReader
from dsv3_jax.weights.sources import open_weights
from sharding.layout import Layout
from sharding.mesh import make_mesh, parse_mesh

DENSE_ONLY = FIELDS | {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0}
ONE_MOE = FIELDS | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
EIGHT_EXPERTS = ONE_MOE | {"n_routed_experts": 8, "q_lora_rank": None, "n_shared_experts": 0}
EIGHT_EXPERTS |= {"intermediate_size": 282, "moe_intermediate_size": 45}


def arrays_of(model) -> dict:
    return named_arrays(nnx.state(model))


def assert_all_same(got: dict, want: dict):
    assert got.keys() == want.keys()
    for path, value in want.items():
        assert_same(np.asarray(got[path]), value)


def abstract_on(mesh: str, zero: int, config, dtype: str = "float32"):
    spec = parse_mesh(mesh)
    devices = jax.devices()[: spec.n_devices]
    policy, layout = Policy(master=np.dtype(dtype)), Layout(mesh=spec, zero=zero)
    return abstract_params(config, policy, make_mesh(spec, devices), layout)


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory):
    """As the release: FP8 with scales in other files, MTP with copies."""
    folder = tmp_path_factory.mktemp("official") / "fp8"
    return write(folder, FIELDS, random_tensors(FIELDS, "F8_E4M3"), n_files=3)


# --- one device


@pytest.mark.parametrize(
    "case, dtype",
    [("A6_sharded_bf16", "float32"), ("B1_fp8", "float32")]
    + [("B1_fp8", "bfloat16"), ("D1_mtp", "bfloat16")],
)
def test_goldens(case, dtype):
    assert_all_same(arrays_of(model_of(case, dtype)), our_arrays(GOLDENS / case, dtype))


def test_dequantised_tensors_of_the_golden():
    """As torch has them; both have sides that are no multiples of 128."""
    want, attention = golden("B1_fp8"), model_of("B1_fp8").dense.attention
    layer = "deq.model.layers.0.self_attn"
    kv_down, out = attention.kv_down.kernel[0], attention.out.kernel[0]
    np.testing.assert_array_equal(kv_down.T, want[f"{layer}.kv_a_proj_with_mqa.weight"])
    np.testing.assert_array_equal(out.T, want[f"{layer}.o_proj.weight"])


def test_logits_of_the_fp8_golden():
    """Tolerance of the golden: 3e-4 + 1e-4 relative."""
    want = golden("B1_fp8")
    got = nnx.jit(lambda model, tokens: model(tokens))(model_of("B1_fp8"), want["input_ids"])
    assert_close(got, want["logits"], atol=3e-4)


@pytest.mark.parametrize(
    "kind, n_files, copies, dtype, changes",
    [
        ("BF16", 2, True, "float32", {"num_hidden_layers": 2, "num_nextn_predict_layers": 2}),
        ("F8_E4M3", 3, False, "bfloat16", {"q_lora_rank": None, "num_hidden_layers": 2}),
        ("F8_E4M3", 1, True, "float32", ONE_MOE | {"n_shared_experts": 0}),
        ("F32", 1, True, "bfloat16", DENSE_ONLY),
        ("F32", 2, False, "bfloat16", {"first_k_dense_replace": 0, "num_hidden_layers": 1}),
        ("F8_E4M3", 2, True, "float32", {"first_k_dense_replace": 9}),  # more than there are
    ],
    ids=["2 MTP", "no q rank", "no shared", "dense only", "all MoE", "dense and MTP"],
)
def test_kinds_of_checkpoints(tmp_path, kind, n_files, copies, dtype, changes):
    fields = FIELDS | changes
    write(tmp_path, fields, random_tensors(fields, kind, copies), n_files)
    assert_all_same(arrays_of(load_pretrained(tmp_path, dtype)), our_arrays(tmp_path, dtype))


def test_scales_may_lie_before_their_weights(tmp_path):
    """Names, not places in files, say what belongs together."""
    tensors = random_tensors(DENSE_ONLY, "F8_E4M3")
    write(tmp_path, DENSE_ONLY, dict(reversed(tensors.items())), n_files=4)
    assert_all_same(arrays_of(load_pretrained(tmp_path)), our_arrays(tmp_path))


@pytest.mark.parametrize("fields", [ONE_MOE, DENSE_ONLY])
def test_mtp_that_is_announced_but_not_there(tmp_path, fields):
    """As transformers saves models: loaded without MTP, and said so."""
    tensors = random_tensors(fields)
    write(tmp_path / "with", fields | {"num_nextn_predict_layers": 1}, tensors)
    write(tmp_path / "without", fields, tensors)
    with pytest.warns(UserWarning, match="with: .* announces 1 MTP layers, but the files hold non"):
        got = open_weights(tmp_path / "with")
    assert got.config == open_weights(tmp_path / "without").config
    arrays = got.load(abstract_on("dp1", 0, got.config))
    assert_all_same(arrays, our_arrays(tmp_path / "without"))


def test_layers_from_a_later_one_on(fp8_folder):
    """A stack that is asked for in part, as imports do."""
    source, want = open_weights(fp8_folder), our_arrays(fp8_folder)
    asked = abstract_slice(abstract_on("dp1", 0, source.config), LayerSlice("moe", 1))
    got = source.load(asked, first_layer=1)
    assert_all_same(got, {path: want[path][1:] for path in asked})
    assert {path.partition(".")[0] for path in got} == {"moe"}


# --- meshes


@functools.cache
def eight_experts(folder):
    write(folder, EIGHT_EXPERTS, random_tensors(EIGHT_EXPERTS, "F8_E4M3"), n_files=2)
    return our_arrays(folder, "bfloat16")


@pytest.mark.parametrize(
    "mesh, starts",
    [
        ("ep2x4", {17, 34, 51}),
        pytest.param("dp2,ep4", {17, 34, 51, 68}, marks=pytest.mark.slow),
        ("dp8", {17, 34, 51}),
        ("dp3", {30, 60, 188, 376}),  # gate and up meet in the middle of a region
    ],
)
def test_every_mesh_holds_the_same(tmp_path_factory, mesh, starts, monkeypatch):
    """ZeRO-3's regions cut through blocks of 128, and reads of 128 rows through regions."""
    monkeypatch.setattr(load, "READ_BYTES", 1)
    folder, read = tmp_path_factory.getbasetemp() / "eight", []
    want = eight_experts(folder)
    source = open_weights(folder)
    abstract = abstract_on(mesh, 3, source.config, "bfloat16")
    got = source.load(abstract, advance=read.append)
    assert got.keys() == want.keys()
    begun = set()
    for path, like in abstract.items():
        assert got[path].sharding == like.sharding
        assert got[path].dtype == format_of(path, "bfloat16")
        for shard in got[path].addressable_shards:  # replicas too
            assert_same(np.asarray(shard.data), np.ascontiguousarray(want[path][shard.index]))
            begun |= {part.start for part in shard.index}
    assert starts <= begun
    assert sum(read) == source.n_bytes(abstract)


@pytest.mark.parametrize("n_bytes, starts", [(128 * 136, [0, 128, 256]), (256 * 136, [0, 256])])
def test_tensors_are_read_in_steps(tmp_path, n_bytes, starts, monkeypatch):
    monkeypatch.setattr(load, "READ_BYTES", n_bytes)
    write(tmp_path, DENSE_ONLY, random_tensors(DENSE_ONLY, "F8_E4M3"))
    source = open_weights(tmp_path)
    abstract = abstract_on("dp1", 0, source.config)
    reads = load._plan_reads(source.tensors, abstract, source.config, 0)
    name = "model.layers.2.mlp.up_proj.weight"
    rows = sorted(read.rows for read in reads if read.name == name)
    assert rows == list(zip(starts, [*starts[1:], 280], strict=True))
    assert_all_same(source.load(abstract), our_arrays(tmp_path))


def test_a_model_on_a_mesh(fp8_folder, monkeypatch):
    """The model of one device, of which every tensor was read once, and no copy in MTP."""
    source = open_weights(fp8_folder)
    sizes = count_bytes(monkeypatch)
    model = load_model(source, "float32", make_mesh(parse_mesh("ep4"), jax.devices()[:4]))
    assert_all_same(arrays_of(model), our_arrays(fp8_folder))
    experts, out = model.moe.ffn.gate_up[...], model.moe.attention.out.kernel[...]
    assert {shard.data.shape for shard in experts.addressable_shards} == {(2, 1, 136, 88)}
    assert {shard.data.shape for shard in out.addressable_shards} == {(2, 42, 136)}
    copies = 2 * source.tensors["model.layers.3.embed_tokens.weight"].n_bytes
    read = sum(sizes)
    assert source.tensors.n_bytes - copies <= read < source.tensors.n_bytes - copies + 100
    announced = source.n_bytes(abstract_on("dp1", 0, source.config))
    assert announced == source.tensors.n_bytes - copies - bytes_of(source.tensors, "_scale_inv")


def test_mesh_that_does_not_divide(fp8_folder):
    with pytest.raises(ValueError, match="model.moe.n_experts=4 cannot be divided over ep=3"):
        load_pretrained(fp8_folder, mesh=make_mesh(parse_mesh("ep3"), jax.devices()[:3]))
    with pytest.raises(ValueError, match="mesh .*ep4.* needs 4 devices, but there are 8"):
        load_pretrained(fp8_folder, mesh="ep4")
    stages = make_mesh(parse_mesh("pp2,dp2"), jax.devices()[:4])
    with pytest.raises(ValueError, match="only training has pipeline stages; use dp4"):
        load_pretrained(fp8_folder, mesh=stages)


def test_loaded_arrays_may_be_donated(tmp_path):
    """On CPU they share the memory that was read into, and replicas each other's."""
    fields = DENSE_ONLY | {"intermediate_size": 512, "hidden_size": 256}  # large enough to share
    write(tmp_path, fields, random_tensors(fields))
    source = open_weights(tmp_path)
    arrays = source.load(abstract_on("dp8", 0, source.config))
    grow = jax.jit(lambda x: jax.tree.map(lambda x: 2 * x, x), donate_argnums=0)
    grown = grow(grow(arrays))
    for path, want in our_arrays(tmp_path).items():
        for shard in grown[path].addressable_shards:
            assert_same(np.asarray(shard.data), 4 * want)


# --- what is read


def bytes_of(folder: SafetensorsReader, words: str) -> int:
    return sum(x.n_bytes for name, x in folder.items() if words in name)


def test_a_process_reads_its_own_experts_only(fp8_folder, monkeypatch):
    """Devices 2 and 3 of ep4, as a process that has just these."""
    source = open_weights(fp8_folder)
    abstract = {
        path: like
        for path, like in abstract_on("ep4", 0, source.config).items()
        if path in ("moe.ffn.gate_up", "moe.ffn.down")
    }
    of_all, own, got = load._regions, set(jax.devices()[2:4]), {}

    def regions_of(like):
        return {device: region for device, region in of_all(like).items() if device in own}

    def assembled(like, path, regions):
        got.update(regions)
        return jax.numpy.zeros(())

    monkeypatch.setattr(load, "_regions", regions_of)
    monkeypatch.setattr(load, "_assemble", assembled)
    sizes = count_bytes(monkeypatch)
    source.load(abstract)
    needed = sum(
        bytes_of(source.tensors, f"model.layers.{layer}.mlp.experts.{expert}.")
        for layer in (1, 2)
        for expert in (2, 3)
    )
    assert sum(sizes) == needed > source.n_bytes(abstract) > 0  # scales do not count
    want = our_arrays(fp8_folder)
    assert len(got) == 4
    for (path, region), values in got.items():
        assert_same(values, want[path][tuple(slice(*bounds) for bounds in region)])


def test_an_error_amid_loading_ends_it(fp8_folder, monkeypatch):
    whole, n_read, before = SafetensorsReader.read, [], threading.active_count()

    def read(self, name, rows=None, columns=None):
        n_read.append(name)
        if len(n_read) > 30:
            time.sleep(0.01)
            raise OSError(f"{self[name].file}: tensor {name}: input/output error")
        return whole(self, name, rows, columns)

    monkeypatch.setattr(SafetensorsReader, "read", read)
    with pytest.raises(OSError, match=r"model-0000\d-of-00003.safetensors: tensor .*output error"):
        load_pretrained(fp8_folder)
    assert len(n_read) < 80  # of 140: the others were not begun
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
