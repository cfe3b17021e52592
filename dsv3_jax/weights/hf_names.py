"""Official tensor names, which no other file knows.

Official matrices are [out, in], ours [in, out]. Gate and up are two official tensors and one of our
matrices. Each expert and each layer has official tensors of its own; here they are indices of
stacked arrays.
"""

import functools
from collections.abc import Mapping

import numpy as np
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.deepseek import abstract_model
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.params import named_arrays

BIAS = "e_score_correction_bias"  # the one tensor that is float32 in every format
OUTSIDE_LAYERS = {
    "embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head": "lm_head.weight",
}
# Within a layer: our path -> official names, concatenated where ours is one matrix.
IN_LAYER = {
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
    "ffn.bias": (f"mlp.gate.{BIAS}",),
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
NOT_FP8 = ("join.kernel",)
SCALE = "_scale_inv"  # after the name of an FP8 tensor: the name of its scales
MTP_COPIES = {"embed_tokens.weight": "embedding", "shared_head.head.weight": "head"}
WITHOUT_Q_RANK = {"attention.q_up.kernel": ("self_attn.q_proj.weight",)}


def official_names(path: str, config: ModelConfig) -> np.ndarray:
    """Return the names of the tensors that one of our parameters is made of.

    Returns:
        Array of str [*stack tensors]: stack is (), (layers,) or (layers, experts) as in our
        parameter; the tensors are concatenated in its last dim.
    """
    if path in OUTSIDE_LAYERS:
        return np.array([OUTSIDE_LAYERS[path]], dtype=object)
    kind, _, inner = path.partition(".")
    first, count = {
        "dense": (0, config.n_dense),
        "moe": (config.n_dense, config.n_layers - config.n_dense),
        "mtp": (config.n_layers, config.mtp_depth),
    }[kind]
    table = IN_LAYER if config.attention.q_rank is not None else IN_LAYER | WITHOUT_Q_RANK
    tensors = table[inner.removeprefix("block.")]
    layers = [f"model.layers.{layer}." for layer in range(first, first + count)]
    if "{e}" not in tensors[0]:
        return np.array([[layer + name for name in tensors] for layer in layers], dtype=object)
    experts = range(config.moe.n_experts)
    names = [[[layer + name.format(e=e) for name in tensors] for e in experts] for layer in layers]
    return np.array(names, dtype=object)


@functools.cache
def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and balance bias of the model, by dotted path."""
    state = nnx.state(abstract_model(config, Policy()))
    return {path: leaf.shape for path, leaf in named_arrays(state).items()}


def official_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a checkpoint of the config holds, by name."""
    shapes = {}
    for path, whole in param_shapes(config).items():
        names = official_names(path, config)
        shape = (*whole[names.ndim - 1 : -1], whole[-1] // names.shape[-1])
        shapes |= dict.fromkeys(names.reshape(-1), shape[::-1] if is_transposed(path) else shape)
    return shapes


def is_transposed(path: str) -> bool:
    """Return whether the official matrix is the transpose of ours: all but embedding and head."""
    return path not in OUTSIDE_LAYERS


def is_fp8(path: str) -> bool:
    """Return whether the released files hold the parameter in FP8: the matrices of all layers.

    Embedding, head, norms, router and MTP's eh_proj are not in FP8 (report sec. 3.3.1).
    """
    inner = path.partition(".")[2].removeprefix("block.")
    return inner not in NOT_FP8 and inner.rpartition(".")[2] in ("kernel", "gate_up", "down")


def fp8_names(config: ModelConfig) -> set[str]:
    """Return the names of the tensors that the released files hold in FP8."""
    arrays = (official_names(path, config) for path in param_shapes(config) if is_fp8(path))
    return {name for names in arrays for name in names.reshape(-1)}


def copies_in_mtp(config: ModelConfig) -> dict[str, str]:
    """Map each tensor that files may repeat for every MTP layer to the tensor it repeats."""
    layers = range(config.n_layers, config.n_layers + config.mtp_depth)
    return {
        f"model.layers.{layer}.{copy}": OUTSIDE_LAYERS[path]
        for layer in layers
        for copy, path in MTP_COPIES.items()
    }


def to_official(
    params: Mapping[str, np.ndarray], config: ModelConfig, first_layer: int = 0
) -> dict[str, np.ndarray]:
    """Return official tensors from our parameters.

    Args:
        params: arrays by dotted path; stacks may hold a few of the model's layers.
        first_layer: the layer of the model that stacks begin with.
    """
    tensors = {}
    for path, value in params.items():
        names = official_names(path, config)
        if is_transposed(path):
            names = names[first_layer : first_layer + len(value)]
        for index in np.ndindex(names.shape[:-1]):
            matrices = np.split(np.asarray(value)[index], names.shape[-1], axis=-1)
            if is_transposed(path):
                matrices = [matrix.T for matrix in matrices]
            tensors |= dict(zip(names[index], matrices, strict=True))
    return tensors
