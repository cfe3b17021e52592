"""Every architectural part of DeepSeek-V3 at 2.6M parameters, for a laptop.

python train.py --mesh=dp4,ep8
"""

from dsv3_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="tiny",
        model=ModelConfig(
            vocab_size=2048,
            width=128,
            n_layers=4,
            n_dense=1,
            dense_hidden=384,
            attention=AttentionConfig(
                n_heads=4, q_rank=64, kv_rank=32, nope_dim=32, rope_dim=16, value_dim=32
            ),
            moe=MoEConfig(n_experts=16, n_shared=1, hidden=64, top_k=4, n_groups=8, topk_groups=4),
            mtp_depth=1,
            init_std=0.02,
        ),
        train=TrainConfig(batch=32, seq_len=128, steps=150, eval_every=50, eval_batches=4),
        losses=LossConfig(
            bias_update_speed=0.05
        ),  # a short run: the report's 0.001 would not arrive
        optimizer=OptimizerConfig(
            peak_lr=2e-3,
            decayed_lr=2e-4,
            tail_lr=2e-4,
            warmup_steps=20,
            constant_tokens=0.3e6,
            decay_tokens=0.3e6,
            tail_tokens=1e9,
        ),
        precision=PrecisionConfig(compute="float32", moments="float32"),
        parallel=ParallelConfig(remat="none", capacity_factor=4.0, unroll=3),
        checkpoint=CheckpointConfig(every=50),
    )
