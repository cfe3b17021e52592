"""The parameters that a token meets and the FLOPs that it costs, part by part of the model.

Parameters are counted on the model's own shapes. The FLOPs of a forward are 2 per multiplied
parameter and attention's two matmuls of causal scores; training takes three times that.
"""

import functools

import jax
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.deepseek import abstract_model
from dsv3_jax.model.moe import BalanceBias
from dsv3_jax.numerics.policy import Policy


@functools.cache
def activated_by_part(config: ModelConfig) -> dict[str, int]:
    """Return the parameters that one token meets: those of its `top_k` experts, not of the others.

    Of the layers ("dense", "moe", "mtp") the parameters of one; 0 where the model has none.
    """
    model = abstract_model(config, Policy())
    n_moe = config.n_layers - config.n_dense
    n_layers = {"dense": config.n_dense, "moe": n_moe, "mtp": config.mtp_depth}
    idle = 0
    if config.moe is not None:
        idle = (config.moe.n_experts - config.moe.top_k) * 3 * config.width * config.moe.hidden
    parts = {}
    for name in ("embedding", "dense", "moe", "norm", "head", "mtp"):
        state = nnx.state(model, (nnx.Param, BalanceBias)).get(name, {})
        size = sum(leaf.size for leaf in jax.tree.leaves(state))
        parts[name] = size // n_layers.get(name, 1) if size else 0
        if name in ("moe", "mtp") and size:
            parts[name] -= idle
    return parts


def activated_parameters(config: ModelConfig) -> int:
    """Return the parameters of the main model that one token meets, with the embedding.

    Source: DeepSeek-V3 report, sec. 2: 37B.
    """
    parts = activated_by_part(config)
    n_moe = config.n_layers - config.n_dense
    layers = config.n_dense * parts["dense"] + n_moe * parts["moe"]
    return parts["embedding"] + layers + parts["norm"] + parts["head"]


def forward_flops(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Return the FLOPs of a forward per token: one layer of each kind, final norm, and head.

    The causal mask leaves half of the T x T pairs of tokens.
    """
    a, parts = config.attention, activated_by_part(config)
    scores = seq_len * a.n_heads * (a.nope_dim + a.rope_dim + a.value_dim)  # 2 * T/2 each
    flops = {name: 2.0 * n for name, n in parts.items() if name != "embedding"}
    return {
        name: n + scores if name in ("dense", "moe", "mtp") and n else n
        for name, n in flops.items()
    }


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return the FLOPs of forward and backward per token, without MTP and recomputation.

    Source: hardware paper (arXiv 2505.09343), table 2, whose 250 GFLOP at 4096 this gives.
    """
    flops = forward_flops(config, seq_len)
    n_moe = config.n_layers - config.n_dense
    layers = config.n_dense * flops["dense"] + n_moe * flops["moe"]
    return 3.0 * (layers + flops["norm"] + flops["head"])
