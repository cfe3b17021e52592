"""The printed recipe of the 671B preset is that of the report (sec. 4.2)."""

import dataclasses

import jax.numpy as jnp
import pytest

from configs import load_preset
from dsv3_jax.config import TrainConfig
from dsv3_jax.config_cli import override
from dsv3_jax.plan.recipe import phases
from dsv3_jax.schedules import BatchSizes

TRILLION = 1e12


def test_recipe_of_671b():
    """From, to (trillion tokens), batch, learning rates at both ends, MTP weight, bias rate."""
    warm_up = 2000 * 3072 * 4096 / TRILLION
    ramp = [0.469 * part / 4 for part in range(1, 5)]
    flat = (2.2e-4, 2.2e-4, 0.3, 1e-3)
    wanted = [
        (0, warm_up, 3072, 2.2e-4 / 2000, 2.2e-4, 0.3, 1e-3),
        (warm_up, ramp[0], 3072, *flat),
        (ramp[0], ramp[1], 6144, *flat),
        (ramp[1], ramp[2], 9216, *flat),
        (ramp[2], ramp[3], 12_288, *flat),
        (ramp[3], 10, 15_360, *flat),
        (10, 14.3, 15_360, 2.2e-4, 2.2e-5, 0.1, 1e-3),
        (14.3, 14.633, 15_360, 2.2e-5, 2.2e-5, 0.1, 0.0),
        (14.633, 14.8, 15_360, 7.3e-6, 7.3e-6, 0.1, 0.0),
    ]
    found = phases(load_preset("dsv3_671b"))
    assert len(found) == len(wanted)
    for phase, want in zip(found, wanted, strict=True):
        start, stop, *rest = phase
        assert (start / TRILLION, stop / TRILLION) == pytest.approx(want[:2], rel=2e-4)
        assert rest == pytest.approx(want[2:], rel=1e-3)


def test_a_short_run_has_the_phases_that_it_reaches():
    config = override(load_preset("dsv3_671b"), "train.steps=5000")
    found = phases(config)
    assert [phase.stop for phase in found] == [2000 * 3072 * 4096, 5000 * 3072 * 4096]
    early = dataclasses.replace(config.optimizer, warmup_steps=0)
    assert len(phases(dataclasses.replace(config, optimizer=early))) == 1


def test_batch_sizes():
    """Tokens on the device, and the step at a number of tokens, against counting step by step."""
    train = TrainConfig(batch=20, seq_len=3, steps=9, first_batch=4, batch_sizes=5, ramp_tokens=400)
    sizes = BatchSizes.of(train)
    assert sizes.sizes == (4, 8, 12, 16, 20)
    assert sizes.starts == (0, 8, 12, 15, 17)  # 100 tokens of 12, 24, 36 and 48 a step
    seen = 0
    for step in range(40):
        assert sizes.sequences(step) == seen
        assert float(sizes.tokens(jnp.int32(step))) == 3 * seen
        assert sizes.step_at(3 * seen) == step
        assert sizes.step_at(3 * seen + 1) == step + 1
        seen += sizes.size(step)
    assert BatchSizes.of(dataclasses.replace(train, batch=4)).sizes == (4,)
    assert BatchSizes.of(dataclasses.replace(train, first_batch=None)).sizes == (20,)
