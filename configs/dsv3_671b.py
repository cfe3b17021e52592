"""DeepSeek-V3 as pre-trained: 61 layers, 256 experts, length 4096, 14.8T tokens (report sec. 4.2).

python train.py --config=dsv3_671b --mesh=dp16,ep64 --set data.source=/data/*.jsonl
python train.py --config=dsv3_671b --mesh=pp8,dp2,ep64 --set data.source=/data/*.jsonl
"""

from dsv3_jax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    EmaConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    PipelineConfig,
    PrecisionConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="dsv3_671b",
        model=ModelConfig(
            vocab_size=129_280,
            width=7168,
            n_layers=61,
            n_dense=3,
            dense_hidden=18_432,
            attention=AttentionConfig(
                n_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128
            ),
            moe=MoEConfig(
                n_experts=256, n_shared=1, hidden=2048, top_k=8, n_groups=8, topk_groups=4
            ),
        ),
        train=TrainConfig(
            batch=15_360,
            seq_len=4096,
            steps=247_198,
            first_batch=3072,
            batch_sizes=5,
            ramp_tokens=469e9,
        ),
        ema=EmaConfig(decay=0.999),
        data=DataConfig(tokenizer="deepseek", fim_rate=0.1, split_rate=0.1),
        precision=PrecisionConfig(dispatch="fp8"),
        parallel=ParallelConfig(zero=3, remat="full", overlap_chunks=2),
        # The operands of deferred weight gradients take 2.3 GB per layer per micro-batch.
        pipeline=PipelineConfig(max_deferred_wgrads=0),
    )
