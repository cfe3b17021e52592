"""The printed recipe of the 671B preset is that of the report (sec. 4.2)."""

import dataclasses

import pytest

from configs import load_preset
from dsv3_jax.overrides import override
from dsv3_jax.plan.recipe import phases

TRILLION = 1e12


def test_recipe_of_671b():
    """From, to (trillion tokens), learning rates at both ends, MTP weight, rate of the bias."""
    warm_up = 2000 * 15_360 * 4096 / TRILLION
    wanted = [
        (0, warm_up, 2.2e-4 / 2000, 2.2e-4, 0.3, 1e-3),
        (warm_up, 10, 2.2e-4, 2.2e-4, 0.3, 1e-3),
        (10, 14.3, 2.2e-4, 2.2e-5, 0.1, 1e-3),
        (14.3, 14.633, 2.2e-5, 2.2e-5, 0.1, 0.0),
        (14.633, 14.8, 7.3e-6, 7.3e-6, 0.1, 0.0),
    ]
    found = phases(load_preset("dsv3_671b"))
    assert len(found) == len(wanted)
    for phase, want in zip(found, wanted, strict=True):
        start, stop, *rest = phase
        assert (start / TRILLION, stop / TRILLION) == pytest.approx(want[:2], rel=1e-4)
        assert rest == pytest.approx(want[2:], rel=1e-3)


def test_a_short_run_has_the_phases_that_it_reaches():
    config = override(load_preset("dsv3_671b"), "train.steps=5000")
    found = phases(config)
    assert [phase.stop for phase in found] == [2000 * 15_360 * 4096, 5000 * 15_360 * 4096]
    early = dataclasses.replace(config.optimizer, warmup_steps=0)
    assert len(phases(dataclasses.replace(config, optimizer=early))) == 1
