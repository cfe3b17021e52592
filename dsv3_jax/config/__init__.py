"""The frozen `Config` of a run: one dataclass per section, each checked when it is made.

Every class documents its fields, with units, under "Attributes". Lengths are in tokens.
"""

from dsv3_jax.config.model import (
    WEIGHT_DTYPES,
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    YarnConfig,
)
from dsv3_jax.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    EmaConfig,
    GuardConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    PipelineConfig,
    PrecisionConfig,
    TrainConfig,
)

__all__ = [
    "WEIGHT_DTYPES",
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EmaConfig",
    "GuardConfig",
    "LossConfig",
    "ModelConfig",
    "MoEConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PipelineConfig",
    "PrecisionConfig",
    "TrainConfig",
    "YarnConfig",
]
