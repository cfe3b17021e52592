"""A released FP8 checkpoint used as it is: FP8 in memory and in matmuls, no wide copy."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import fp8 as reference
from reference.cases import decode_model
from reference.goldens import GOLDENS, golden, model_of

from dsv3_jax import load_pretrained
from dsv3_jax.numerics.fp8 import Fp8Weight
from dsv3_jax.numerics.matmul import dequantized
from dsv3_jax.numerics.quantize import dequantize
from dsv3_jax.serving.decode import decode_step, prefill
from dsv3_jax.serving.generator import Generator
from dsv3_jax.serving.model_view import ModelView
from dsv3_jax.weights.pretrained import as_mesh
from dsv3_jax.weights.safetensors import SafetensorsReader
from dsv3_jax.weights.sources import open_weights
from sharding.layout import Layout
from sharding.mesh import make_mesh, parse_mesh

CASE = "C2_official_fp8"
# As users' programs are compiled: a float32 sum in another order moves an FP8 value now and then,
# and every later token reads it.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def test_equals_the_official_code_with_its_fp8_matmuls():
    """Token by token and absorbed throughout, as the golden was made; activations in float32."""
    want = golden(CASE)
    length = json.loads((GOLDENS / CASE / "meta.json").read_text())["prefill_len"]
    model = load_pretrained(GOLDENS / CASE, "fp8")
    model.policy = dataclasses.replace(model.policy, compute=jnp.dtype("float32"))
    served, tokens = decode_model(model), want["input_ids"]
    nobody = np.zeros(len(tokens), np.int32)
    first = jax.jit(lambda s, t: prefill(s, t, nobody, 64, Layout()), compiler_options=OPTIMIZED)
    step = jax.jit(lambda s, t, c: decode_step(s, t, c, Layout()), compiler_options=OPTIMIZED)
    _, cache = first(served, tokens[:, :1])
    logits, cache = step(served, tokens[:, :length], cache._replace(length=jnp.int32(0)))
    parts = [logits]
    for place in range(length, tokens.shape[1]):
        logits, cache = step(served, tokens[:, place : place + 1], cache)
        parts.append(logits)
    got = np.concatenate(parts, axis=1)
    names = ("prefill_all", "decode_step")
    official = np.concatenate([want[f"fp32act_fp8gemm.{n}_logits"] for n in names], axis=1)
    error = np.sqrt(np.square(got - official).mean(-1)) / official.std(-1)
    assert np.median(error) < 2e-2  # the manifest's; wrong scales give 7e-2
    assert (error[:, 0] < 1e-4).all()  # before the first FP8 value that moves


def test_values_and_scales_are_those_of_the_files():
    model = load_pretrained(GOLDENS / CASE, "fp8")
    wide = model_of(CASE)
    for state in (model, wide):
        assert nnx.state(state)  # both whole
    found = {".".join(path): x for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    plain = {".".join(path): x for path, x in nnx.to_flat_state(nnx.state(wide, nnx.Param))}
    kinds = {path: isinstance(x.get_value(), Fp8Weight) for path, x in found.items()}
    assert kinds["moe.ffn.gate_up"] and kinds["dense.attention.kv_up.kernel"]
    assert not any(kinds[path] for path in ("embedding", "head", "moe.ffn.router", "norm.scale"))
    for path, is_fp8 in kinds.items():
        if is_fp8:
            values = found[path].get_value()
            np.testing.assert_array_equal(dequantized(values, jnp.float32), plain[path][...])
    folder = SafetensorsReader(GOLDENS / CASE)
    n_bytes = sum(math.prod(x.shape) for x in folder.values() if x.dtype == "F8_E4M3")
    ours = sum(found[path].get_value().quantized.values.nbytes for path in kinds if kinds[path])
    assert ours == n_bytes


def test_a_mesh_holds_what_one_device_does():
    """Experts over ranks, each with its scales; C2's vocabulary of 171 cannot be divided."""
    mesh, layout = make_mesh(parse_mesh("ep2"), jax.devices()[:2]), Layout(mesh=parse_mesh("ep2"))
    source = open_weights(GOLDENS / CASE)
    scales = source.scales(mesh, dataclasses.replace(layout, zero=0))
    whole = load_pretrained(GOLDENS / CASE, "fp8").moe.ffn.down.get_value().quantized.scale
    split = scales["moe.ffn.down"]
    np.testing.assert_array_equal(split, whole)
    assert {x.data.shape for x in split.addressable_shards} == {(1, 3, *whole.shape[2:])}


def test_latent_cache_in_fp8():
    """FP8 values of the latents, and logits near those with the unquantized cache; fewer bytes."""
    model = load_pretrained(GOLDENS / CASE)
    config, served, tokens = model.config, decode_model(model), golden(CASE)["input_ids"]
    nobody = np.zeros(len(tokens), np.int32)
    logits, caches = [], []
    for fp8 in (False, True):
        _, cache = jax.jit(lambda s, t, fp8=fp8: prefill(s, t, nobody, 16, Layout(), fp8))(
            served, tokens[:, :8]
        )
        further, cache = jax.jit(lambda s, t, c: decode_step(s, t, c, Layout()))(
            served, tokens[:, 8:12], cache
        )
        logits.append(np.asarray(further))
        caches.append(cache)
    wide, narrow = (cache.layers[0] for cache in caches)
    want = reference.quantized(wide.c_kv[:, :12].reshape(-1, config.attention.kv_rank), (1, 128))
    got = dequantize(narrow.c_kv, (1, 128))[:, :12].reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    np.testing.assert_array_equal(narrow.k_rope, wide.k_rope)
    error = np.sqrt(np.square(logits[1] - logits[0]).mean(-1)) / logits[0].std(-1)
    assert 1e-4 < np.median(error) < 5e-2
    nbytes = [sum(x.nbytes for x in jax.tree.leaves(cache.layers)) for cache in caches]
    numbers = config.attention.kv_rank + config.attention.rope_dim
    a_token = config.attention.kv_rank * (1 + 4 / 128) + 4 * config.attention.rope_dim
    assert nbytes[1] / nbytes[0] == pytest.approx(a_token / (4 * numbers))


def test_generates_with_both_in_fp8():
    mesh = as_mesh(None)
    prompts = golden(CASE)["input_ids"][:, :5].tolist()
    view = ModelView.take(load_pretrained(GOLDENS / CASE, "fp8"), mesh)
    generator = Generator(view, fp8_cache=True)
    steps = list(generator(prompts, 3))
    assert len(steps) == 3 and all((step.tokens < 171).all() for step in steps)


def test_what_is_not_in_fp8_is_refused():
    with pytest.raises(ValueError, match="is BF16, not FP8; use dtype='bfloat16'"):
        load_pretrained(GOLDENS / "C1_official", "fp8")
    with pytest.raises(ValueError, match=r"2 matrices of width 272, no multiple of 128"):
        load_pretrained(GOLDENS / "B1_fp8", "fp8")
    with pytest.raises(ValueError, match="one of float32, bfloat16, fp8"):
        load_pretrained(GOLDENS / CASE, "fp16")
