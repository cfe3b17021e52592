"""Official tensor names and config fields: the only file that knows them.

Official matrices are [out, in], ours [in, out]; gate and up are two tensors there and one matrix
here; an expert is a tensor there and an index here, as is a layer.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from dsv3_jax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from dsv3_jax.model import DeepSeekV3, abstract_model
from dsv3_jax.numerics.policy import Policy

TOP = {
    "embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head": "lm_head.weight",
}
# Within a layer: our path -> official names, side by side where ours is one matrix.
LAYER = {
    "attention_norm.scale": ("input_layernorm.weight",),
    "ffn_norm.scale": ("post_attention_layernorm.weight",),
    "attention.q_down.kernel": ("self_attn.q_a_proj.weight",),
    "attention.q_norm.scale": ("self_attn.q_a_layernorm.weight",),
    "attention.q_up.kernel": ("self_attn.q_b_proj.weight",),
    "attention.kv_down.kernel": ("self_attn.kv_a_proj_with_mqa.weight",),
    "attention.kv_norm.scale": ("self_attn.kv_a_layernorm.weight",),
    "attention.kv_up.kernel": ("self_attn.kv_b_proj.weight",),
    "attention.out.kernel": ("self_attn.o_proj.weight",),
    "ffn.router": ("mlp.gate.weight",),
    "ffn.bias": ("mlp.gate.e_score_correction_bias",),
    "ffn.shared.gate_up.kernel": (
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    ),
    "ffn.shared.down.kernel": ("mlp.shared_experts.down_proj.weight",),
    "ffn.gate_up.kernel": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.down.kernel": ("mlp.down_proj.weight",),
    "ffn.gate_up": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    "ffn.down": ("mlp.experts.{e}.down_proj.weight",),
    "embedding_norm.scale": ("enorm.weight",),
    "hidden_norm.scale": ("hnorm.weight",),
    "join.kernel": ("eh_proj.weight",),
    "norm.scale": ("shared_head.norm.weight",),
}
WITHOUT_Q_RANK = {"attention.q_up.kernel": ("self_attn.q_proj.weight",)}


def read_config(directory: str | Path) -> ModelConfig:
    """The `ModelConfig` of a checkpoint folder's config.json."""
    hf = json.loads((Path(directory) / "config.json").read_text())
    moe = None
    if hf["num_hidden_layers"] > hf["first_k_dense_replace"]:
        moe = MoEConfig(
            n_experts=hf["n_routed_experts"],
            n_shared=hf["n_shared_experts"],
            hidden=hf["moe_intermediate_size"],
            top_k=hf["num_experts_per_tok"],
            n_groups=hf["n_group"],
            n_groups_kept=hf["topk_group"],
            scale=hf["routed_scaling_factor"],
            normalize=hf["norm_topk_prob"],
        )
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_dense=hf["first_k_dense_replace"],
        dense_hidden=hf["intermediate_size"],
        attention=_read_attention(hf),
        moe=moe,
        mtp_depth=hf.get("num_nextn_predict_layers", 0),
        norm_eps=hf["rms_norm_eps"],
        init_std=hf["initializer_range"],
    )


def _read_attention(hf: dict) -> AttentionConfig:
    yarn = None
    if scaling := hf.get("rope_scaling"):
        yarn = YarnConfig(
            factor=scaling["factor"],
            original_length=scaling["original_max_position_embeddings"],
            beta_fast=scaling["beta_fast"],
            beta_slow=scaling["beta_slow"],
            mscale=scaling["mscale"],
            mscale_all_dim=scaling["mscale_all_dim"],
        )
    return AttentionConfig(
        n_heads=hf["num_attention_heads"],
        q_rank=hf["q_lora_rank"],
        kv_rank=hf["kv_lora_rank"],
        nope_dim=hf["qk_nope_head_dim"],
        rope_dim=hf["qk_rope_head_dim"],
        value_dim=hf["v_head_dim"],
        rope_base=hf["rope_theta"],
        yarn=yarn,
    )


class Tensors(Mapping):
    """The tensors of a checkpoint folder by official name, each read when it is asked for."""

    def __init__(self, directory: str | Path):
        files = sorted(Path(directory).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{directory}: no .safetensors file in this folder")
        self._opened = [safe_open(file, framework="numpy") for file in files]
        self._where = {name: file for file in self._opened for name in file.keys()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def official_names(path: str, config: ModelConfig) -> np.ndarray:
    """Names of the tensors that one of our parameters is made of.

    Returns:
        Array of str [*stack parts]: stack is (), (layers,) or (layers, experts) as in our
        parameter; parts stand side by side in its last dim.
    """
    if path in TOP:
        return np.array([TOP[path]], dtype=object)
    kind, _, inner = path.partition(".")
    first, count = {
        "dense": (0, config.n_dense),
        "moe": (config.n_dense, config.n_layers - config.n_dense),
        "mtp": (config.n_layers, config.mtp_depth),
    }[kind]
    table = LAYER if config.attention.q_rank is not None else LAYER | WITHOUT_Q_RANK
    parts = table[inner.removeprefix("block.")]
    layers = [f"model.layers.{layer}." for layer in range(first, first + count)]
    if "{e}" not in parts[0]:
        return np.array([[layer + part for part in parts] for layer in layers], dtype=object)
    experts = range(config.moe.n_experts)
    named = [[[layer + part.format(e=e) for part in parts] for e in experts] for layer in layers]
    return np.array(named, dtype=object)


def from_official(
    tensors: Mapping[str, np.ndarray], paths: Iterable[str], config: ModelConfig
) -> dict[str, np.ndarray]:
    """Our parameters, by dotted path, from official tensors."""
    out = {}
    for path in paths:
        names = official_names(path, config)
        turn = path not in TOP
        rows = [
            np.concatenate([tensors[n].T if turn else tensors[n] for n in row], axis=-1)
            for row in names.reshape(-1, names.shape[-1])
        ]
        out[path] = np.stack(rows).reshape(*names.shape[:-1], *rows[0].shape)
    return out


def to_official(values: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Official tensors from values in the shape of our parameters: undoes `from_official`."""
    out = {}
    for path, value in values.items():
        names = official_names(path, config)
        for index in np.ndindex(names.shape[:-1]):
            parts = np.split(np.asarray(value)[index], names.shape[-1], axis=-1)
            turned = [part if path in TOP else part.T for part in parts]
            out |= dict(zip(names[index], turned, strict=True))
    return out


def flatten(state: nnx.State) -> dict:
    """The arrays of a model state by dotted path."""
    return {".".join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def load_model(directory: str | Path, dtype: str = "float32") -> DeepSeekV3:
    """The model of a checkpoint folder, on one device, with weights and compute in `dtype`."""
    config = read_config(directory)
    policy = Policy(compute=np.dtype(dtype), master=np.dtype(dtype))
    graphdef, state = nnx.split(abstract_model(config, policy))
    values = from_official(Tensors(directory), flatten(state), config)

    def fill(path, variable):
        value = values[".".join(path)]
        if value.shape != variable.shape:
            raise ValueError(
                f"{directory}: {path} has shape {value.shape}, expected {variable.shape}"
            )
        wide = not isinstance(variable, nnx.Param) or variable.wide
        return variable.replace(jnp.asarray(value, jnp.float32 if wide else dtype))

    return nnx.merge(graphdef, nnx.map_state(fill, state))
