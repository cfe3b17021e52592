"""What the tests against the goldens share: their arrays and models, read once."""

import functools
from pathlib import Path

import jax
import numpy as np
from reference.cases import attend

from dsv3_jax import load_pretrained
from dsv3_jax.model.deepseek import DeepSeekV3, token_positions
from dsv3_jax.model.router import route_tokens
from sharding.layout import Layout

GOLDENS = Path(__file__).parent.parent / "goldens"
CASES = sorted(path.name for path in GOLDENS.glob("A*"))


@functools.cache
def golden(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / case / "golden.npz"))


@functools.cache
def model_of(case: str, dtype: str = "float32") -> DeepSeekV3:
    return load_pretrained(GOLDENS / case, dtype)


def layer_by_layer(model: DeepSeekV3, tokens) -> dict:
    """Everything that happens inside, without the scan over layers."""
    x = model.embed(tokens, Layout())
    out = {"hidden.embed": x}
    for i in range(model.config.n_layers):
        dense = i < model.config.n_dense
        stacked, index = (model.dense, i) if dense else (model.moe, i - model.config.n_dense)
        block = jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
        residual = x + attend(block.attention, block.attention_norm(x), token_positions(tokens))
        if not dense:
            scores = jax.nn.sigmoid(block.ffn.router_logits(block.ffn_norm(residual)))
            flat = scores.reshape(-1, scores.shape[-1])
            out[f"router.{i}"] = route_tokens(flat, block.ffn.bias[...], block.ffn.config)
        new, _ = block(x, token_positions(tokens), Layout())
        out |= {f"attn_out.layer{i}": residual - x, f"mlp_out.layer{i}": new - residual}
        out[f"hidden.layer{i}"] = x = new
    return out | {"hidden.final_norm": model.norm(x)}


def assert_close(got, want, atol=2e-4, rtol=1e-4):
    np.testing.assert_allclose(np.asarray(got), want, atol=atol, rtol=rtol)


def check_choice(got, want, case, ids_name, atol):
    """Ids, which the goldens keep in order of expert, are exact, and the weights go with them."""
    weights, ids = map(np.asarray, got)
    order = np.argsort(ids, axis=-1)
    np.testing.assert_array_equal(np.take_along_axis(ids, order, -1), want[f"{case}.{ids_name}"])
    got_weights = np.take_along_axis(weights, order, -1)
    assert_close(got_weights, want[f"{case}.weights"], atol=atol, rtol=0)
