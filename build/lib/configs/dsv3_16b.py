"""The 16B sibling of the report's ablations (27 layers, 64 routed and 2 shared experts).

python train.py --config=dsv3_16b --mesh=dp4,ep16 --set data.source=/data/*.jsonl
"""

from dsv3_jax.config import AttentionConfig, Config, ModelConfig, MoEConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="dsv3_16b",
        model=ModelConfig(
            vocab_size=102_400,
            width=2048,
            n_layers=27,
            n_dense=1,
            dense_hidden=10_944,
            attention=AttentionConfig(
                n_heads=16, q_rank=None, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128
            ),
            moe=MoEConfig(n_experts=64, n_shared=2, hidden=1408, top_k=6),
        ),
        train=TrainConfig(batch=1024, seq_len=4096, steps=320_000),
    )
