"""The config of a run beside its architecture: data, schedule, precision, mesh, reliability."""

import dataclasses
from typing import ClassVar

from dsv3_jax.config.checks import (
    check_choice,
    check_multiple,
    check_not_negative,
    check_positive,
)
from dsv3_jax.config.model import ModelConfig
from sharding.schedules import NAMES


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The source of text, and the way it becomes tokens.

    Attributes:
        source: "instant" (a small text that needs no download), or a file, folder, glob or .jsonl.
        text_field: key of the text in the lines of .jsonl.
        bad_lines: what to do about lines of .jsonl that are no document: "refuse" to run, or
            "skip" and count them.
        tokenizer: "bpe" (trained on the text), "deepseek", or the path of a tokenizer.json.
        held_out: fraction of the text that is kept for evaluation.
        fim_rate: fraction of the training documents whose middle moves behind their end, to be
            filled in (report sec. 4.1: 0.1).
        split_rate: fraction of the training tokens of merged punctuation and line breaks that are
            split (sec. 4.1: "a certain proportion").
        mask_documents: hide the other documents in a row from each token; the report does not.
        cache_dir: folder that tokenized text is kept in.
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
        check_choice("data.bad_lines", self.bad_lines, ("refuse", "skip"))
        for name in ("fim_rate", "split_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"data.{name}={getattr(self, name)} must lie in 0..1 (a share)")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(
                f"data.held_out={self.held_out} must lie between 0 and 1 (a share of the text)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the report's learning-rate schedule (sec. 4.2): warm-up in steps, rest in tokens.

    Attributes:
        peak_lr: rate after the warm-up, until `constant_tokens`.
        decayed_lr: rate at the end of the cosine decay, until `tail_tokens`.
        tail_lr: rate from `tail_tokens` on.
        warmup_steps: steps of the linear warm-up.
        constant_tokens: tokens seen when the cosine decay begins.
        decay_tokens: length of the cosine decay, in tokens.
        tail_tokens: tokens seen when `tail_lr` begins.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: added to the root of Adam's second moment.
        weight_decay: decoupled weight decay of all parameters but vectors.
        clip: largest global norm of the gradient; longer ones are scaled down to it.
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
        check_positive(self, "optimizer", "peak_lr", "clip", "eps", "decay_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the auxiliary losses, and the balance bias; both change once, by tokens seen.

    Attributes:
        mtp_weight: lambda, the weight of the MTP loss (report sec. 2.2, eq. 25).
        mtp_weight_late: lambda from `mtp_late_tokens` on.
        mtp_late_tokens: tokens seen when `mtp_weight_late` begins.
        balance_weight: alpha, the weight of the sequence-wise balance loss (sec. 2.1.2, eq. 17).
        bias_update_speed: gamma, the change of the balance bias per step (sec. 2.1.2).
        bias_stop_tokens: tokens seen when gamma becomes 0.

    Source of the values: report sec. 4.2.
    """

    mtp_weight: float = 0.3
    mtp_weight_late: float = 0.1
    mtp_late_tokens: float = 10e12
    balance_weight: float = 1e-4
    bias_update_speed: float = 1e-3
    bias_stop_tokens: float = 14.3e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats by role (report sec. 3.3); `--set precision=NAME` sets those of `NAMED`.

    Attributes:
        compute: format of activations and of the weights that meet them.
        master: format of the master weights.
        moments: format of Adam's moments.
        matmul: format of the matmuls of all Linears in layers, forward and backward, and of what
            their backward keeps: "compute", or "fp8" scaled by tiles and blocks (sec. 3.3.2).
        dispatch: format of tokens on their way to experts, and of gradients on the way back of the
            backward: "compute", or "fp8" in 1x128 tiles with power-of-two scales (sec. 3.3.3).
    """

    NAMED: ClassVar[dict[str, dict]] = {
        "float32": {"compute": "float32", "matmul": "compute", "dispatch": "compute"},
        "bfloat16": {"compute": "bfloat16", "matmul": "compute", "dispatch": "compute"},
        "fp8": {"compute": "bfloat16", "matmul": "fp8", "dispatch": "fp8"},
    }

    compute: str = "bfloat16"
    master: str = "float32"
    moments: str = "bfloat16"
    matmul: str = "compute"
    dispatch: str = "compute"

    def __post_init__(self):
        for name in ("matmul", "dispatch"):
            check_choice(f"precision.{name}", getattr(self, name), ("compute", "fp8"))
        for name in ("compute", "master", "moments"):
            check_choice(f"precision.{name}", getattr(self, name), ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The division of the program over the mesh and over time.

    Attributes:
        zero: ZeRO level: 1 gathers all weights once per step, 3 gathers them layer by layer.
        remat: what the backward computes again: "full" (whole layers), "report" (norms, MLA
            up-projections and SwiGLU, sec. 3.2.3), or "none".
        capacity_factor: receive buffer of one dispatch round over the balanced load. What does not
            fit travels in a further round, so no token is dropped at any value.
        transport: how a dispatch round travels: "padded" by all-to-alls of full buffers, or
            "ragged" by all-to-alls of the filled rows, which XLA has for TPU and GPU only.
        unroll: layers per iteration of the loop over layers; more saves copies and costs compile
            time.
        overlap_chunks: chunks that the sequence is cut into in MoE layers, so that the all-to-all
            of one chunk runs beside the matmuls of another.
        context: ranks that each sequence is spread over, for those too long for one device.
        rebalance_every: steps after which redundant experts are chosen anew by the load since.
    """

    zero: int = 1
    remat: str = "report"
    capacity_factor: float = 1.25
    transport: str = "padded"
    unroll: int = 1
    overlap_chunks: int = 1
    context: int = 1
    rebalance_every: int = 100

    def __post_init__(self):
        check_positive(self, "parallel", "unroll", "overlap_chunks", "context", "rebalance_every")
        check_choice("parallel.transport", self.transport, ("padded", "ragged"))
        check_choice("parallel.zero", self.zero, (1, 3))
        check_choice("parallel.remat", self.remat, ("report", "full", "none"))
        if self.capacity_factor < 1.0:
            raise ValueError(
                f"parallel.capacity_factor={self.capacity_factor} must be at least 1 (balanced "
                "load)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The schedule of micro-batches through the stages of `pp` (report sec. 3.2.1).

    Attributes:
        schedule: one of those in sharding/schedules.py, or "auto": dualpipe or dualpipev,
            whichever is faster on paper; zb1p where neither can run.
        micro_batch_size: sequences per device in a micro-batch.
        max_deferred_wgrads: micro-batches whose weight gradients a rank may defer; None for as
            many as the schedule has. Their inputs and output gradients of all Linears stay in
            memory until then, which is much.
    """

    schedule: str = "auto"
    micro_batch_size: int = 1
    max_deferred_wgrads: int | None = None

    def __post_init__(self):
        check_choice("pipeline.schedule", self.schedule, ("auto", *NAMES))
        check_positive(self, "pipeline", "micro_batch_size")
        if self.max_deferred_wgrads is not None:
            check_not_negative(self, "pipeline", "max_deferred_wgrads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of a run, its batches, and how often it is evaluated.

    Attributes:
        batch: sequences per step, over the whole mesh.
        seq_len: tokens per sequence.
        steps: the last step.
        first_batch: sequences per step at the beginning (report sec. 4.2: 3072); None for `batch`.
        batch_sizes: sizes from `first_batch` to `batch`, evenly spaced.
        ramp_tokens: tokens seen when the last size is reached (sec. 4.2: 469e9).
        seed: of initial weights, order of the data and samples.
        eval_every: steps between evaluations on held-out text.
        eval_batches: batches per evaluation.
        sample_tokens: tokens that the model writes at the end of the run; 0 for no sample.
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
        check_positive(self, "train", "batch", "seq_len", "steps", "eval_every", "eval_batches")
        if self.first_batch is not None:
            check_positive(self, "train", "first_batch")
        if self.batch_sizes < 2:
            raise ValueError(f"train.batch_sizes={self.batch_sizes} must be at least 2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The exponential moving average of the weights, in host memory (report sec. 3.2.2).

    Attributes:
        decay: what the average keeps per step; None keeps no average. The report gives no number.
        every: steps between updates.
    """

    decay: float | None = None
    every: int = 1

    def __post_init__(self):
        check_positive(self, "ema", "every")
        if self.decay is not None and not 0.0 < self.decay < 1.0:
            raise ValueError(f"ema.decay={self.decay} must lie between 0 and 1, e.g. 0.999")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """The reaction to numbers that go wrong. Gradients that are not finite are skipped.

    Attributes:
        skip_above: skip steps whose gradient norm exceeds so many times the mean norm, once 100
            steps have shown that.
        roll_back_after: skipped steps in a row after which the run restores an earlier checkpoint.
        spike: report losses so many standard deviations above the last 100.
        audit_every: steps between comparisons of all replicas of the state; None for never.
    """

    skip_above: float = 20.0
    roll_back_after: int = 5
    spike: float = 6.0
    audit_every: int | None = 1000

    def __post_init__(self):
        check_positive(self, "guard", "roll_back_after", "spike")
        if self.skip_above <= 1.0:
            raise ValueError(f"guard.skip_above={self.skip_above} must exceed 1 (the usual norm)")
        if self.audit_every is not None:
            check_positive(self, "guard", "audit_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The steps at which a run saves, and the checkpoints it keeps.

    Attributes:
        every: steps between checkpoints.
        keep: newest checkpoints that are kept.
        keep_every: steps whose multiples are kept for good; None for none.
    """

    every: int = 100
    keep: int = 3
    keep_every: int | None = None

    def __post_init__(self):
        check_positive(self, "checkpoint", "every", "keep")
        if self.keep_every is not None:
            check_positive(self, "checkpoint", "keep_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run is made of; `configs/*.py` hold the presets.

    Attributes:
        name: of the preset, and of the default workdir.
        init_from: folder whose weights a fresh run starts with; None for random ones.
        fp8_stats: count at each evaluation how many numbers underflow or saturate in FP8.
    """

    name: str
    model: ModelConfig
    train: TrainConfig
    init_from: str | None = None
    fp8_stats: bool = False
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
        context, chunks = self.parallel.context, self.parallel.overlap_chunks
        unit_name = "parallel.overlap_chunks * parallel.context"
        check_multiple("train.seq_len", self.train.seq_len, unit_name, chunks * context)
        heads = self.model.attention.n_heads
        check_multiple("attention.n_heads", heads, "parallel.context", context)
        if self.fp8_stats and self.precision.matmul != "fp8":
            raise ValueError(
                f"fp8_stats=True counts FP8 numbers, but precision.matmul="
                f"{self.precision.matmul!r}; add --set precision=fp8"
            )
