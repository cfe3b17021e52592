"""What a run is: one frozen `Config`, checked where it is made."""

import dataclasses
from typing import ClassVar

from sharding.schedules import NAMES


def _check_positive(config, section: str, *names: str):
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{section}.{name}={getattr(config, name)} must be positive")


def _check_choice(name: str, value, known: tuple):
    if value not in known:
        raise ValueError(f"{name}={value!r} must be {' or '.join(map(repr, known))}")


def _check_multiple(of: str, value: int, by: str, unit: int):
    if value % unit:
        raise ValueError(f"{of}={value} must be a multiple of {by}={unit}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Context extension of the rotary frequencies (report sec. 4.3; lengths in tokens)."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        _check_positive(self, "yarn", "factor", "original_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of multi-head latent attention (report sec. 2.1.1)."""

    n_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope_base: float = 10_000.0
    yarn: YarnConfig | None = None

    def __post_init__(self):
        _check_positive(
            self, "attention", "n_heads", "kv_rank", "nope_dim", "rope_dim", "value_dim"
        )
        if self.rope_dim % 2:
            raise ValueError(
                f"attention.rope_dim={self.rope_dim} must be even: dims rotate in pairs"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes of DeepSeekMoE and its node-limited router (report sec. 2.1.2)."""

    n_experts: int
    n_shared: int
    hidden: int
    top_k: int
    n_groups: int = 1
    n_groups_kept: int = 1
    scale: float = 2.5
    normalize: bool = True
    n_redundant: int = 0  # slots for replicas of busy experts, shared out over the ranks

    def __post_init__(self):
        _check_positive(self, "moe", "n_experts", "hidden", "top_k", "n_groups", "n_groups_kept")
        for name in ("n_shared", "n_redundant"):
            if getattr(self, name) < 0:
                raise ValueError(f"moe.{name}={getattr(self, name)} must not be negative")
        _check_multiple("moe.n_experts", self.n_experts, "moe.n_groups", self.n_groups)
        if self.n_groups_kept > self.n_groups:
            raise ValueError(
                f"moe.n_groups_kept={self.n_groups_kept} exceeds moe.n_groups={self.n_groups}"
            )
        reachable = self.n_groups_kept * (self.n_experts // self.n_groups)
        if self.top_k > reachable:
            raise ValueError(
                f"moe.top_k={self.top_k} exceeds the {reachable} experts that "
                f"moe.n_groups_kept={self.n_groups_kept} of {self.n_groups} groups hold"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: `n_dense` leading dense blocks, then MoE blocks, then MTP modules."""

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
        _check_positive(
            self, "model", "vocab_size", "width", "n_layers", "dense_hidden", "init_std"
        )
        if not 0 <= self.n_dense <= self.n_layers:
            raise ValueError(
                f"model.n_dense={self.n_dense} must be in 0..{self.n_layers} (model.n_layers)"
            )
        if self.moe is None and (self.n_dense < self.n_layers or self.mtp_depth):
            raise ValueError(
                f"model.moe is None, so model.n_dense={self.n_dense} must equal "
                f"model.n_layers={self.n_layers} and model.mtp_depth={self.mtp_depth} must be 0"
            )
        if self.mtp_depth < 0:
            raise ValueError(f"model.mtp_depth={self.mtp_depth} must not be negative")

    @property
    def n_moe_layers(self) -> int:
        """Layers with experts, those of MTP included."""
        return self.n_layers - self.n_dense + self.mtp_depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from: "instant", or a file, folder, glob or .jsonl; how it is tokenized.

    Lines of .jsonl that are no document end the run (`bad_lines="refuse"`), or are left out and
    counted ("skip"). Of the text to train on, a share `fim_rate` of the documents has its middle
    behind its end, to be filled in, and a share `split_rate` of the tokens that merge punctuation
    and line breaks is split (report sec. 4.1: 0.1, and "a certain proportion"). With
    `mask_documents`, tokens see and predict none of other documents in their row, which the report
    lets them.
    """

    source: str = "instant"
    text_field: str = "text"
    bad_lines: str = "refuse"
    tokenizer: str = "bpe"
    held_out: float = 0.02
    fim_rate: float = 0.0
    split_rate: float = 0.0
    mask_documents: bool = False
    cache_dir: str = "runs/cache"

    def __post_init__(self):
        _check_choice("data.bad_lines", self.bad_lines, ("refuse", "skip"))
        for name in ("fim_rate", "split_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"data.{name}={getattr(self, name)} must lie in 0..1 (a share)")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(
                f"data.held_out={self.held_out} must lie between 0 and 1 (a share of the text)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the report's learning-rate shape (sec. 4.2): warm-up in steps, the rest in tokens.

    The rate rises linearly to `peak_lr`, stays until `constant_tokens`, falls on a cosine to
    `decayed_lr` over `decay_tokens`, stays until `tail_tokens`, and ends at `tail_lr`.
    """

    peak_lr: float = 2.2e-4
    decayed_lr: float = 2.2e-5
    tail_lr: float = 7.3e-6
    warmup_steps: int = 2000
    constant_tokens: float = 10e12
    decay_tokens: float = 4.3e12
    tail_tokens: float = 14.633e12
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self):
        _check_positive(self, "optimizer", "peak_lr", "clip", "eps", "decay_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the auxiliary losses, and the balance bias; both change once, by tokens seen.

    Sources: report sec. 2.1.2 (balance), 2.2 (MTP), 4.2 (values).
    """

    mtp_weight: float = 0.3
    mtp_weight_late: float = 0.1
    mtp_late_tokens: float = 10e12
    balance_weight: float = 1e-4
    bias_rate: float = 1e-3
    bias_stop_tokens: float = 14.3e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats by role (report sec. 3.3): compute, master weights, Adam moments, and more.

    `products` are those of all Linears in layers, forward and backward, and what is kept for the
    backward: "compute", or "fp8" with scales for tiles and blocks (sec. 3.3.2). `dispatch` is what
    tokens travel to their experts in, and in the backward the gradients of what comes back:
    "compute", or "fp8" in tiles of 1x128 with power-of-two scales (sec. 3.3.3).
    """

    NAMED: ClassVar[dict[str, dict]] = {  # what `--set precision=NAME` stands for
        "float32": {"compute": "float32", "products": "compute", "dispatch": "compute"},
        "bfloat16": {"compute": "bfloat16", "products": "compute", "dispatch": "compute"},
        "fp8": {"compute": "bfloat16", "products": "fp8", "dispatch": "fp8"},
    }

    compute: str = "bfloat16"
    master: str = "float32"
    moments: str = "bfloat16"
    products: str = "compute"
    dispatch: str = "compute"

    def __post_init__(self):
        for name in ("products", "dispatch"):
            _check_choice(f"precision.{name}", getattr(self, name), ("compute", "fp8"))
        for name in ("compute", "master", "moments"):
            _check_choice(f"precision.{name}", getattr(self, name), ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the program lies on the mesh and in time: ZeRO level, remat policy, and more.

    `capacity` is the receive buffer of one dispatch round over a balanced load; what does not fit
    travels in a further round, so no token is dropped at any value. `transport` is how a round
    travels: "padded" by all-to-alls of full buffers, or "ragged" by those of what there is, which
    XLA has for TPU and GPU only. `unroll` layers run in one turn
    of the loop over layers: less copying for more compile time. `pieces` cuts the sequence in
    layers with experts, so that the exchange of one piece runs beside the products of another.
    `context` lays each sequence over so many ranks, for sequences too long for one device.
    Redundant experts are placed anew every `place_every` steps, by the load since.
    """

    zero: int = 1
    remat: str = "report"
    capacity: float = 1.25
    transport: str = "padded"
    unroll: int = 1
    pieces: int = 1
    context: int = 1
    place_every: int = 100

    def __post_init__(self):
        _check_positive(self, "parallel", "unroll", "pieces", "context", "place_every")
        _check_choice("parallel.transport", self.transport, ("padded", "ragged"))
        _check_choice("parallel.zero", self.zero, (1, 3))
        _check_choice("parallel.remat", self.remat, ("report", "full", "none"))
        if self.capacity < 1.0:
            raise ValueError(
                f"parallel.capacity={self.capacity} must be at least 1 (balanced load)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How micro-batches pass through pipeline stages, on meshes with `pp` (report sec. 3.2.1).

    `schedule` is one of those in sharding/schedules.py, or "auto": of dualpipe and dualpipev the
    one that is faster on paper, zb1p where there are too few micro-batches or layers for them. A
    micro-batch has `micro_batch` sequences of each device. Of at most `late` micro-batches a rank
    keeps, between X and W, inputs and gradients of all products, which is much; None: of as many as
    the schedule has.
    """

    schedule: str = "auto"
    micro_batch: int = 1
    late: int | None = None

    def __post_init__(self):
        _check_choice("pipeline.schedule", self.schedule, ("auto", *NAMES))
        _check_positive(self, "pipeline", "micro_batch")
        if self.late is not None and self.late < 0:
            raise ValueError(f"pipeline.late={self.late} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of a run. `batch` counts sequences of `seq_len` tokens over the whole mesh.

    Over the first `ramp_tokens` the batch grows from `first_batch`, if it is less, to `batch`, in
    `batch_sizes` even sizes with the last one (report sec. 4.2: 3072 to 15360 over 469e9).
    """

    batch: int
    seq_len: int
    steps: int
    first_batch: int | None = None
    batch_sizes: int = 5
    ramp_tokens: float = 0.0
    seed: int = 0
    eval_every: int = 100
    eval_batches: int = 8
    sample_tokens: int = 64

    def __post_init__(self):
        _check_positive(self, "train", "batch", "seq_len", "steps", "eval_every", "eval_batches")
        if self.first_batch is not None:
            _check_positive(self, "train", "first_batch")
        if self.batch_sizes < 2:
            raise ValueError(f"train.batch_sizes={self.batch_sizes} must be at least 2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The mean of the weights on the host (report sec. 3.2.2): every `every` steps in a thread.

    One step back counts by `decay` less; None keeps no mean. The report gives no number.
    """

    decay: float | None = None
    every: int = 1

    def __post_init__(self):
        _check_positive(self, "ema", "every")
        if self.decay is not None and not 0.0 < self.decay < 1.0:
            raise ValueError(f"ema.decay={self.decay} must lie between 0 and 1, e.g. 0.999")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run does about numbers that go wrong.

    A step is skipped if its gradient is not finite or its norm exceeds `skip_above` times the usual
    one (once 100 steps have shown that). After `roll_back_after` such steps in a row the run goes
    back to a checkpoint from before. A loss more than `spike` standard deviations above the last
    100 is reported. Every `audit_every` steps all copies of the state are compared (None: never).
    """

    skip_above: float = 20.0
    roll_back_after: int = 5
    spike: float = 6.0
    audit_every: int | None = 1000

    def __post_init__(self):
        _check_positive(self, "guard", "roll_back_after", "spike")
        if self.skip_above <= 1.0:
            raise ValueError(f"guard.skip_above={self.skip_above} must exceed 1 (the usual norm)")
        if self.audit_every is not None:
            _check_positive(self, "guard", "audit_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Save every `every` steps; the newest `keep` stay, and multiples of `keep_every` for good."""

    every: int = 100
    keep: int = 3
    keep_every: int | None = None

    def __post_init__(self):
        _check_positive(self, "checkpoint", "every", "keep")
        if self.keep_every is not None:
            _check_positive(self, "checkpoint", "keep_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run is made of; `configs/*.py` hold the presets."""

    name: str
    model: ModelConfig
    train: TrainConfig
    init_from: str | None = None  # a folder whose weights a fresh run starts with
    fp8_stats: bool = False  # count at each evaluation how numbers become FP8 codes
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    losses: LossConfig = LossConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    pipeline: PipelineConfig = PipelineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ema: EmaConfig = EmaConfig()
    guard: GuardConfig = GuardConfig()

    def __post_init__(self):
        parallel = self.parallel
        by, unit = "parallel.pieces * parallel.context", parallel.pieces * parallel.context
        _check_multiple("train.seq_len", self.train.seq_len, by, unit)
        heads = self.model.attention.n_heads
        _check_multiple("attention.n_heads", heads, "parallel.context", parallel.context)
        if self.fp8_stats and self.precision.products != "fp8":
            raise ValueError(
                f"fp8_stats=True counts FP8 codes, but precision.products="
                f"{self.precision.products!r}; add --set precision=fp8"
            )
