"""The architecture: sizes of attention, experts and layers."""

import dataclasses

from dsv3_jax.config.checks import check_multiple, check_not_negative, check_positive

WEIGHT_DTYPES = ("float32", "bfloat16", "fp8")  # formats that weights are read and written in


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Context extension of the rotary frequencies by YaRN (report sec. 4.3).

    Attributes:
        factor: the longest length over `original_length`.
        original_length: tokens per sequence that the model was trained with before.
        beta_fast: dims that turn more often than this over `original_length` keep their frequency.
        beta_slow: dims that turn less often than this have it divided by `factor`.
        mscale: weight m in the temperature 0.1 * m * ln(factor) + 1 of the rotated dims.
        mscale_all_dim: the same weight for the dims that are not rotated.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        check_positive(self, "yarn", "factor", "original_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of multi-head latent attention (report sec. 2.1.1).

    Attributes:
        n_heads: attention heads.
        q_rank: dims of the query latent; None projects queries from the hidden state directly.
        kv_rank: dims of the latent that keys and values are projected from.
        nope_dim: dims per head of queries and keys that are not rotated.
        rope_dim: dims of the rotated part of queries and keys; all heads share that of the keys.
        value_dim: dims per head of values.
        rope_base: base of the rotary frequencies.
        yarn: context extension; None for a model that was trained at its full length.
    """

    n_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope_base: float = 10_000.0
    yarn: YarnConfig | None = None

    def __post_init__(self):
        check_positive(self, "attention", "n_heads", "kv_rank", "nope_dim", "rope_dim", "value_dim")
        if self.rope_dim % 2:
            raise ValueError(
                f"attention.rope_dim={self.rope_dim} must be even: dims rotate in pairs"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes of DeepSeekMoE and its node-limited router (report sec. 2.1.2).

    Attributes:
        n_experts: routed experts per layer.
        n_shared: shared experts per layer, which every token passes through.
        hidden: hidden dims of one expert.
        top_k: routed experts per token.
        n_groups: groups that the experts are divided into, one or more per node.
        topk_groups: groups that the experts of a token come from.
        scale: factor of the gate weights.
        normalize: divide the gate weights of a token by their sum.
        n_redundant: further expert slots per layer, for copies of the busiest experts.
    """

    n_experts: int
    n_shared: int
    hidden: int
    top_k: int
    n_groups: int = 1
    topk_groups: int = 1
    scale: float = 2.5
    normalize: bool = True
    n_redundant: int = 0

    def __post_init__(self):
        check_positive(self, "moe", "n_experts", "hidden", "top_k", "n_groups", "topk_groups")
        check_not_negative(self, "moe", "n_shared", "n_redundant")
        check_multiple("moe.n_experts", self.n_experts, "moe.n_groups", self.n_groups)
        if self.topk_groups > self.n_groups:
            raise ValueError(
                f"moe.topk_groups={self.topk_groups} exceeds moe.n_groups={self.n_groups}"
            )
        reachable = self.topk_groups * (self.n_experts // self.n_groups)
        if self.top_k > reachable:
            raise ValueError(
                f"moe.top_k={self.top_k} exceeds the {reachable} experts that "
                f"moe.topk_groups={self.topk_groups} of {self.n_groups} groups hold"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: `n_dense` leading dense blocks, then MoE blocks, then MTP modules.

    Attributes:
        vocab_size: token ids.
        width: dims of the hidden state.
        n_layers: transformer blocks, without those of MTP.
        n_dense: leading blocks with a dense feed-forward layer in place of experts.
        dense_hidden: hidden dims of the dense feed-forward layers.
        attention: sizes of attention.
        moe: sizes of the experts; None for a model without any.
        mtp_depth: modules of multi-token prediction, each of which predicts one token further.
        norm_eps: added to the mean square in RMSNorm.
        init_std: standard deviation of the initial weights.
    """

    vocab_size: int
    width: int
    n_layers: int
    n_dense: int
    dense_hidden: int
    attention: AttentionConfig
    moe: MoEConfig | None
    mtp_depth: int = 1
    norm_eps: float = 1e-6
    init_std: float = 0.006

    def __post_init__(self):
        check_positive(self, "model", "vocab_size", "width", "n_layers", "dense_hidden", "init_std")
        if not 0 <= self.n_dense <= self.n_layers:
            raise ValueError(
                f"model.n_dense={self.n_dense} must be in 0..{self.n_layers} (model.n_layers)"
            )
        if self.moe is None and (self.n_dense < self.n_layers or self.mtp_depth):
            raise ValueError(
                f"model.moe is None, so model.n_dense={self.n_dense} must equal "
                f"model.n_layers={self.n_layers} and model.mtp_depth={self.mtp_depth} must be 0"
            )
        check_not_negative(self, "model", "mtp_depth")

    @property
    def n_moe_layers(self) -> int:
        """Layers with experts, those of MTP included."""
        return self.n_layers - self.n_dense + self.mtp_depth
