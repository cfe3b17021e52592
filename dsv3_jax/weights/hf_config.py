"""The config.json of the official release: the meaning of every field, read strictly, and written.

A field is mapped onto ours (the first tables), or has one value that our formulas are right for
(FIXED), or repeats others (DERIVED), or does not change the model's numbers (IGNORED); a field that
is none of these is refused. A mapped field must be there unless it has one of the DEFAULTS, which
are those of transformers 5.23 and of the released code.
"""

import json
import math
import re
import typing
from collections.abc import Mapping
from pathlib import Path

from dsv3_jax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from dsv3_jax.errors import did_you_mean

# Our field -> the official one.
MODEL = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "n_layers": "num_hidden_layers",  # without the MTP modules, whose layers follow
    "n_dense": "first_k_dense_replace",  # leading layers with a dense FFN
    "dense_hidden": "intermediate_size",
    "mtp_depth": "num_nextn_predict_layers",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
ATTENTION = {
    "n_heads": "num_attention_heads",
    "q_rank": "q_lora_rank",  # null: queries are projected in one step
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
}
MOE = {
    "n_experts": "n_routed_experts",
    "n_shared": "n_shared_experts",
    "hidden": "moe_intermediate_size",
    "top_k": "num_experts_per_tok",
    "n_groups": "n_group",
    "topk_groups": "topk_group",
    "scale": "routed_scaling_factor",
    "normalize": "norm_topk_prob",  # the chosen experts' weights sum to 1 before scaling
}
YARN = {  # within rope_scaling or rope_parameters
    "factor": "factor",
    "original_length": "original_max_position_embeddings",  # else max_position_embeddings
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
DEFAULTS = {
    "num_nextn_predict_layers": 0,  # transformers assumes 1, but files with MTP say so
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,  # of new weights only
    "rope_theta": 10_000.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
# Official field -> the value it must have if it is there, and why; an export writes these.
FIXED = {
    "model_type": ("deepseek_v3", "the architecture of this package"),
    "hidden_act": ("silu", "the gate of SwiGLU"),
    "scoring_func": ("sigmoid", "affinities of the router"),
    "topk_method": ("noaux_tc", "biased choice of experts within the best groups"),
    "moe_layer_freq": (1, "every layer after the dense ones has experts"),
    "attention_bias": (False, "no projection has a bias"),
    "attention_dropout": (0.0, "there is no dropout"),
    "tie_word_embeddings": (False, "embedding and head are two arrays"),
    "pretraining_tp": (1, "a projection is one matmul"),
    "rope_interleave": (True, "dims rotate in neighbouring pairs; null means halves there"),
}
FIXED_BUT_NOT_WRITTEN = {
    "mlp_bias": (False, "no projection has a bias"),
    "partial_rotary_factor": (1.0, "all of qk_rope_head_dim rotates"),
}
FIXED_ROPE = {
    "partial_rotary_factor": (1.0, "all of qk_rope_head_dim rotates"),
    "attention_factor": (None, "the temperature follows from mscale and mscale_all_dim"),
    "truncate": (True, "YaRN's blend begins and ends at whole pairs"),
}
QUANTIZATION = {  # within quantization_config: the format of FP8 weights in the files
    "quant_method": ("fp8", "the release's format"),
    "fmt": ("e4m3", "4 bits of exponent, 3 of fraction"),
    "weight_block_size": ([128, 128], "one scale a block of weights"),
    "activation_scheme": ("dynamic", "activations are scaled when they are quantized"),
    "expert_dtype": ("fp8", "experts have the format of the other weights"),
}
# The files say themselves which tensors are FP8 and what their scales are.
QUANTIZATION_IGNORED = set(
    "scale_fmt modules_to_not_convert modules_to_convert ignored_layers dequantize".split()
)
# Official field -> the fields it repeats; null leaves it to be derived.
DERIVED = {
    "num_key_value_heads": ("num_attention_heads", lambda a: a.n_heads),
    "head_dim": ("qk_rope_head_dim", lambda a: a.rope_dim),
    "qk_head_dim": ("qk_nope_head_dim + qk_rope_head_dim", lambda a: a.nope_dim + a.rope_dim),
}
ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}
IGNORED = set(
    # Lengths and training: these are in our configs of data and losses.
    "max_position_embeddings aux_loss_alpha seq_aux ep_size router_aux_loss_coef "
    # The writer of the file, and the dtype of the weights, which every tensor states itself.
    "architectures auto_map transformers_version dtype torch_dtype _name_or_path name_or_path "
    "_commit_hash _attn_implementation_autoset attn_implementation experts_implementation "
    # Tokenizer and generation.
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class "
    "prefix use_cache max_length min_length do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    # What a call returns, other tasks, and other kinds of model.
    "output_router_logits output_hidden_states output_attentions return_dict "
    "chunk_size_feed_forward id2label label2id num_labels problem_type finetuning_task "
    "task_specific_params is_encoder_decoder is_decoder add_cross_attention "
    "cross_attention_hidden_size tie_encoder_decoder torchscript use_bfloat16 tf_legacy_loss "
    "pruned_heads".split()
)
KNOWN = {*MODEL.values(), *ATTENTION.values(), *MOE.values(), *FIXED, *FIXED_BUT_NOT_WRITTEN}
KNOWN |= {*DERIVED, *ROPE, *IGNORED, "quantization_config"}

NO_EXPERTS = MoEConfig(n_experts=1, n_shared=1, hidden=1, top_k=1)  # in exports of dense models
PRETRAINING_LENGTH = 4096  # tokens (report sec. 4.2), without context extension


def read_config(directory: str | Path) -> ModelConfig:
    """Return the `ModelConfig` of a checkpoint folder's config.json.

    Raises:
        KeyError: a field is missing.
        ValueError: a field is unknown, or has a value or type that is not understood, or the file
            is not a JSON object.
    """
    path = Path(directory) / "config.json"
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    return model_config(fields, str(path))


def read_max_length(directory: str | Path) -> int:
    """Return the most tokens of a text, from the config.json of a checkpoint folder."""
    path = Path(directory) / "config.json"
    fields = json.loads(path.read_bytes())
    if "max_position_embeddings" not in fields:
        return max_length_of(model_config(fields, str(path)))
    return _value(fields, "max_position_embeddings", int, str(path))


def max_length_of(config: ModelConfig) -> int:
    """Return the most tokens of a text that a model can read, by its config alone."""
    yarn = config.attention.yarn
    return round(yarn.factor * yarn.original_length) if yarn else PRETRAINING_LENGTH


def model_config(fields: typing.Any, where: str) -> ModelConfig:
    """Return the `ModelConfig` that official fields describe; errors begin with `where`."""
    _check_values(fields, FIXED | FIXED_BUT_NOT_WRITTEN, where)
    _check_names(fields, KNOWN, where)
    if (quantization := fields.get("quantization_config")) is not None:
        inside = f"{where}: quantization_config"
        _check_values(quantization, QUANTIZATION, inside)
        _check_names(quantization, {*QUANTIZATION, *QUANTIZATION_IGNORED}, inside)
    sizes = _read(ModelConfig, MODEL, fields, where)
    sizes["n_dense"] = min(sizes["n_dense"], sizes["n_layers"])
    has_experts = sizes["n_dense"] < sizes["n_layers"] or sizes["mtp_depth"] > 0
    experts = _read(MoEConfig, MOE, fields, where) if has_experts else None
    heads = _read(AttentionConfig, ATTENTION, fields, where)
    base, yarn = _read_rope(fields, where)
    try:
        attention = AttentionConfig(
            **heads, rope_base=base, yarn=YarnConfig(**yarn) if yarn else None
        )
        moe = MoEConfig(**experts) if experts else None
        config = ModelConfig(**sizes, attention=attention, moe=moe)
    except ValueError as error:
        raise ValueError(f"{where}: {_with_official_names(str(error))}") from error
    for name, (meaning, derive) in DERIVED.items():
        if fields.get(name) not in (None, derive(attention)):
            raise ValueError(
                f"{where}: {name}={fields[name]!r} must be {derive(attention)} ({meaning})"
            )
    return config


def official_config(config: ModelConfig, dtype: str, fp8: bool) -> dict:
    """Return the fields of config.json for an export; `model_config` reads `config` from them.

    Args:
        dtype: of the weights, or with `fp8` of those that are not FP8.
        fp8: whether the projections are E4M3 blocks with scales, as in the release.

    Raises:
        ValueError: the config has no official form.
    """
    attention, yarn = config.attention, config.attention.yarn
    fields = {
        "architectures": ["DeepseekV3ForCausalLM"],
        **{name: value for name, (value, _) in FIXED.items()},
        **_write(config, MODEL),
        **_write(attention, ATTENTION),
        "num_key_value_heads": attention.n_heads,
        **_write(config.moe or NO_EXPERTS, MOE),
        "max_position_embeddings": max_length_of(config),
        "rope_theta": attention.rope_base,
        "rope_scaling": {"type": "yarn"} | _write(yarn, YARN) if yarn else None,
        "torch_dtype": dtype,
    }
    if fp8:
        release = ("quant_method", "fmt", "weight_block_size", "activation_scheme")
        fields["quantization_config"] = {name: QUANTIZATION[name][0] for name in release}
    if model_config(fields, "official_config") != config:
        raise ValueError(f"config.json cannot say all of {config}")
    return fields


def _write(config, names: Mapping[str, str]) -> dict:
    return {official: getattr(config, ours) for ours, official in names.items()}


def _read(kind: type, names: Mapping[str, str], fields: Mapping, where: str) -> dict:
    """Return arguments for the config class `kind`, each of the type it is annotated with."""
    types = typing.get_type_hints(kind)
    return {ours: _value(fields, name, types[ours], where) for ours, name in names.items()}


def _value(fields: Mapping, name: str, wanted, where: str):
    """Return one field, which must be of type `wanted`: bool, int, int | None or float."""
    if name not in fields:
        if name in DEFAULTS:
            return DEFAULTS[name]
        raise KeyError(f"{where}: {name} is missing")
    value = fields[name]
    if wanted is bool:
        fits, words = isinstance(value, bool), "true or false"
    elif wanted is float:
        fits, words = type(value) in (int, float) and math.isfinite(value), "a finite number"
    else:
        fits, words = type(value) is int, "a whole number"
        if wanted == int | None:
            fits, words = fits or value is None, "a whole number or null"
    if not fits:
        raise ValueError(f"{where}: {name}={value!r} must be {words}")
    return float(value) if wanted is float else value


def _with_official_names(message: str) -> str:
    """Return an error of our config classes with official names: "n_routed_experts=7"."""
    sections = {"model": MODEL, "attention": ATTENTION, "moe": MOE, "yarn": YARN}
    return re.sub(
        r"\b(model|attention|moe|yarn)\.(\w+)", lambda m: sections[m[1]].get(m[2], m[0]), message
    )


def _check_names(fields: Mapping, known: set[str], where: str):
    for name in sorted(fields.keys() - known):
        raise ValueError(
            f"{where}: field {name}={fields[name]!r} is not understood; if it has no effect on the "
            f"model remove it; {did_you_mean(name, known - IGNORED)}"
        )


def _check_values(fields: typing.Any, fixed: Mapping[str, tuple], where: str):
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: {fields!r} must be a JSON object")
    for name, (wanted, why) in fixed.items():
        value = fields.get(name, wanted)
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            raise ValueError(f"{where}: {name}={value!r} must be {wanted!r} ({why})")


def _read_rope(fields: Mapping, where: str) -> tuple[float, dict | None]:
    """Return rope base and YaRN arguments, from the released spelling, transformers 5's, or both.

    Released: rope_theta beside rope_scaling. transformers 5: all in rope_parameters.
    """
    bases, yarns = {}, {}
    if "rope_theta" in fields:
        bases["rope_theta"] = _value(fields, "rope_theta", float, where)
    for name in ("rope_scaling", "rope_parameters"):
        if (rope := fields.get(name)) is None:
            continue
        yarns[name] = _read_yarn(rope, fields, f"{where}: {name}")
        if "rope_theta" in rope:
            bases[f"{name}.rope_theta"] = _value(rope, "rope_theta", float, f"{where}: {name}")
    for found in (bases, yarns):
        if any(value != next(iter(found.values())) for value in found.values()):
            both = " but ".join(f"{name}={value}" for name, value in found.items())
            raise ValueError(f"{where}: {both}; they must agree")
    base = next(iter(bases.values()), DEFAULTS["rope_theta"])
    return base, next(iter(yarns.values()), None)


def _read_yarn(rope: typing.Any, fields: Mapping, where: str) -> dict | None:
    """Return YaRN's arguments from one spelling within `fields`; None for the default type."""
    names = {"rope_theta", "rope_type", "type"}
    _check_values(rope, FIXED_ROPE, where)
    _check_names(rope, names | {*FIXED_ROPE, *YARN.values()}, where)
    types = {name: rope[name] for name in ("rope_type", "type") if name in rope}
    rope_type = next(iter(types.values()), "default")
    for name, value in types.items():
        if value not in ("yarn", "default") or value != rope_type:
            raise ValueError(f"{where}: {name}={value!r} must be 'yarn' or 'default'; got {types}")
    if rope_type == "default":
        _check_names(rope, names | {*FIXED_ROPE}, f"{where} of type 'default'")
        return None
    unset = {name for name in ("beta_fast", "beta_slow") if not rope.get(name)}  # as transformers
    rope = {name: value for name, value in rope.items() if name not in unset}
    if "max_position_embeddings" in fields:
        rope = {"original_max_position_embeddings": fields["max_position_embeddings"]} | rope
    return _read(YarnConfig, YARN, rope | _mscales(rope, where), where)


def _mscales(rope: Mapping, where: str) -> dict:
    """Return `mscale` and `mscale_all_dim` for our formula, where `rope` does not give both.

    Without both, transformers does not scale the softmax and scales the rotated dims with
    0.1 ln(factor) + 1, which is mscale 1 and mscale_all_dim 0. If just one is given, transformers
    differs from the released code.
    """
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if not all_dim and mscale in (None, 1):
        return {"mscale": 1.0, "mscale_all_dim": 0.0}
    if not mscale or not all_dim:
        raise ValueError(
            f"{where}: mscale={mscale!r} and mscale_all_dim={all_dim!r} are read differently by "
            f"transformers and the released code; give both or neither"
        )
    return {}
