"""One config in our words and in those of config.json, every value another."""

import dataclasses

from dsv3_jax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from dsv3_jax.weights.hf_config import model_config

YARN = YarnConfig(
    factor=40.0, original_length=64, beta_fast=31.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.9
)
ATTENTION = AttentionConfig(
    n_heads=17, q_rank=9, kv_rank=8, nope_dim=6, rope_dim=18, value_dim=19, rope_base=5e4, yarn=YARN
)
EXPERTS = MoEConfig(
    n_experts=12, n_shared=2, hidden=7, top_k=5, n_groups=4, topk_groups=3, scale=1.5
)
CONFIG = ModelConfig(
    vocab_size=101,
    width=16,
    n_layers=13,
    n_dense=10,
    dense_hidden=33,
    attention=ATTENTION,
    moe=EXPERTS,
    mtp_depth=14,
    norm_eps=1e-5,
    init_std=0.01,
)
PLAIN = dataclasses.replace(ATTENTION, yarn=None)
# The same, as the release spells it.
FIELDS = {
    "vocab_size": 101,
    "hidden_size": 16,
    "num_hidden_layers": 13,
    "first_k_dense_replace": 10,
    "intermediate_size": 33,
    "num_nextn_predict_layers": 14,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.01,
    "num_attention_heads": 17,
    "q_lora_rank": 9,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 18,
    "v_head_dim": 19,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "moe_intermediate_size": 7,
    "num_experts_per_tok": 5,
    "n_group": 4,
    "topk_group": 3,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "rope_theta": 50_000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "beta_fast": 31,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
    },
}


def read(**changes) -> ModelConfig:
    return model_config(FIELDS | changes, "x.json")


def without(*names: str, fields: dict = FIELDS) -> dict:
    assert fields.keys() >= set(names)
    return {name: value for name, value in fields.items() if name not in names}


def with_yarn(**changes) -> ModelConfig:
    yarn = dataclasses.replace(YARN, **changes)
    attention = dataclasses.replace(ATTENTION, yarn=yarn)
    return dataclasses.replace(CONFIG, attention=attention)
