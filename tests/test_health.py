"""Bad steps: the state stays as it was, bit for bit; when a run goes back, and how far."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.small_step import batch_of, config_of, loss_of, parameters, placed

from dsv3_jax.config import GuardConfig
from dsv3_jax.losses import Losses
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer
from dsv3_jax.training.health import SkippedStep, SkipPolicy, SpikeDetector
from dsv3_jax.training.messages import why_skipped
from dsv3_jax.training.records import EventLog
from dsv3_jax.training.state import new_state
from dsv3_jax.training.step import GRAD_NORM_WINDOW, Metrics, make_step


@pytest.fixture(scope="module")
def small():
    """A step, and a state that has had enough steps to know its mean gradient norm."""
    config = config_of(remat="none")
    mesh, layout = placed("dp1", config)
    optimizer = make_optimizer(config.optimizer, Policy.of(config.precision))
    step = make_step(config, optimizer, mesh, layout, loss_of(config))

    def state_of(mean: float, number: int = GRAD_NORM_WINDOW):
        params, bias = jax.tree.map(jnp.array, parameters())
        state = new_state(params, bias, optimizer)
        return state._replace(step=jnp.int32(number), mean_grad_norm=jnp.float32(mean))

    _, numbers = step(state_of(1e9), batch_of(0))
    return step, state_of, float(numbers.grad_norm)


def bits(state) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("share, skipped", [(1.0, False), (1 / 19, False), (1 / 21, True)])
def test_a_norm_far_above_the_mean_is_skipped(small, share, skipped):
    step, state_of, norm = small
    before = bits(state_of(norm * share))
    state, numbers = step(state_of(norm * share), batch_of(0))
    assert bool(numbers.skipped) == skipped
    np.testing.assert_allclose(numbers.grad_norm, norm, rtol=1e-6)
    np.testing.assert_allclose(numbers.max_grad_norm, 20 * norm * share, rtol=1e-6)
    assert (bits(state) == before) == skipped
    if not skipped:
        mean = norm * share + (norm - norm * share) / 100
        np.testing.assert_allclose(state.mean_grad_norm, mean, rtol=1e-6)


def test_the_first_steps_are_not_skipped_and_make_the_mean_norm(small):
    step, state_of, norm = small
    state, numbers = step(state_of(norm / 1000, number=1), batch_of(0))
    assert not numbers.skipped and int(state.step) == 2
    np.testing.assert_allclose(state.mean_grad_norm, (norm / 1000 + norm) / 2, rtol=1e-6)


def test_a_gradient_that_is_not_finite_is_skipped(small):
    """One weight is not a number; all of the state stays, that weight and the counters too."""
    step, state_of, _ = small

    def broken():
        state = state_of(1.0, number=3)
        leaves, treedef = jax.tree.flatten(state.params)
        leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].set(jnp.nan)
        return state._replace(params=jax.tree.unflatten(treedef, leaves))

    before = bits(broken())
    state, numbers = step(broken(), batch_of(0))
    assert numbers.skipped and not np.isfinite(numbers.grad_norm)
    assert bits(state) == before


def policy_after(steps: list[int], n: int = 3) -> tuple[SkipPolicy, bool]:
    policy = SkipPolicy(GuardConfig(roll_back_after=n))
    return policy, [policy.skip(SkippedStep(step, "why", "batch")) for step in steps][-1]


def test_only_steps_in_a_row_count():
    policy, enough = policy_after([4, 5])
    assert not enough
    policy.accept()
    assert [policy.skip(SkippedStep(step, "", "")) for step in (7, 8, 9)] == [False, False, True]
    assert policy.roll_back_step([2, 6, 8]) == 6  # that of 8 was saved among the bad steps


def test_each_roll_back_goes_further_until_the_run_gets_past():
    policy, _ = policy_after([10, 11, 12])
    assert policy.roll_back_step([3, 6, 9, 12]) == 9
    for step in (11, 12, 13):  # bad again before it came past step 12
        policy.skip(SkippedStep(step, "", ""))
    assert policy.roll_back_step([3, 6, 9]) == 6
    for step in (20, 21, 22):  # elsewhere
        policy.skip(SkippedStep(step, "", ""))
    assert policy.roll_back_step([3, 6, 18]) == 18
    policy, _ = policy_after([2, 3, 4])
    assert policy.roll_back_step([5]) is None and policy.roll_back_step([]) is None


def test_a_policy_resumes_as_it_was_saved():
    policy, _ = policy_after([10, 11, 12])
    policy.roll_back_step([9])
    policy.skip(SkippedStep(11, "why", "batch"))
    again = SkipPolicy(GuardConfig(roll_back_after=3))
    again.restore(policy.to_dict())
    assert (
        again.consecutive_skips == policy.consecutive_skips and again.to_dict() == policy.to_dict()
    )
    again.skip(SkippedStep(12, "", ""))
    assert again.skip(SkippedStep(13, "", ""))
    assert again.roll_back_step([9]) is None


def test_spikes():
    """A loss that stands out is told once it can be, and does not raise the bar."""
    rng, spikes = np.random.default_rng(0), SpikeDetector(6.0)
    losses = 3.0 + 0.1 * rng.normal(size=60)
    assert spikes.deviations_above(99.0) is None  # nothing to compare with
    spikes = SpikeDetector(6.0)
    assert not any(spikes.deviations_above(float(loss)) for loss in losses)
    above = (4.5 - losses.mean()) / losses.std()
    for _ in range(3):
        assert spikes.deviations_above(4.5) == pytest.approx(above)
    assert spikes.deviations_above(float("nan")) is None
    assert spikes.deviations_above(3.3) is None


def test_equal_losses_need_a_visible_step():
    spikes = SpikeDetector(6.0)
    for _ in range(30):
        spikes.deviations_above(2.0)
    assert spikes.deviations_above(2.01) is None and spikes.deviations_above(2.02) is not None


def test_what_was_wrong_is_named():
    """Of 4 layers the first is dense, so the third and fourth rows are layer 3 and MTP's."""
    model = dataclasses.replace(config_of().model, n_layers=4)
    zero = jnp.zeros(())
    router = RouterStats(*[jnp.zeros((4,))] * len(RouterStats._fields))

    def numbers(norm: float, lost: list[int]) -> Metrics:
        stats = router._replace(n_nonfinite=jnp.array(lost))
        norms = (jnp.float32(norm), jnp.float32(8.0))
        return Metrics(Losses(zero, {"loss": zero}), *norms, zero, stats, jnp.bool_(True))

    assert why_skipped(numbers(9.0, [0, 0, 0, 0]), model) == "the gradient norm 9 exceeds 8"
    found = why_skipped(numbers(float("inf"), [0, 0, 7, 12]), model)
    assert found == (
        "the gradient is not finite (norm inf); the router logits of 12 tokens are not finite in "
        "layer 3, MTP module 1"
    )


def test_events_are_kept_line_by_line(tmp_path):
    for number in range(2):
        EventLog(tmp_path / "new").add("skipped", step=number, text="why")
    lines = (tmp_path / "new/events.jsonl").read_text().splitlines()
    assert len(lines) == 2 and '"step": 1' in lines[1]
