"""What a model costs on paper: parameters in use and FLOPs."""

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.deepseek import count_parameters


def activated_parameters(config: ModelConfig) -> int:
    """Parameters of the main model that one token meets, embedding included (report sec. 2)."""
    total = count_parameters(config)["main"]
    if config.moe is None:
        return total
    idle = config.moe.n_experts - config.moe.top_k
    per_expert = 3 * config.width * config.moe.hidden
    return total - (config.n_layers - config.n_dense) * idle * per_expert


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward, causal, without MTP and recomputation.

    6 a parameter that is multiplied, and attention's two products over half of the T x T pairs.
    Source: hardware paper (arXiv 2505.09343), table 2, whose 250 GFLOP at 4096 this gives.
    """
    a = config.attention
    multiplied = activated_parameters(config) - config.vocab_size * config.width
    scores = seq_len * a.n_heads * (a.nope_dim + a.rope_dim + a.value_dim)  # 2 * T/2 each
    return 6.0 * multiplied + 3.0 * config.n_layers * scores


def forward_flops(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """FLOPs a token of one dense layer, one MoE layer, and all that follows the last layer.

    That is the output head, the MTP modules and their walks along it.
    """
    a, m, width = config.attention, config.moe, config.width
    key_dim, kv_dim = a.nope_dim + a.rope_dim, a.nope_dim + a.value_dim
    queries = a.n_heads * key_dim * (a.q_rank or width) + width * (a.q_rank or 0)
    latents = width * (a.kv_rank + a.rope_dim) + a.kv_rank * a.n_heads * kv_dim
    scores = seq_len * a.n_heads * (key_dim + a.value_dim)
    attention = 2 * (queries + latents + a.n_heads * a.value_dim * width) + scores
    dense = attention + 6 * width * config.dense_hidden
    moe = 0.0
    if m is not None:
        experts = 6 * width * m.hidden * (m.top_k + m.n_shared)
        moe = attention + 2 * width * m.n_experts + experts
    depth, head = config.mtp_depth, 2 * width * config.vocab_size
    return {"dense": dense, "moe": moe, "end": (1 + depth) * head + depth * (moe + 4 * width**2)}
