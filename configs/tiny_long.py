"""Context extension (report sec. 4.3): the tiny model at 8x its length, then at 32x, by YaRN.

Weights know tokens by their ids, so every stage takes the first run's tokenizer:

python train.py --config=tiny_long --mesh=dp2 --set init_from=runs/tiny \
    --set data.tokenizer=runs/tiny/tokenizer.json
python train.py --config=tiny_long --mesh=dp1 --workdir=runs/tiny_longer \
    --set init_from=runs/tiny_long --set data.tokenizer=runs/tiny/tokenizer.json \
    --set train.seq_len=4096 --set train.batch=1

As in the report YaRN is the same in both stages, the batch falls as the length grows, and the rate
is constant and small.
"""

import dataclasses

from configs import tiny
from dsv3_jax.config import Config, OptimizerConfig, TrainConfig, YarnConfig

RATE = 2e-4  # at which the first run ends


def get_config() -> Config:
    base = tiny.get_config()
    yarn = YarnConfig(factor=40.0, original_length=base.train.seq_len)
    attention = dataclasses.replace(base.model.attention, yarn=yarn)
    return dataclasses.replace(
        base,
        name="tiny_long",
        model=dataclasses.replace(base.model, attention=attention),
        train=TrainConfig(batch=4, seq_len=1024, steps=100, eval_every=100, eval_batches=4),
        optimizer=OptimizerConfig(peak_lr=RATE, decayed_lr=RATE, tail_lr=RATE, warmup_steps=20),
    )
