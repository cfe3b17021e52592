"""Parity with the reference implementations, on the goldens kept in tests/goldens.

A*: transformers' DeepseekV3ForCausalLM; D1: its MTP module; E: the released router. Tolerances are
those of the goldens' manifest: logits and hidden states 2e-4 + 1e-4 relative (3e-4 for D1), loss
2e-5, router ids exact and weights 1e-5 (1e-6 for E), gradients 1e-3 of a tensor's largest.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference.goldens import (
    CASES,
    GOLDENS,
    assert_close,
    check_choice,
    golden,
    layer_by_layer,
    model_of,
)

from dsv3_jax.config import LossConfig, MoEConfig
from dsv3_jax.losses import Batch, next_token_loss, training_loss
from dsv3_jax.model.rope import frequencies, softmax_scale
from dsv3_jax.model.router import route_tokens
from dsv3_jax.params import named_arrays
from dsv3_jax.weights.hf_config import read_config
from dsv3_jax.weights.hf_names import to_official
from sharding.layout import Layout

ROUTERS = ["v3_like", "small", "neg_bias", "nonorm_1group", "wide_logits"]
LARGE = ("A2_yarn", "A5_proportional", "A6_sharded_bf16")  # longer, and more experts


def slowly(case: str, *more):
    """The parameters of a test that takes over ten seconds on a large case."""
    return pytest.param(case, *more, marks=[pytest.mark.slow] if case in LARGE else [])


@pytest.mark.parametrize("case", [slowly(case) for case in CASES])
def test_logits(case):
    want, model = golden(case), model_of(case)
    logits = nnx.jit(lambda model, tokens: model(tokens))
    assert_close(logits(model, want["input_ids"]), want["logits"])
    assert_close(logits(model, want["short.input_ids"]), want["short.logits"])


@pytest.mark.parametrize("case", CASES)
def test_every_layer_and_router(case):
    want, model = golden(case), model_of(case)
    for name, got in nnx.jit(layer_by_layer)(model, want["input_ids"]).items():
        if name.startswith("router."):
            check_choice(got, want, f"moe.layer{name[7:]}", "ids", atol=1e-5)
        elif name in want:  # the larger cases leave the branch outputs out
            assert_close(got, want[name])


@pytest.mark.parametrize(
    "case, remat",
    [slowly(case, "report") for case in CASES]
    + [pytest.param("A1_basic", r, marks=pytest.mark.slow) for r in ("full", "none")],
)
def test_loss_and_gradients(case, remat):
    want, model = golden(case), model_of(case)
    loss, got = loss_and_gradients(model, want["input_ids"], remat)
    assert_close(loss["loss"], want["loss"][0], atol=2e-5, rtol=0)
    check_gradients(got, case)


def test_mtp():
    want, model = golden("D1_mtp"), model_of("D1_mtp")
    tokens = want["input_ids"]
    close = functools.partial(assert_close, atol=3e-4)
    run = nnx.jit(lambda m, x: (m(x), m.hidden_states(x)[0], m.mtp_logits(x)))
    logits, hidden, mtp_logits = run(model, tokens)
    close(logits, want["main_logits"])
    close(hidden, want["main_hidden_post_norm"])
    close(mtp_logits, want["mtp_logits"])
    loss, got = loss_and_gradients(model, tokens, "report")
    close(loss["loss"], want["main_loss"][0], atol=2e-5)
    close(loss["mtp_loss"], want["mtp_loss"][0], atol=2e-5)
    close(loss["total"], want["total_loss_lambda0.3"][0], atol=2e-5)
    check_gradients(got, "D1_mtp")


def loss_and_gradients(model, tokens, remat):
    """Loss over all pairs of the golden's rows, padded so that every depth has T inputs."""
    depth = model.config.mtp_depth
    padded = jnp.pad(tokens, ((0, 0), (0, depth)))
    batch = Batch(padded, jnp.pad(jnp.ones(tokens.shape, bool), ((0, 0), (0, depth))))
    config = LossConfig()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params):
        model = nnx.merge(graphdef, params, rest)
        losses, _ = training_loss(
            model, batch, next_token_loss(config, depth), 0.0, jnp.float32(0), Layout(), remat
        )
        return losses.total, losses.terms | {"total": losses.total}

    grads, losses = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
    return losses, to_official(named_arrays(grads), model.config)


def check_gradients(got, case):
    with np.load(GOLDENS / case / "grads.npz") as file:
        want = {name.removeprefix("grad."): file[name] for name in file}
    for name, value in want.items():
        error, size = np.abs(got[name] - value).max(), np.abs(value).max()
        assert error <= 1e-3 * size, f"{name}: off by {error}, largest {size}"
    norms = json.loads((GOLDENS / case / "meta.json").read_text()).get("grad_l2", {})
    for name, norm in norms.items():
        name = name.removeprefix("grad.")
        np.testing.assert_allclose(
            np.linalg.norm(got[name]), norm, rtol=1e-3, atol=1e-7, err_msg=name
        )


@pytest.mark.parametrize("case", [c for c in CASES if "yarn.inv_freq" in golden(c)])
def test_yarn(case):
    want, attention = golden(case), read_config(GOLDENS / case).attention
    np.testing.assert_allclose(frequencies(attention), want["yarn.inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(softmax_scale(attention), want["yarn.softmax_scale"][0], rtol=1e-6)


@pytest.mark.parametrize("case", ROUTERS)
def test_router(case):
    want = golden("E_router")
    meta = json.loads((GOLDENS / "E_router" / "meta.json").read_text())[case]
    config = MoEConfig(
        n_experts=meta["n_routed_experts"],
        n_shared=0,
        hidden=1,
        top_k=meta["top_k"],
        n_groups=meta["n_group"],
        topk_groups=meta["topk_group"],
        scale=meta["routed_scaling_factor"],
        normalize=meta["norm_topk_prob"],
    )
    scores = jax.nn.sigmoid(jnp.asarray(want[f"{case}.logits"]))
    got = route_tokens(scores, jnp.asarray(want[f"{case}.bias"]), config)
    check_choice(got, want, case, "ids_sorted", atol=1e-6)
