"""Shapes and dtypes of what every public module returns, with and without jit.

The annotations say the same, and jaxtyping checks them in all tests; here they stand in one table,
with every letter a different number.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference.cases import ATTENTION, CONFIG, MOE, build, in_bfloat16

from dsv3_jax.config import LossConfig, ModelConfig
from dsv3_jax.losses import Batch, cross_entropy, next_token_loss, token_log_probs, training_loss
from dsv3_jax.model import rope
from dsv3_jax.model.block import DenseBlock, MoEBlock
from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.model.layers import Linear, RMSNorm, SwiGLU
from dsv3_jax.model.mla import MLA, Latents
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.mtp import MTP
from dsv3_jax.model.router import expert_counts, route_tokens, sequence_balance_loss
from dsv3_jax.numerics.attention import causal_attention
from dsv3_jax.numerics.gmm import grouped_matmul
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.quantize import BLOCK, TILE, TILE_T, dequantize, quantize
from dsv3_jax.serving.decode import Cache, decode_step, hidden_states, mtp_logits, prefill
from dsv3_jax.serving.model_view import ModelView
from dsv3_jax.serving.sampling import Sampling, sample
from sharding.layout import Layout
from sharding.mesh import BATCH, REPLICATED, MeshSpec, make_mesh

ONE, SIZE = Layout(), 18  # SIZE tokens of room in a cache
SMALL = dataclasses.replace(CONFIG, n_layers=2, mtp_depth=1)  # a dense layer, a MoE layer, MTP
LETTERS = {
    **{"B": 2, "T": 12, "U": 11, "D": CONFIG.width, "V": CONFIG.vocab_size, "F": 13, "t": 14},
    **{"E": MOE.n_experts, "K": MOE.top_k, "H": ATTENTION.n_heads, "C": ATTENTION.kv_rank, "e": 9},
    **{"N": ATTENTION.nope_dim, "R": ATTENTION.rope_dim, "O": ATTENTION.value_dim, "S": SIZE},
}
MOE_STATS = ("4 E float32", "4 float32", "4 int32", "4 int32", "4 int32")  # of 4 MoE layers


class Case(NamedTuple):
    """A function of arrays, and "letters dtype" of every array that it returns."""

    make: Callable  # () -> (function, arguments)
    outputs: tuple[str, ...]


def array(*letters: str, seed: int = 0) -> jax.Array:
    shape = [LETTERS[letter] for letter in letters]
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(letters: str = "BT") -> jax.Array:
    shape = [LETTERS[letter] for letter in letters]
    return jnp.asarray(np.random.default_rng(0).integers(0, LETTERS["V"], shape), jnp.int32)


def positions() -> jax.Array:
    return jnp.tile(jnp.arange(LETTERS["T"], dtype=jnp.int32), (LETTERS["B"], 1))


def module(make: Callable, *arguments, method: Callable | None = None, in_bf16=False) -> Callable:
    """Return a case's `make`: the module, or a method of it, on these arguments."""

    def case():
        built, _ = build(lambda: make(nnx.Rngs(0)))
        if in_bf16:
            built = in_bfloat16(built)
        arrays = [argument() for argument in arguments]
        call = built if method is None else lambda *arrays: method(built, *arrays)
        return call, arrays

    return case


def hidden() -> jax.Array:
    return array("B", "T", "D")


def model(rngs: nnx.Rngs, config: ModelConfig = CONFIG) -> DeepSeekV3:
    return DeepSeekV3(config, Policy(), rngs=rngs)


def small(rngs: nnx.Rngs) -> DeepSeekV3:
    return model(rngs, SMALL)


def small_weights(seed: int) -> nnx.State:
    return nnx.state(build(lambda: small(nnx.Rngs(0)), seed)[0])


def view() -> ModelView:
    mesh = make_mesh(MeshSpec(), jax.devices()[:1])
    return ModelView.of_state(SMALL, Policy(), mesh, small_weights(0))


def decode(fp8: bool = False, further: bool = False) -> Callable:
    def case():
        served = view().model

        def run(tokens, start):
            logits, cache = prefill(served, tokens, start, SIZE, ONE, fp8)
            return decode_step(served, tokens[:, :1], cache, ONE) if further else (logits, cache)

        return run, [tokens(), jnp.zeros(LETTERS["B"], jnp.int32)]

    return case


def loss_case(batch: Batch, loss_fn) -> Callable:
    def case():
        built, _ = build(lambda: model(nnx.Rngs(0)))
        return lambda batch: training_loss(
            built, batch, loss_fn, 1e-4, jnp.float32(0), ONE, "report"
        ), [batch]

    return case


def rows(n_targets: int) -> Batch:
    ids = np.random.default_rng(0).integers(
        0, LETTERS["V"], (LETTERS["B"], LETTERS["T"] + n_targets)
    )
    return Batch(jnp.asarray(ids, jnp.int32), jnp.ones(ids.shape, bool))


def absorbed(attention: MLA, h, at) -> jax.Array:
    mask = jnp.ones((LETTERS["B"], LETTERS["T"], LETTERS["T"]), bool)
    return attention.absorbed(attention.project_q(h, at), attention.compress_kv(h, at), mask)


def chunks(attention: MLA, h, at) -> jax.Array:
    latents = attention.compress_kv(h, at)
    return jnp.concatenate(list(attention(h, at, latents, n_chunks=LETTERS["T"])), axis=1)


def queries_keys_values() -> list[jax.Array]:
    return [array("B", "H", "T", "N"), array("B", "H", "T", "N", seed=1), array("B", "H", "T", "O")]


LAYER = ("B S C float32", "B S R float32")
FP8_LAYER = ("B S C float8_e4m3fn", "B S 1 float32", "B S R float32")

CASES = {
    "RMSNorm": Case(module(lambda _: RMSNorm(20, 1e-6), hidden), ("B T D float32",)),
    "RMSNorm bfloat16": Case(
        module(lambda _: RMSNorm(20, 1e-6), lambda: hidden().astype(jnp.bfloat16)),
        ("B T D bfloat16",),
    ),
    "Linear": Case(
        module(lambda rngs: Linear(20, 13, ("embed", "mlp"), 0.1, rngs=rngs), hidden),
        ("B T F float32",),
    ),
    "SwiGLU": Case(module(lambda rngs: SwiGLU(20, 13, 0.1, rngs=rngs), hidden), ("B T D float32",)),
    "rope.rotations": Case(
        lambda: (lambda at: rope.rotations(ATTENTION, at), [positions()]),
        ("B T R float32", "B T R float32"),
    ),
    "MLA": Case(
        module(lambda rngs: MLA(CONFIG, rngs=rngs), hidden, positions, method=chunks),
        ("B T D float32",),
    ),
    "MLA.compress_kv": Case(
        module(lambda rngs: MLA(CONFIG, rngs=rngs), hidden, positions, method=MLA.compress_kv),
        ("B T C float32", "B T R float32"),
    ),
    "MLA.project_q": Case(
        module(lambda rngs: MLA(CONFIG, rngs=rngs), hidden, positions, method=MLA.project_q),
        ("B H T N float32", "B H T R float32"),
    ),
    "MLA.up_project_kv": Case(
        module(
            lambda rngs: MLA(CONFIG, rngs=rngs),
            hidden,
            positions,
            method=lambda m, h, at: m.up_project_kv(m.compress_kv(h, at)),
        ),
        ("B H T N+R float32", "B H T O float32"),
    ),
    "MLA.absorbed": Case(
        module(lambda rngs: MLA(CONFIG, rngs=rngs), hidden, positions, method=absorbed),
        ("B T D float32",),
    ),
    "MLA bfloat16": Case(
        module(
            lambda rngs: MLA(CONFIG, rngs=rngs),
            lambda: hidden().astype(jnp.bfloat16),
            positions,
            method=chunks,
            in_bf16=True,
        ),
        ("B T D bfloat16",),
    ),
    "causal_attention": Case(
        lambda: (lambda q, k, v: causal_attention(q, k, v, 0.1), queries_keys_values()),
        ("B H T O float32",),
    ),
    "route_tokens": Case(
        lambda: (
            lambda scores: route_tokens(scores, jnp.zeros(LETTERS["E"]), MOE),
            [jax.nn.sigmoid(array("t", "E"))],
        ),
        ("t K float32", "t K int32"),
    ),
    "expert_counts": Case(
        lambda: (
            lambda ids: expert_counts(ids, LETTERS["E"]),
            [jnp.zeros((LETTERS["t"], LETTERS["K"]), jnp.int32)],
        ),
        ("E float32",),
    ),
    "sequence_balance_loss": Case(
        lambda: (
            lambda counts, affinity: sequence_balance_loss(counts, affinity, LETTERS["K"]),
            [jnp.ones((LETTERS["B"], LETTERS["E"])), jnp.ones((LETTERS["B"], LETTERS["E"]))],
        ),
        ("float32",),
    ),
    "MoE": Case(
        module(lambda rngs: MoE(CONFIG, rngs=rngs), hidden, method=lambda m, h: m(h, ONE)),
        ("B T D float32", "B E float32", "B E float32", "int32", "int32", "int32"),
    ),
    "DenseBlock": Case(
        module(
            lambda rngs: DenseBlock(CONFIG, rngs=rngs),
            hidden,
            positions,
            method=lambda m, x, at: m(x, at, ONE),
        ),
        ("B T D float32",),
    ),
    "MoEBlock": Case(
        module(
            lambda rngs: MoEBlock(CONFIG, rngs=rngs),
            hidden,
            positions,
            method=lambda m, x, at: m(x, at, ONE),
        ),
        ("B T D float32", "E float32", "float32", "int32", "int32", "int32"),
    ),
    "MTP": Case(
        module(
            lambda rngs: MTP(CONFIG, rngs=rngs),
            hidden,
            hidden,
            positions,
            method=lambda m, x, embedded, at: m(x, embedded, at, ONE),
        ),
        ("B T D float32", "E float32", "float32", "int32", "int32", "int32"),
    ),
    "DeepSeekV3": Case(module(model, tokens), ("B T V float32",)),
    "DeepSeekV3.hidden_states": Case(
        module(model, tokens, method=lambda m, ids: m.hidden_states(ids)[0]), ("B T D float32",)
    ),
    "DeepSeekV3.mtp_logits": Case(
        module(small, tokens, method=DeepSeekV3.mtp_logits), ("B U V float32",)
    ),
    "DecodeModel.hidden_states": Case(
        lambda: (
            (lambda served: lambda ids: hidden_states(served, ids, ONE))(view().model),
            [tokens()],
        ),
        ("B T D float32",),
    ),
    "DecodeModel.mtp_logits": Case(
        lambda: (
            (lambda served: lambda ids: mtp_logits(served, ids, ONE))(view().model),
            [tokens()],
        ),
        ("B U V float32",),
    ),
    "prefill": Case(decode(), ("B V float32", *LAYER * 2, "B int32", "int32")),
    "decode_step": Case(decode(further=True), ("B 1 V float32", *LAYER * 2, "B int32", "int32")),
    "prefill FP8 cache": Case(
        decode(fp8=True), ("B V float32", *FP8_LAYER * 2, "B int32", "int32")
    ),
    "sample": Case(
        lambda: (
            lambda logits, keys: sample(
                logits,
                keys,
                jnp.zeros(LETTERS["B"], jnp.int32),
                Sampling(temperature=1.0, top_p=0.9),
            ),
            [array("B", "V"), jax.random.key_data(jax.random.split(jax.random.key(0)))],
        ),
        ("B int32",),
    ),
    "quantize tiles": Case(
        lambda: (lambda x: quantize(x, TILE), [jnp.ones((14, 256))]),
        ("t 256 float8_e4m3fn", "t 2 float32"),
    ),
    "quantize transposed tiles": Case(
        lambda: (lambda x: quantize(x, TILE_T), [jnp.ones((256, 14))]),
        ("256 t float8_e4m3fn", "2 t float32"),
    ),
    "quantize blocks": Case(
        lambda: (lambda x: quantize(x, BLOCK), [jnp.ones((384, 256))]),
        ("384 256 float8_e4m3fn", "3 2 float32"),
    ),
    "dequantize": Case(
        lambda: (
            lambda x: dequantize(quantize(x, TILE), TILE, jnp.bfloat16),
            [jnp.ones((14, 256))],
        ),
        ("t 256 bfloat16",),
    ),
    "grouped_matmul": Case(
        lambda: (
            lambda x, w: grouped_matmul(x, w, jnp.ones(LETTERS["e"], jnp.int32), "cpu"),
            [array("t", "D"), array("e", "D", "F")],
        ),
        ("t F float32",),
    ),
    "token_log_probs": Case(
        lambda: (
            lambda x, head: token_log_probs(x, head, tokens("t"), MeshSpec()),
            [array("t", "D"), array("V", "D")],
        ),
        ("t float32",),
    ),
    "cross_entropy": Case(
        lambda: (
            lambda x, head: cross_entropy(x, head, tokens("t"), jnp.ones(14), MeshSpec()),
            [array("t", "D"), array("V", "D")],
        ),
        ("float32",),
    ),
    "training_loss": Case(
        loss_case(rows(1 + CONFIG.mtp_depth), next_token_loss(LossConfig(), CONFIG.mtp_depth)),
        ("float32", "float32", "float32", "float32", *MOE_STATS),
    ),
}


def shape_and_dtype(output: str) -> tuple[tuple[int, ...], str]:
    *dims, dtype = output.split()
    sizes = [sum(LETTERS.get(x) or int(x) for x in dim.split("+")) for dim in dims]
    return tuple(sizes), dtype


COMPILED = ("DecodeModel.hidden_states", "DecodeModel.mtp_logits")  # too slow otherwise


@pytest.mark.parametrize(
    "name, jit",
    [(name, jit) for name in CASES for jit in (True, False) if jit or name not in COMPILED],
)
def test_shapes_and_dtypes(name, jit):
    run, arguments = CASES[name].make()
    outputs = jax.tree.leaves((jax.jit(run) if jit else run)(*arguments))
    want = [shape_and_dtype(output) for output in CASES[name].outputs]
    assert len(outputs) == len(want)
    chex.assert_shape(outputs, [shape for shape, _ in want])
    chex.assert_type(outputs, [dtype for _, dtype in want])
    chex.assert_tree_all_finite([x for x in outputs if x.dtype != jnp.float8_e4m3fn])


def test_letters_differ():
    """A dimension in the place of another is seen."""
    assert len(set(LETTERS.values())) == len(LETTERS)


def test_decode_step_is_traced_once():
    """Whatever the cache holds, and with other weights."""
    served, batch = view(), LETTERS["B"]
    layer = Latents(BATCH, BATCH)
    cache = Cache((layer,) * SMALL.n_layers, BATCH, REPLICATED)

    def start(model, ids):
        return prefill(model, ids, jnp.zeros(ids.shape[0], jnp.int32), SIZE, served.layout)

    @functools.partial(chex.assert_max_traces, n=1)
    def further(model, ids, cache):
        return decode_step(model, ids, cache, served.layout)

    first = served.program(start, (BATCH,), (BATCH, cache))
    step = served.program(further, (BATCH, cache), (BATCH, cache), donate=(1,))
    _, latents = first(tokens())
    for number in range(3):
        _, latents = step(tokens()[:, number : number + 1], latents)
    served.update_weights(small_weights(1))
    logits, latents = step(tokens()[:, :1], latents)
    chex.assert_shape(logits, (batch, 1, LETTERS["V"]))
    assert latents.length == LETTERS["T"] + 4
