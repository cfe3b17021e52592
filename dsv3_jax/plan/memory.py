"""The bytes that one device holds during a step, part by part.

Weights, moments and stored gradients are exact: the shapes of the abstract model, divided as the
layout's specs say. The arrays that remat saves have the names and the buffers the sizes that the
code gives them. The rest is a model, since only the compiler knows what is alive at the same time
(`dsv3_jax.aot` asks it); all parts are taken as alive at once.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from flax import nnx

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.layer_scan import SAVED_NAMES
from dsv3_jax.losses import VOCAB_CHUNK
from dsv3_jax.model.deepseek import STACKS, abstract_model
from dsv3_jax.numerics.kernels.attention_ref import query_spans
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.quantize import E4M3, TILE
from dsv3_jax.training.state import make_layout, split_model
from sharding.dispatch import round_capacity
from sharding.layout import Layout
from sharding.mesh import AXES, MeshSpec
from sharding.vocab_parallel import n_vocab_chunks


class ParamShard(NamedTuple):
    """One device's share of a parameter, in numbers over all layers."""

    stored: int  # between steps
    used: int  # gathered for use: what ZeRO level 0 would store
    used_bytes: int  # in the format that layers use
    n_layers: int  # in its stack; 1 outside of the stacks
    zero_axes: tuple[str, ...]  # mesh axes over which ZeRO gathers it
    replicated_axes: tuple[str, ...]  # mesh axes over which it is stored whole


@functools.cache
def parameters(model: ModelConfig) -> dict[str, list[nnx.Variable]]:
    """Return the shapes of the parameters, by part of the model."""
    _, params, *_ = split_model(abstract_model(model, Policy()))
    leaves = functools.partial(jax.tree.leaves, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {name: leaves(part) for name, part in params.items()}


@functools.cache
def param_shards(model: ModelConfig, policy: Policy, layout: Layout) -> dict[str, list[ParamShard]]:
    """Return one device's share of all parameters, by part of the model."""
    return {
        name: [param_shard(param, policy, layout, name in STACKS) for param in part]
        for name, part in parameters(model).items()
    }


def param_shard(param: nnx.Variable, policy: Policy, layout: Layout, stacked: bool) -> ParamShard:
    """Return one device's share of a parameter, from its shape and its spec in `layout`."""
    n, mesh = math.prod(param.shape), layout.mesh
    stored_axes = split_axes(param, layout)
    used_axes = split_axes(param, dataclasses.replace(layout, zero=0))
    used = n // mesh.size(*used_axes)
    dtype = E4M3 if param.fp8 and policy.fp8 else policy.compute
    dtype = policy.master if param.keep_fp32 else dtype
    return ParamShard(
        stored=n // mesh.size(*stored_axes),
        used=used,
        used_bytes=used * dtype.itemsize,
        n_layers=param.shape[0] if stacked else 1,
        zero_axes=tuple(axis for axis in stored_axes if axis not in used_axes),
        replicated_axes=layout.replicated_axes(param.axes, param.global_shape),
    )


def split_axes(param: nnx.Variable, layout: Layout) -> list[str]:
    """Return the mesh axes over which a parameter is divided between steps."""
    entries = layout.param_spec(param.axes, param.global_shape)
    return [axis for entry in entries for axis in ([entry] if entry in AXES else entry or ())]


def weights(config: Config, layout: Layout) -> dict[str, float]:
    """Return the bytes of master weights, both Adam moments, gradients, and gathered weights.

    Gradients are stored like the master weights; one layer's are whole, in float32, while it runs.
    ZeRO-1 gathers all weights at once, and their gradients are whole until they are summed. ZeRO-3
    gathers embedding, head and two layers, one in use and one on its way; without remat all
    gathered weights stay for the backward.
    """
    policy = Policy.of(config.precision)
    parts = param_shards(config.model, policy, layout)
    stacks = [part for name, part in parts.items() if name in STACKS and part]
    outside = [shard for name, part in parts.items() if name not in STACKS for shard in part]
    n_stored = sum(shard.stored for part in parts.values() for shard in part)
    whole = sum(shard.used_bytes for part in parts.values() for shard in part)
    layer = max(sum(shard.used_bytes / shard.n_layers for shard in part) for part in stacks)
    gradients = max(sum(4 * shard.used / shard.n_layers for shard in part) for part in stacks)
    gradients += n_stored * policy.master.itemsize
    gathered = whole
    if layout.zero == 1:
        gradients += whole
    elif config.parallel.remat != "none":
        gathered = sum(shard.used_bytes for shard in outside) + 2 * layer
    return {
        "master": n_stored * policy.master.itemsize,
        "moments": 2 * n_stored * policy.moments.itemsize,
        "gradients": gradients,
        "gathered": gathered,
    }


def tokens_per_device(config: Config, mesh: MeshSpec) -> int:
    """Return the tokens that a device runs at once; meshes without pp accumulate no gradients."""
    return config.train.batch * config.train.seq_len // mesh.n_data_shards


def expert_rows(config: Config, mesh: MeshSpec) -> int:
    """Return the rows of the receive buffer of one round of the expert all-to-all."""
    if config.model.moe is None:
        return 0
    n_copies = tokens_per_device(config, mesh) * config.model.moe.top_k
    return mesh.ep * round_capacity(n_copies, mesh.ep, config.parallel.capacity_factor)


def saved_bytes(config: Config, mesh: MeshSpec, moe: bool) -> dict[str, float]:
    """Return the bytes of each array that remat="report" saves of one layer, by its name.

    In FP8 the inputs of the feed-forward matmuls are FP8 values with a float32 scale per tile.

    Source: DeepSeek-V3 report, sec. 3.2.3.
    """
    policy, model, a, m = Policy.of(config.precision), *_sizes(config)
    n_tokens = tokens_per_device(config, mesh)
    item = policy.compute.itemsize
    ffn_item = E4M3.itemsize + 4 / TILE[1] if policy.fp8 else item
    sizes = {
        "residual": item * n_tokens * model.width,
        "q_latent": item * n_tokens * (a.q_rank or 0),
        "kv_latent": item * n_tokens * (a.kv_rank + a.rope_dim),
        "attention": item * n_tokens * a.n_heads * a.value_dim,
    }
    if moe:
        rows = expert_rows(config, mesh)
        sizes |= {
            "gates": 4 * n_tokens * m.top_k,
            "expert_ids": 4 * n_tokens * m.top_k,
            "dispatched": ffn_item * rows * model.width,
            "expert_hidden": ffn_item * rows * 2 * m.hidden,
            "ffn_hidden": ffn_item * n_tokens * 2 * m.n_shared * m.hidden,
        }
    else:
        sizes |= dict.fromkeys(("gates", "expert_ids", "dispatched", "expert_hidden"), 0)
        sizes["ffn_hidden"] = ffn_item * n_tokens * 2 * model.dense_hidden
    return {name: sizes[name] for name in SAVED_NAMES}


def unsaved_bytes(config: Config, mesh: MeshSpec, moe: bool) -> float:
    """Return the bytes that the backward of one layer needs besides those that are saved.

    They are the outputs of norms, queries, keys, values, attention weights in float32, and SwiGLU
    products. This is a model: which of them exist at once is the compiler's choice.
    """
    policy, model, a, m = Policy.of(config.precision), *_sizes(config)
    n_tokens, length = tokens_per_device(config, mesh), config.train.seq_len
    latents = (a.q_rank or 0) + a.kv_rank + a.rope_dim
    heads = a.n_heads * (2 * (a.nope_dim + a.rope_dim) + a.value_dim)
    hidden = m.n_shared * m.hidden if moe else model.dense_hidden
    numbers = n_tokens * (2 * model.width + latents + heads + hidden)
    if moe:
        numbers += expert_rows(config, mesh) * m.hidden
    chunk, ends = query_spans(length)
    looped = ends[0] > chunk  # then the attention weights of one chunk exist at a time
    spans = zip([0, *ends[:-1]], ends, strict=True)
    n_keys = chunk if looped else sum((end - begin) * end for begin, end in spans) / length
    return numbers * policy.compute.itemsize + 4 * n_tokens * a.n_heads * n_keys


def _sizes(config: Config):
    return config.model, config.model.attention, config.model.moe


def layer_bytes(config: Config, mesh: MeshSpec, remat: str, moe: bool) -> float:
    """Return the bytes that one layer keeps for its backward: its input, and what remat saves."""
    kept = tokens_per_device(config, mesh) * config.model.width
    kept *= Policy.of(config.precision).compute.itemsize
    if remat != "full":
        kept += sum(saved_bytes(config, mesh, moe).values())
    if remat == "none":
        kept += unsaved_bytes(config, mesh, moe)
    return kept


def activations(config: Config, mesh: MeshSpec) -> dict[str, float]:
    """Return the bytes that all layers keep for the backward, and those of the layer at work."""
    kinds = {False: config.model.n_dense, True: config.model.n_moe_layers}
    kinds = {moe: n for moe, n in kinds.items() if n}
    remat = config.parallel.remat
    return {
        "saved": sum(n * layer_bytes(config, mesh, remat, moe) for moe, n in kinds.items()),
        "layer": max(layer_bytes(config, mesh, "none", moe) for moe in kinds),
    }


def exchange(config: Config, mesh: MeshSpec) -> dict[str, float]:
    """Return the bytes of the expert all-to-all: rows sent, received, grouped, and their results.

    The loop over extra rounds also sums gradients of this rank's experts and tokens in float32.
    This is a model: XLA may reuse a buffer for another.
    """
    model, m = config.model, config.model.moe
    if m is None:
        return {"rows": 0.0}
    item = Policy.of(config.precision).compute.itemsize
    total = 4 * expert_rows(config, mesh) * model.width * item
    if mesh.ep > 1:
        experts = m.n_experts // mesh.ep * 3 * model.width * m.hidden
        total += 4 * (experts + tokens_per_device(config, mesh) * model.width)
    return {"rows": total}


def head(config: Config, mesh: MeshSpec) -> dict[str, float]:
    """Return the bytes of the loss's scan over the vocabulary, with sums in float32.

    They are a chunk's logits and their gradient, the chunk and its gradient, the gradients of
    hidden states and of this rank's rows of the head, and copies of these that wait for the
    backward, one per scan (main and MTP). This is a model of what is alive at once.
    """
    model, n_tokens = config.model, tokens_per_device(config, mesh)
    item = Policy.of(config.precision).compute.itemsize
    n_local = model.vocab_size // mesh.ep
    chunk = model.vocab_size // n_vocab_chunks(n_local, mesh, VOCAB_CHUNK)
    at_work = 2 * 4 * n_tokens * chunk + (item + 4) * chunk * model.width
    waiting = (4 + (1 + model.mtp_depth) * item) * (n_tokens + n_local) * model.width
    return {"head": at_work + waiting}


def memory(config: Config, mesh: MeshSpec) -> dict[str, float]:
    """Return the bytes that a device holds, by part."""
    parts = weights(config, make_layout(config, mesh)) | activations(config, mesh)
    return parts | exchange(config, mesh) | head(config, mesh)
