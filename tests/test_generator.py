"""Generator: greedy and drawn tokens are the same on every mesh, and those of the full forward."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from reference.cases import CONFIG, build
from reference.compilations import compilations

from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.serving.generator import CACHE_MULTIPLE, Generator
from dsv3_jax.serving.model_view import ModelView
from dsv3_jax.serving.sampling import GREEDY, Sampling
from dsv3_jax.weights.pretrained import load_model
from dsv3_jax.weights.sources import InMemory
from sharding.mesh import make_mesh, parse_mesh

VOCAB = 40
SIZES = dataclasses.replace(
    CONFIG,
    vocab_size=VOCAB,
    width=24,
    n_layers=2,
    moe=dataclasses.replace(CONFIG.moe, n_experts=16, n_groups=8, topk_groups=3),
)
PROMPTS = ((1, 5, 9), (7, 3, 2, 8, 31, 4, 6), (12, 11, 10, 39, 2))
DRAWN = Sampling(temperature=2.0, top_p=0.9)
N_NEW = CACHE_MULTIPLE - max(map(len, PROMPTS))  # fills the cache to its end


def fresh_model() -> DeepSeekV3:
    return build(lambda: DeepSeekV3(SIZES, Policy(), rngs=nnx.Rngs(0)))[0]


@functools.cache
def generator(mesh_text: str) -> Generator:
    spec = parse_mesh(mesh_text)
    mesh = make_mesh(spec, jax.devices()[: spec.n_devices])
    return Generator(ModelView.take(load_model(InMemory(fresh_model()), "float32", mesh), mesh))


@functools.cache
def tokens(mesh: str, sampling: Sampling, seed: int = 0) -> np.ndarray:
    """New tokens [B N_NEW] of PROMPTS."""
    steps = generator(mesh)(PROMPTS, N_NEW, sampling, seed=seed)
    return np.stack([step.tokens for step in steps], axis=1)


def greedy() -> np.ndarray:
    return tokens("dp1", GREEDY)


def test_greedy_is_the_argmax_of_the_full_forward():
    texts = [np.r_[prompt, new] for prompt, new in zip(PROMPTS, greedy(), strict=True)]
    rows = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    logits = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(fresh_model(), rows))
    for prompt, new, row in zip(PROMPTS, greedy(), logits, strict=True):
        steps = row[len(prompt) - 1 :][:N_NEW]
        np.testing.assert_array_equal(steps.argmax(-1), new)
        best = np.sort(steps)[:, -2:]
        assert (best[:, 1] - best[:, 0]).min() > 1e-4  # no near-ties: what follows is exact


def test_draws_depend_on_the_seed():
    assert (tokens("dp1", DRAWN) != tokens("dp1", DRAWN, seed=1)).any(1).all()
    assert (tokens("dp1", DRAWN) != greedy()).any()


def test_a_row_does_not_depend_on_the_others():
    """Neither on their tokens nor on the padding that their lengths make."""
    others = (*PROMPTS[:2], (3,) * 10)
    got = np.stack([step.tokens for step in generator("dp1")(others, 20, DRAWN)], axis=1)
    np.testing.assert_array_equal(got[:2], tokens("dp1", DRAWN)[:2, :20])


@pytest.mark.parametrize(
    "mesh, sampling",
    [("dp2,ep2", DRAWN)]
    + [pytest.param(mesh, DRAWN, marks=pytest.mark.slow) for mesh in ("ep4", "ep2x2", "ep8")]
    + [pytest.param(mesh, GREEDY, marks=pytest.mark.slow) for mesh in ("ep4", "dp2,ep2", "ep2x2")],
)
def test_a_mesh_changes_nothing(mesh, sampling):
    """Three rows are no multiple of its shares: the batch is padded."""
    assert len(PROMPTS) % parse_mesh(mesh).n_data_shards
    np.testing.assert_array_equal(tokens(mesh, sampling), tokens("dp1", sampling))


def test_parameters_lie_where_the_programs_want_them():
    """Nothing is moved at a call: experts, embedding and head are split over the expert axes."""
    view = generator("dp2,ep2").view
    for leaf, spec in zip(view._leaves, view._specs, strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(view.mesh, spec), leaf.ndim)
    assert len({str(spec) for spec in view._specs}) > 2


def test_rows_end_with_a_stop_id():
    ends = (3, 5, 1)  # the step that ends each row
    stop_ids = [int(greedy()[row, end]) for row, end in enumerate(ends)]
    hits = np.isin(greedy(), stop_ids)
    last = int(hits.argmax(1).max())
    assert hits.any(1).all() and len(set(hits.argmax(1))) > 1 and last < N_NEW - 1
    steps = list(generator("dp1")(PROMPTS, N_NEW, stop_ids=stop_ids))
    assert len(steps) == last + 1
    for i, step in enumerate(steps):
        np.testing.assert_array_equal(step.done, hits[:, : i + 1].any(1))
        np.testing.assert_array_equal(step.tokens, greedy()[:, i])


@pytest.mark.parametrize("n", [1, 2])
def test_max_new(n):
    steps = list(generator("dp1")(PROMPTS, n))
    np.testing.assert_array_equal(np.stack([step.tokens for step in steps], 1), greedy()[:, :n])
    assert not steps[-1].done.any()


def test_the_same_sizes_compile_once():
    greedy()  # compiled now
    others = [[(token + 1) % VOCAB for token in prompt] for prompt in PROMPTS]
    with compilations() as count:
        list(generator("dp1")(others, N_NEW - 1, stop_ids=[3], seed=5))
    assert not count


@pytest.mark.parametrize(
    "prompts, max_new, message",
    [
        ([], 3, "at least one token"),
        ([[1], []], 3, "at least one token"),
        ([[1, 2]], 0, "max_new=0 must be at least 1"),
        ([[1, 40]], 3, "token id 40 is outside the vocabulary of 40: the tokenizer is not this"),
        ([[1], [2, -1]], 3, "token id -1 is outside"),
    ],
)
def test_bad_requests(prompts, max_new, message):
    with pytest.raises(ValueError, match=message):
        next(generator("dp1")(prompts, max_new))
