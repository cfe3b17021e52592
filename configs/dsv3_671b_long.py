"""DeepSeek-V3 from 4K to 128K in two stages of 1,000 steps, by YaRN (report sec. 4.3).

First 32K in batches of 1,920 sequences, from the pre-trained weights, then 128K in batches of 480,
which is what stands here; documents, learning rate and YaRN are the same in both:

python train.py --config=dsv3_671b_long --mesh=pp8,dp2,ep64 --workdir=runs/32k \
    --set init_from=runs/4k --set data.source=/data/*.jsonl \
    --set train.seq_len=32768 --set train.batch=1920 --set parallel.context=8
python train.py --config=dsv3_671b_long --mesh=pp8,dp2,ep64 --workdir=runs/128k \
    --set init_from=runs/32k --set data.source=/data/*.jsonl

A sequence lies over 8 and 32 ranks, 4,096 tokens on each, as in pre-training. Whether that fits:

python -m dsv3_jax.aot --config=dsv3_671b_long --mesh=pp8,dp2,ep64 --topology=v5p:8x8x16 \
    --stop-at=schedule
"""

import dataclasses

from configs import dsv3_671b
from dsv3_jax.config import Config, LossConfig, OptimizerConfig, TrainConfig, YarnConfig

RATE = 7.3e-6  # at which pre-training ends


def get_config() -> Config:
    base = dsv3_671b.get_config()
    yarn = YarnConfig(factor=40.0, original_length=base.train.seq_len)
    attention = dataclasses.replace(base.model.attention, yarn=yarn)
    return dataclasses.replace(
        base,
        name="dsv3_671b_long",
        model=dataclasses.replace(base.model, attention=attention),
        train=TrainConfig(batch=480, seq_len=131_072, steps=1000),
        optimizer=OptimizerConfig(peak_lr=RATE, decayed_lr=RATE, tail_lr=RATE, warmup_steps=0),
        losses=LossConfig(mtp_weight=0.1, bias_update_speed=0.0),  # as at the end of pre-training
        parallel=dataclasses.replace(base.parallel, context=32),
    )
