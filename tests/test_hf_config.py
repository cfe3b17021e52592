"""config.json: every field understood or refused by name, and written so that it reads back."""

import dataclasses
import json
from pathlib import Path

import pytest
from reference.official_config import (
    ATTENTION,
    CONFIG,
    EXPERTS,
    FIELDS,
    PLAIN,
    read,
    with_yarn,
    without,
)

from dsv3_jax.weights.hf_config import KNOWN, model_config, official_config, read_config

GOLDENS = sorted(path.parent for path in Path(__file__).parent.glob("goldens/*/config.json"))
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


# Reading


def test_every_mapped_field():
    assert read() == CONFIG


def test_read_config_reads_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    assert read_config(tmp_path) == read_config(str(tmp_path)) == CONFIG


@pytest.mark.parametrize(
    "name, fallback",
    [
        ("num_nextn_predict_layers", {"mtp_depth": 0}),
        ("rms_norm_eps", {"norm_eps": 1e-6}),
        ("initializer_range", {"init_std": 0.02}),
        ("rope_theta", {"attention": dataclasses.replace(ATTENTION, rope_base=10_000.0)}),
        ("rope_scaling", {"attention": PLAIN}),
    ],
)
def test_missing_field_with_a_default(name, fallback):
    assert model_config(without(name), "x") == dataclasses.replace(CONFIG, **fallback)


@pytest.mark.parametrize(
    "name",
    sorted(
        FIELDS.keys()
        - {"num_nextn_predict_layers", "rms_norm_eps", "initializer_range", "rope_theta"}
        - {"rope_scaling"}
    ),
)
def test_missing_field_without_a_default(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(without(name)))
    with pytest.raises(KeyError, match=rf"{tmp_path}/config.json: {name} is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize("bad", ["7", 7.0, None, True, [7], {}])
@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "kv_lora_rank", "n_group"])
def test_sizes_are_whole_numbers(name, bad):
    with pytest.raises(ValueError, match=rf"x\.json: {name}=.* must be a whole number$"):
        read(**{name: bad})


@pytest.mark.parametrize("bad", ["1", None, False, [1.0], float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["rms_norm_eps", "routed_scaling_factor", "rope_theta"])
def test_rates_are_numbers(name, bad):
    with pytest.raises(ValueError, match=rf"x\.json: {name}=.* must be a finite number"):
        read(**{name: bad})


@pytest.mark.parametrize(
    "name, bad, words",
    [
        ("norm_topk_prob", 1, "true or false"),
        ("norm_topk_prob", None, "true or false"),
        ("q_lora_rank", "9", "a whole number or null"),
        ("q_lora_rank", 9.5, "a whole number or null"),
    ],
)
def test_other_bad_types(name, bad, words):
    with pytest.raises(ValueError, match=rf"x\.json: {name}={bad!r} must be {words}"):
        read(**{name: bad})


def test_no_query_rank():
    assert read(q_lora_rank=None).attention.q_rank is None


def test_floats_written_as_whole_numbers():
    assert isinstance(read(routed_scaling_factor=2).moe.scale, float)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_group": 5}, "n_routed_experts=12 must be a multiple of n_group=5"),
        ({"topk_group": 6}, "topk_group=6 exceeds n_group=4"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim=3 must be even"),
        ({"hidden_size": 0}, "hidden_size=0 must be positive"),
        ({"rope_scaling": FIELDS["rope_scaling"] | {"factor": -1}}, "factor=-1.0 must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_told_in_official_names(changes, words):
    with pytest.raises(ValueError, match=rf"x\.json: {words}"):
        read(**changes)


FIXED = {
    "model_type": ("deepseek_v3", ["deepseek_v2", None]),
    "hidden_act": ("silu", ["gelu", None]),
    "scoring_func": ("sigmoid", ["softmax"]),
    "topk_method": ("noaux_tc", ["group_limited_greedy", "greedy"]),
    "moe_layer_freq": (1, [2, True]),
    "attention_bias": (False, [True, 0]),
    "attention_dropout": (0.0, [0.1, None, False]),
    "tie_word_embeddings": (False, [True]),
    "pretraining_tp": (1, [2]),
    "rope_interleave": (True, [False, None]),
    "mlp_bias": (False, [True]),
    "partial_rotary_factor": (1.0, [0.5]),
}


@pytest.mark.parametrize("name", FIXED)
def test_fields_with_one_value(name):
    value, others = FIXED[name]
    assert read(**{name: value}) == CONFIG
    for other in others:
        with pytest.raises(
            ValueError, match=rf"x\.json: {name}={other!r} must be {value!r} \(.+\)"
        ):
            read(**{name: other})


@pytest.mark.parametrize(
    "name, value", [("num_key_value_heads", 17), ("head_dim", 18), ("qk_head_dim", 24)]
)
def test_fields_that_repeat_others(name, value):
    assert read(**{name: value}) == read(**{name: None}) == CONFIG
    with pytest.raises(ValueError, match=rf"x\.json: {name}=11 must be {value} \(.+\)"):
        read(**{name: 11})


def test_fields_without_effect():
    """What the release, transformers 4 and transformers 5 write around the model's fields."""
    assert CONFIG == read(
        architectures=["DeepseekV3ForCausalLM"],
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        aux_loss_alpha=0.001,
        seq_aux=True,
        ep_size=1,
        bos_token_id=0,
        eos_token_id=[1, 2],
        pad_token_id=None,
        max_position_embeddings=163_840,
        torch_dtype="bfloat16",
        dtype="float32",
        transformers_version="4.33.1",
        use_cache=False,
        output_router_logits=True,
        return_dict=True,
        id2label={"0": "LABEL_0"},
        temperature=0.6,
        _name_or_path="/tmp/x",
    )


@pytest.mark.parametrize(
    "name, near",
    [
        ("num_hidden_layer", "num_hidden_layers"),
        ("v_head_dimension", "v_head_dim"),
        ("index_topk", None),
        ("per_layer_config", None),
        ("layer_types", None),
        ("", None),
    ],
)
def test_unknown_field(name, near):
    with pytest.raises(ValueError, match=rf"x\.json: field {name}=7 is not understood") as caught:
        read(**{name: 7})
    assert "if it has no effect on the model remove it" in str(caught.value)
    assert near is None or f"did you mean {near!r}?" in str(caught.value)


# FP8


@pytest.mark.parametrize("more", [{}, {"scale_fmt": "ue8m0"}, {"modules_to_not_convert": ["a"]}])
def test_fp8_blocks(more):
    assert read(quantization_config=FP8 | more) == read(quantization_config=None) == CONFIG


@pytest.mark.parametrize(
    "name, bad",
    [
        ("quant_method", "awq"),
        ("fmt", "e5m2"),
        ("weight_block_size", [64, 128]),
        ("weight_block_size", None),
        ("activation_scheme", "static"),
        ("expert_dtype", "fp4"),
        ("bits", 4),
    ],
)
def test_other_quantization_is_refused(name, bad):
    with pytest.raises(ValueError, match=rf"x\.json: quantization_config: (field )?{name}="):
        read(quantization_config=FP8 | {name: bad})


# Which layers have experts


MOE_FIELDS = [
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "norm_topk_prob",
]


@pytest.mark.parametrize("n_dense", [13, 14, 61])
def test_dense_only(n_dense):
    fields = FIELDS | {"first_k_dense_replace": n_dense, "num_nextn_predict_layers": 0}
    want = dataclasses.replace(CONFIG, n_dense=13, moe=None, mtp_depth=0)
    assert model_config(fields, "x") == want
    assert model_config(without(*MOE_FIELDS, fields=fields), "x") == want


def test_mtp_on_dense_layers_has_experts():
    assert read(first_k_dense_replace=13) == dataclasses.replace(CONFIG, n_dense=13)


def test_all_layers_with_experts():
    assert read(first_k_dense_replace=0) == dataclasses.replace(CONFIG, n_dense=0)


# Files


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[]", r"\[\] must be a JSON object"),
        (b"7", "7 must be a JSON object"),
    ],
)
def test_files_that_are_no_config(content, words, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json: {words}"):
        read_config(tmp_path)


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/config.json"):
        read_config(tmp_path)


# Writing


CONFIGS = {path.name: read_config(path) for path in GOLDENS} | {
    "all": CONFIG,
    "plain rope": dataclasses.replace(CONFIG, attention=PLAIN),
    "mscale 1, 0": with_yarn(mscale=1.0, mscale_all_dim=0.0),
    "no q rank": dataclasses.replace(CONFIG, attention=dataclasses.replace(PLAIN, q_rank=None)),
    "not normalized": dataclasses.replace(
        CONFIG, moe=dataclasses.replace(EXPERTS, normalize=False, n_shared=0)
    ),
    "all MoE": dataclasses.replace(CONFIG, n_dense=0),
    "dense with MTP": dataclasses.replace(CONFIG, n_dense=13),
    "dense": dataclasses.replace(CONFIG, n_dense=13, moe=None, mtp_depth=0),
}


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_written_config_reads_back(name, fp8, tmp_path):
    fields = official_config(CONFIGS[name], "bfloat16", fp8)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path) == CONFIGS[name]
    assert fields["torch_dtype"] == "bfloat16"
    assert fields.get("quantization_config") == (FP8 if fp8 else None)
    assert fields.keys() <= KNOWN


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name)
def test_written_config_has_the_goldens_fields(path):
    """All that decides something, as the release spells it."""
    want = json.loads((path / "config.json").read_text())
    got = official_config(read_config(path), want["torch_dtype"], "quantization_config" in want)
    of_others = {"bos_token_id", "eos_token_id", "ep_size", "transformers_version", "use_cache"}
    assert got == without(*of_others, fields=want) | {"rope_interleave": True, "pretraining_tp": 1}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mscale": 0.7, "mscale_all_dim": 0.0}, "mscale=0.7 and mscale_all_dim=0.0"),
        ({"mscale": 0.0}, "mscale=0.0 and mscale_all_dim=0.9"),
        ({"beta_slow": 0.0}, "beta_slow=0.0"),
    ],
)
def test_config_without_an_official_form(changes, words):
    with pytest.raises(ValueError, match=words):
        official_config(with_yarn(**changes), "float32", False)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_written_config(name, tmp_path):
    """And what it saves then, in its own spelling, is still the same config."""
    transformers = pytest.importorskip("transformers")
    fields = official_config(CONFIGS[name], "float32", False)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "DeepseekV3Config"
    loaded.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == CONFIGS[name]
