"""Live parity with transformers: checkpoints that it writes, and ours that it reads.

Random models in three shapes, small but with every switch of the config set in one of them. Logits
agree to 2e-4 + 1e-4 relative, as the goldens' manifest has it; those of our float32 export are the
very same, as the weights are.
"""

import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from reference.goldens import GOLDENS, assert_close, golden
from reference.official_weights import dequantized, our_arrays, raw
from reference.tensor_files import assert_same

from dsv3_jax import load_pretrained, save_pretrained
from dsv3_jax.params import named_arrays

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:.*announces 1 MTP layers:UserWarning")

SIZES = {
    "vocab_size": 211,
    "hidden_size": 76,
    "intermediate_size": 148,
    "moe_intermediate_size": 52,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 34,
    "kv_lora_rank": 22,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 10,
    "v_head_dim": 18,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "initializer_range": 0.08,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 12,
    "beta_fast": 16,
    "beta_slow": 2,
    "mscale": 0.9,
    "mscale_all_dim": 0.7,
}
SHAPES = {
    "no q rank, no normalisation": {"q_lora_rank": None, "norm_topk_prob": False},
    "groups, yarn": {"n_group": 4, "topk_group": 2, "rope_parameters": YARN, "n_shared_experts": 3},
    "dense first": {"first_k_dense_replace": 2, "n_shared_experts": 2, "rms_norm_eps": 1e-5},
}
TOKENS = np.random.default_rng(0).integers(0, 211, (2, 29))


def their_model(seed: int, **changes):
    """A random model of transformers, with norms and balance biases that do something."""
    torch.manual_seed(seed)
    config = transformers.DeepseekV3Config(**SIZES | changes, attn_implementation="eager")
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("norm.weight"):
                value.copy_(1 + 0.2 * torch.randn_like(value))
            elif name.endswith("e_score_correction_bias"):
                value.copy_(0.1 * torch.randn_like(value))
    return model


def read_by_transformers(folder, unexpected="none", **options):
    """The model, of which the files held every tensor, and no others than the `unexpected`."""
    model, found = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **options
    )
    assert not found["missing_keys"] and not found["mismatched_keys"]
    assert all(name.startswith(unexpected) for name in found["unexpected_keys"])
    return model.eval()


def their_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.as_tensor(tokens, dtype=torch.long)).logits.float().numpy()


@functools.cache
def our_logits_of():
    return nnx.jit(lambda model, tokens: model(tokens))


def our_logits(model, tokens=TOKENS):
    with jax.default_matmul_precision("highest"):
        return np.asarray(our_logits_of()(model, tokens.astype(np.int32)))


@pytest.fixture(scope="module", params=SHAPES)
def theirs(request, tmp_path_factory):
    """A folder that transformers wrote, in shards, and the model."""
    model = their_model(len(request.param), **SHAPES[request.param])
    folder = tmp_path_factory.mktemp("parity") / "theirs"
    model.save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder, model


def test_their_checkpoint_here_and_ours_there(theirs, tmp_path):
    folder, model = theirs
    want, ours = their_logits(model), load_pretrained(folder)
    for path, value in our_arrays_without_mtp(folder).items():
        assert_same(np.asarray(named_arrays(nnx.state(ours))[path]), value)
    assert np.abs(want).max() > 1  # so that the tolerance says something
    assert_close(our_logits(ours), want)

    save_pretrained(ours, tmp_path / "float32", "float32")
    assert raw(tmp_path / "float32").keys() == raw(folder).keys()
    again = read_by_transformers(tmp_path / "float32")
    np.testing.assert_array_equal(their_logits(again), want)

    save_pretrained(ours, tmp_path / "bfloat16")
    rounded = read_by_transformers(tmp_path / "bfloat16", dtype=torch.float32)
    want = their_logits(rounded)
    assert_close(our_logits(load_pretrained(tmp_path / "bfloat16")), want)


def our_arrays_without_mtp(folder):
    """transformers announces an MTP layer that it does not write."""
    fields = json.loads((folder / "config.json").read_text())
    assert fields["num_nextn_predict_layers"] == 1
    (folder / "config.json").write_text(json.dumps(fields | {"num_nextn_predict_layers": 0}))
    arrays = our_arrays(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    return arrays


def test_they_read_our_export_with_mtp(tmp_path):
    """Their main model leaves the MTP layer in the files alone."""
    want = golden("D1_mtp")
    save_pretrained(load_pretrained(GOLDENS / "D1_mtp"), tmp_path / "export", "float32")
    model = read_by_transformers(tmp_path / "export", unexpected="model.layers.2.")
    assert_close(their_logits(model, want["input_ids"]), want["main_logits"], atol=3e-4)


def test_they_read_our_fp8_export(tmp_path):
    """De-quantised by transformers on the CPU, for which it needs the package accelerate.

    transformers 5.23 splits a matrix evenly into as many blocks as there are scales, and refuses
    what cannot be split so (V3's own 576 rows, golden B1). Sides here are at most 128, or 256.
    """
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128}
    sizes |= {"q_lora_rank": 96, "kv_lora_rank": 112, "qk_rope_head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_nope_head_dim": 48}
    sizes |= {"v_head_dim": 16, "num_hidden_layers": 2, "n_routed_experts": 5}
    their_model(5, **sizes).save_pretrained(tmp_path / "theirs")
    save_pretrained(load_pretrained(tmp_path / "theirs"), tmp_path / "fp8", "fp8")
    how = transformers.FineGrainedFP8Config(dequantize=True)
    model = read_by_transformers(tmp_path / "fp8", quantization_config=how, dtype=torch.float32)
    codes = [name for name, x in raw(tmp_path / "fp8").items() if x.dtype.itemsize == 1]
    assert len(codes) == 31
    for name, value in dequantized(tmp_path / "fp8").items():
        if name in codes and "experts." not in name:  # which are stacked there
            assert_same(model.get_parameter(name).detach().numpy(), value)
    model = model.float()  # what is bfloat16 in the files had stayed that
    assert_close(our_logits(load_pretrained(tmp_path / "fp8")), their_logits(model))
