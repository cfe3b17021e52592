"""A view of a training state generates as a fresh view does, and leaves the state alone."""

import dataclasses
import functools
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference.cases import CONFIG, assert_close, build
from reference.compilations import compilations
from reference.goldens import GOLDENS
from reference.small_step import batch_of, config_of, loss_of

from dsv3_jax import load_pretrained
from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer
from dsv3_jax.params import named_arrays
from dsv3_jax.serving import decode, model_view
from dsv3_jax.serving.generator import Generator
from dsv3_jax.serving.model_view import ModelView
from dsv3_jax.training.state import abstract_state, init_sharded_state, make_layout
from dsv3_jax.training.step import make_step
from sharding.mesh import BATCH, make_mesh, named_sharding, parse_mesh

PROMPTS = ((1, 5, 9), (7, 3, 2, 8, 31))
N_NEW = 6


def generate(view: ModelView, generator: Generator | None = None) -> np.ndarray:
    steps = (generator or Generator(view))(PROMPTS, N_NEW)
    return np.stack([step.tokens for step in steps], axis=1)


@functools.cache
def training(zero: int):
    """(config, mesh, a fresh state, the step) of a small run with MTP on four devices."""
    config, spec = config_of(zero), parse_mesh("dp2,ep2")
    mesh = make_mesh(spec, jax.devices()[:4])
    layout, policy = make_layout(config, spec), Policy.of(config.precision)
    optimizer = make_optimizer(config.optimizer, policy)
    state = init_sharded_state(config, optimizer, abstract_state(config, optimizer, mesh, layout))
    loss = loss_of(config)
    loss = loss._replace(from_hidden=chex.assert_max_traces(loss.from_hidden, n=1))
    return config, mesh, state, make_step(config, optimizer, mesh, layout, loss)


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_live_training_state(zero):
    """Generate, train a step, update, generate: as a new view, and without another compilation.

    The train step is traced once, with the first state and with those that it returns.
    """
    config, mesh, state, step = training(zero)
    policy = Policy.of(config.precision)
    before = jax.tree.map(np.asarray, (state.params, state.bias))
    view = ModelView.of_state(config.model, policy, mesh, state.params, state.bias)
    generator = Generator(view)
    first = generate(view, generator)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.bias), before)
    rows = jax.device_put(batch_of(0), named_sharding(mesh, BATCH))
    state, _ = step(state, rows)  # donates the state that the view was made from
    np.testing.assert_array_equal(generate(view, generator), first)
    view.update_weights(state.params, state.bias)  # compiles for the layout that the step returns
    with compilations() as count:
        view.update_weights(state.params, state.bias)
        second = generate(view, generator)
    assert not count
    assert (second != first).any()
    fresh = ModelView.of_state(config.model, policy, mesh, state.params, state.bias)
    np.testing.assert_array_equal(second, generate(fresh))
    step(state, jax.device_put(batch_of(1), named_sharding(mesh, BATCH)))  # it is still whole


def test_mtp_logits_are_those_of_the_model():
    config = dataclasses.replace(CONFIG, mtp_depth=1)
    model, _ = build(lambda: DeepSeekV3(config, Policy(), rngs=nnx.Rngs(0)))
    mesh = make_mesh(parse_mesh("dp1"), jax.devices()[:1])
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (3, 9), np.int32)
    view = ModelView.of_state(config, Policy(), mesh, nnx.state(model))

    def run(model, tokens):
        logits = model.logits(decode.hidden_states(model, tokens, view.layout), view.layout)
        return logits, decode.mtp_logits(model, tokens, view.layout)

    logits, mtp = view.program(run, (BATCH,), (BATCH, BATCH))(tokens)
    want, want_mtp = nnx.jit(lambda m, x: (m(x), m.mtp_logits(x)))(model, tokens)
    assert_close(logits, want)
    assert_close(mtp, want_mtp)


def test_weights_are_in_the_compute_format():
    """And norms, router, bias and embedding in float32, as in training."""
    model, _ = build(lambda: DeepSeekV3(CONFIG, Policy(), rngs=nnx.Rngs(0)))
    mesh = make_mesh(parse_mesh("dp1"), jax.devices()[:1])
    policy = Policy(compute=jnp.dtype("bfloat16"))
    view = ModelView.of_state(CONFIG, policy, mesh, nnx.state(model))
    block = view.model.moe[1]
    assert block.attention.kv_up.kernel[...].dtype == view.model.head[...].dtype == jnp.bfloat16
    wide = (block.ffn.router, block.ffn.bias, block.ffn_norm.scale, view.model.embedding)
    assert {x[...].dtype.name for x in wide} == {"float32"}
    want = named_arrays(nnx.state(model))["moe.attention.kv_up.kernel"][1].astype(jnp.bfloat16)
    np.testing.assert_array_equal(block.attention.kv_up.kernel[...], want)


def test_take_frees_one_stack_after_the_other(monkeypatch):
    """So that the model is never in memory twice."""
    model, _ = build(lambda: DeepSeekV3(CONFIG, Policy(), rngs=nnx.Rngs(0)))
    mesh = make_mesh(parse_mesh("dp1"), jax.devices()[:1])
    stacks = {path: x for path, x in named_arrays(nnx.state(model)).items() if "." in path}
    stacks = [weakref.ref(x) for path, x in stacks.items() if path.split(".")[0] != "norm"]
    unstack, alive = model_view._unstack, []

    def counting(stacked):
        alive.append(sum(ref() is not None for ref in stacks))
        return unstack(stacked)

    monkeypatch.setattr(model_view, "_unstack", counting)
    view = ModelView.take(model, mesh)
    assert alive == list(range(len(stacks), 0, -1))
    assert not jax.tree.leaves(nnx.state(model)) and len(view.model.blocks) == CONFIG.n_layers


def test_released_fp8_weights_are_not_updated():
    mesh = make_mesh(parse_mesh("dp1"), jax.devices()[:1])
    view = ModelView.take(load_pretrained(GOLDENS / "C2_official_fp8", "fp8"), mesh)
    with pytest.raises(ValueError, match="can't be updated; use bfloat16"):
        view.update_weights()
