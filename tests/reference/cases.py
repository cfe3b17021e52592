"""What the tests of layers and model share: sizes, random weights, their names in the twin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.params import all_gather_params, named_arrays
from dsv3_jax.serving.decode import DecodeModel
from dsv3_jax.serving.model_view import ModelView
from sharding.layout import Layout
from sharding.mesh import MeshSpec, make_mesh

BATCH, LENGTH = 2, 7
ATTENTION = AttentionConfig(
    n_heads=3, q_rank=12, kv_rank=10, nope_dim=8, rope_dim=6, value_dim=5, rope_base=100.0
)
MOE = MoEConfig(n_experts=15, n_shared=2, hidden=9, top_k=4, n_groups=5, topk_groups=2)
CONFIG = ModelConfig(
    vocab_size=22,
    width=20,
    n_layers=3,
    n_dense=1,
    dense_hidden=11,
    attention=ATTENTION,
    moe=MOE,
    mtp_depth=2,
    norm_eps=1e-3,  # large enough to show where it is left out
)
YARN = YarnConfig(factor=4.0, original_length=40, beta_fast=3.0, beta_slow=0.5)
BF16 = Policy(compute=jnp.dtype("bfloat16"))


def with_attention(**changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, attention=dataclasses.replace(ATTENTION, **changes))


def build(make, seed: int = 0):
    """A module with random weights of a size that keeps activations near 1, and those by path."""
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(nnx.eval_shape(make))

    def fill(path, variable):
        value = rng.normal(size=variable.shape)
        if path[-1] == "scale":
            value = 1.0 + 0.3 * value
        elif path[-1] == "bias":
            value = 0.2 * value
        elif path[-1] not in ("embedding", "head"):
            value = value / np.sqrt(variable.shape[-2])
        return variable.replace(jnp.asarray(value, jnp.float32))

    module = nnx.merge(graphdef, nnx.map_state(fill, state))
    values = {
        path: np.asarray(x, np.float64) for path, x in named_arrays(nnx.state(module)).items()
    }
    return module, values


def inputs(seed: int = 1, batch: int = BATCH, width: int = CONFIG.width) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, LENGTH, width)).astype(np.float32)


def positions(batch: int = BATCH, first: int = 0) -> np.ndarray:
    return np.tile(np.arange(first, first + LENGTH, dtype=np.int32), (batch, 1))


def assert_close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def decode_model(model) -> DecodeModel:
    """The model as decoding uses it; `model` loses its arrays."""
    return ModelView.take(model, make_mesh(MeshSpec(), jax.devices()[:1])).model


def attend(module, h, positions):
    """Attention of an MLA module to the whole sequence, as blocks run it."""
    (y,) = module(h, positions, module.compress_kv(h, positions))
    return y


def attention_weights(values: dict, prefix: str = "") -> dict:
    names = ("q_up", "kv_down", "kv_up", "out", "q_down")
    w = {name: values.get(f"{prefix}{name}.kernel") for name in names}
    norms = {name: values.get(f"{prefix}{name}.scale") for name in ("q_norm", "kv_norm")}
    return w | norms


def moe_weights(values: dict, prefix: str = "") -> dict:
    gate, up = np.split(values[f"{prefix}gate_up"], 2, axis=-1)
    shared_gate, shared_up = np.split(values[f"{prefix}shared.gate_up.kernel"], 2, axis=-1)
    return {
        "router": values[f"{prefix}router"],
        "bias": values[f"{prefix}bias"],
        "gate": gate,
        "up": up,
        "down": values[f"{prefix}down"],
        "shared_gate": shared_gate,
        "shared_up": shared_up,
        "shared_down": values[f"{prefix}shared.down.kernel"],
    }


def mtp_weights(values: dict, depth: int) -> dict:
    """Of module `depth` of the stack; the rows of the join that meet the embedding come first."""
    one = {path[4:]: value[depth] for path, value in values.items() if path.startswith("mtp.")}
    join_embedding, join_hidden = np.split(one["join.kernel"], 2)
    return {
        "join_embedding": join_embedding,
        "join_hidden": join_hidden,
        "embedding_norm": one["embedding_norm.scale"],
        "hidden_norm": one["hidden_norm.scale"],
        "attention_norm": one["block.attention_norm.scale"],
        "ffn_norm": one["block.ffn_norm.scale"],
        "norm": one["norm.scale"],
        **attention_weights(one, "block.attention."),
        **moe_weights(one, "block.ffn."),
    }


def in_bfloat16(module):
    """The module with its weights as the bfloat16 policy hands them to it."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, all_gather_params(state, Layout(), BF16.compute))
