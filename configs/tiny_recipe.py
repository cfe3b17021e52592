"""The report's whole recipe (sec. 4.2) at one 592,000th of its tokens, on 33M tokens of English.

python -m tools.fetch_text debian-docs
python train.py --config=tiny_recipe --mesh=dp1 --set data.source=runs/data/debian-docs
"""

import dataclasses

from configs import tiny
from dsv3_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EmaConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)

SCALE = 25e6 / 14.8e12


def get_config() -> Config:
    config = tiny.get_config()
    return dataclasses.replace(
        config,
        name="tiny_recipe",
        model=dataclasses.replace(config.model, vocab_size=4096),
        train=TrainConfig(
            batch=20,
            seq_len=256,
            steps=5131,
            first_batch=4,
            batch_sizes=5,
            ramp_tokens=469e9 * SCALE,
            eval_every=100,
            eval_batches=16,
        ),
        data=DataConfig(fim_rate=0.1),
        losses=LossConfig(
            mtp_late_tokens=10e12 * SCALE,
            bias_update_speed=0.02,  # the report's 0.001 would not arrive
            bias_stop_tokens=14.3e12 * SCALE,
        ),
        optimizer=OptimizerConfig(
            peak_lr=2e-3,
            decayed_lr=2e-4,
            tail_lr=6.6e-5,
            warmup_steps=100,
            constant_tokens=10e12 * SCALE,
            decay_tokens=4.3e12 * SCALE,
            tail_tokens=14.633e12 * SCALE,
        ),
        ema=EmaConfig(decay=0.99),
        checkpoint=CheckpointConfig(every=100),
    )
