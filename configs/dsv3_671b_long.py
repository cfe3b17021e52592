"""DeepSeek-V3 from 4K to 128K in two stages of 1,000 steps, by YaRN (report sec. 4.3).

First 32K in batches of 1,920 sequences, from the pre-trained weights, then 128K in batches of 480,
which is what stands here; documents, learning rate and YaRN are the same in both:

python train.py --config=dsv3_671b_long --mesh=pp8,dp2,ep64 --workdir=runs/32k \
    --set init_from=runs/4k --set data.source=/data/*.jsonl \
    --set train.seq_len=32768 --set train.batch=1920 --set parallel.context=8
python train.py --config=dsv3_671b_long --mesh=pp8,dp2,ep64 --workdir=runs/128k \
    --set init_from=runs/32k --set data.source=/data/*.jsonl

A sequence lies over 8 and 32 ranks, 4,096 tokens on each, as in pre-training. Whether that fits:

python -m dsv3_jax.tunnel --config=dsv3_671b_long --mesh=pp8,dp2,ep64 --topology=v5p:8x8x16 \
    --stop-at=schedule
"""

from dsv3_jax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    PipelineConfig,
    PrecisionConfig,
    TrainConfig,
    YarnConfig,
)

RATE = 7.3e-6  # at which pre-training ends


def get_config() -> Config:
    return Config(
        name="dsv3_671b_long",
        model=ModelConfig(
            vocab_size=129_280,
            width=7168,
            n_layers=61,
            n_dense=3,
            dense_hidden=18_432,
            attention=AttentionConfig(
                n_heads=128,
                q_rank=1536,
                kv_rank=512,
                nope_dim=128,
                rope_dim=64,
                value_dim=128,
                yarn=YarnConfig(factor=40.0, original_length=4096),
            ),
            moe=MoEConfig(
                n_experts=256, n_shared=1, hidden=2048, top_k=8, n_groups=8, n_groups_kept=4
            ),
        ),
        train=TrainConfig(batch=480, seq_len=131_072, steps=1000),
        data=DataConfig(tokenizer="deepseek", fim_rate=0.1, split_rate=0.1),
        optimizer=OptimizerConfig(peak_lr=RATE, decayed_lr=RATE, tail_lr=RATE, warmup_steps=0),
        losses=LossConfig(mtp_weight=0.1, bias_rate=0.0),  # as at the end of pre-training
        precision=PrecisionConfig(dispatch="fp8"),
        parallel=ParallelConfig(zero=3, remat="full", pieces=2, context=32),
        pipeline=PipelineConfig(late=0),
    )
