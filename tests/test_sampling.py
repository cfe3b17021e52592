"""Sampling against a NumPy twin, and the frequencies of its draws."""

import functools

import jax
import numpy as np
import pytest
import scipy.stats

from dsv3_jax.serving.sampling import GREEDY, Sampling, sample, top_p

N_ROWS, VOCAB = 5, 23
keep = functools.partial(jax.jit, static_argnums=1)(top_p)
choose = functools.partial(jax.jit, static_argnums=3)(sample)


def some_logits() -> np.ndarray:
    return 2 * np.random.default_rng(0).normal(size=(N_ROWS, VOCAB)).astype(np.float32)


def keys(n: int, seed: int = 0) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), n)))


def places(n: int, place: int = 6) -> np.ndarray:
    return np.full(n, place, np.int32)


def softmax(x):
    raised = np.exp(x - x.max())
    return raised / raised.sum()


def top_p_twin(row: np.ndarray, top_p: float) -> set[int]:
    """Tokens from the likeliest on, until their probabilities reach `top_p`."""
    probability, kept, total = softmax(row.astype(np.float64)), set(), 0.0
    for token in np.argsort(-probability):
        kept.add(int(token))
        total += probability[token]
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_top_p(top_p):
    logits = some_logits()
    got = np.asarray(keep(logits, top_p))
    for row, kept in zip(logits, got, strict=True):
        want = top_p_twin(row, top_p)
        assert set(np.flatnonzero(kept > -np.inf)) == want
        np.testing.assert_array_equal(kept[sorted(want)], row[sorted(want)])
    if top_p == 1e-6:
        np.testing.assert_array_equal((got > -np.inf).sum(1), 1)


def test_top_p_of_all():
    np.testing.assert_array_equal(keep(some_logits(), 1.0), some_logits())


def test_top_p_stops_as_soon_as_top_p_is_reached():
    """Probabilities 1/2, 1/4, 1/8, 1/8 are exact in float32."""
    logits = np.log(np.array([[0.125, 0.5, 0.125, 0.25]], np.float32))
    assert (np.asarray(keep(logits, 0.7)) > -np.inf).tolist() == [[False, True, False, True]]
    assert (np.asarray(keep(logits, 0.8)) > -np.inf).all()


def test_top_p_keeps_equals_together():
    logits = np.array([[1.0, 3.0, 3.0, 0.0, 3.0]], np.float32)
    assert (np.asarray(keep(logits, 0.1)) > -np.inf).tolist() == [[False, True, True, False, True]]


def test_temperature_0_takes_the_likeliest():
    got = choose(some_logits(), keys(N_ROWS), places(N_ROWS), GREEDY)
    np.testing.assert_array_equal(got, some_logits().argmax(1))
    nearly = Sampling(temperature=1e-4)
    np.testing.assert_array_equal(choose(some_logits(), keys(N_ROWS), places(N_ROWS), nearly), got)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.0), Sampling(temperature=0.6, top_p=0.9), Sampling(temperature=1.7)],
)
def test_frequencies_match_the_probabilities(sampling):
    """Chi-squared over 20,000 draws: a true sampler exceeds the bound once in a million seeds."""
    n, row = 20_000, some_logits()[0]
    drawn = choose(np.tile(row, (n, 1)), keys(n), places(n), sampling)
    kept = sorted(top_p_twin(row / sampling.temperature, sampling.top_p))
    count = np.bincount(drawn, minlength=VOCAB)
    assert count.sum() == n == count[kept].sum()
    expected = n * softmax(row[kept].astype(np.float64) / sampling.temperature)
    common = expected >= 5  # the others together, as the test asks for
    seen = np.r_[count[kept][common], count[kept][~common].sum()]
    wanted = np.r_[expected[common], expected[~common].sum()]
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = (np.square(seen - wanted) / wanted).sum()
    assert statistic < scipy.stats.chi2.isf(1e-6, len(seen) - 1)


def test_draws_of_a_row_depend_on_its_key_and_place_only():
    sampling, n = Sampling(temperature=1.0), 400
    same = np.tile(some_logits()[:1], (n, 1))
    one = np.asarray(choose(same, keys(n), places(n), sampling))
    np.testing.assert_array_equal(choose(same, keys(n), places(n), sampling), one)
    turned = choose(same, keys(n)[::-1], places(n), sampling)
    np.testing.assert_array_equal(turned, one[::-1])
    agree = softmax(same[0].astype(np.float64)) @ softmax(same[0].astype(np.float64))
    for other in (
        choose(same, keys(n), places(n, place=7), sampling),
        choose(same, keys(n, seed=1), places(n), sampling),
    ):
        assert abs((one == np.asarray(other)).mean() - agree) < 5 * np.sqrt(agree / n)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"top_p": float("nan")}, "top_p=nan"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
