"""What one device holds during a step, in bytes, part by part.

Weights, moments and stored gradients are exact: the model's shapes, divided as `Layout` says. What
a step makes besides is counted from the code that makes it and is an estimate: the compiler
decides what lives at the same time.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from flax import nnx

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.losses import PIECE
from dsv3_jax.model.deepseek import abstract_model
from dsv3_jax.numerics.kernels.attention_ref import QUERY_CHUNK, SPANS
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.quantize import E4M3, TILE
from dsv3_jax.training.state import layout_of, parts_of
from sharding.dispatch import round_capacity
from sharding.layout import Layout
from sharding.mesh import AXES, MeshSpec
from sharding.vocab_parallel import n_vocab_chunks

STACKS = ("dense", "moe", "mtp")  # parts that hold layers; the others are used all through a step


class Share(NamedTuple):
    """What one device has of a parameter: numbers over all layers."""

    stored: int  # between steps
    used: int  # gathered for use: what ZeRO level 0 would store
    used_bytes: int  # in the format that layers use
    layers: int  # in its stack; 1 outside of the stacks
    axes: tuple[str, ...]  # mesh axes over which ZeRO gathers it
    missing: tuple[str, ...]  # mesh axes over which it is stored whole


@functools.cache
def parameters(model: ModelConfig) -> dict[str, list[nnx.Variable]]:
    """Shapes of the parameters, by part of the model."""
    _, params, *_ = parts_of(abstract_model(model, Policy()))
    leaves = functools.partial(jax.tree.leaves, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {name: leaves(part) for name, part in params.items()}


@functools.cache
def shares(model: ModelConfig, policy: Policy, layout: Layout) -> dict[str, list[Share]]:
    """Shares of all parameters, by part of the model."""
    return {
        name: [share_of(param, policy, layout, name in STACKS) for param in part]
        for name, part in parameters(model).items()
    }


def share_of(param: nnx.Variable, policy: Policy, layout: Layout, stacked: bool) -> Share:
    """A parameter's share, from its shape and where `layout` puts it."""
    n, mesh = math.prod(param.shape), layout.mesh
    split = split_axes(param, layout)
    kept = split_axes(param, dataclasses.replace(layout, zero=0))
    used = n // mesh.size(*kept)
    dtype = E4M3 if param.fp8 and policy.fp8 else policy.compute
    dtype = policy.master if param.keep_fp32 else dtype
    return Share(
        stored=n // mesh.size(*split),
        used=used,
        used_bytes=used * dtype.itemsize,
        layers=param.shape[0] if stacked else 1,
        axes=tuple(axis for axis in split if axis not in kept),
        missing=layout.replicated_axes(param.axes, param.global_shape),
    )


def split_axes(param: nnx.Variable, layout: Layout) -> list[str]:
    """Mesh axes over which a parameter is divided between steps."""
    entries = layout.param_spec(param.axes, param.global_shape)
    return [axis for entry in entries for axis in ([entry] if entry in AXES else entry or ())]


def weights(config: Config, layout: Layout) -> dict[str, float]:
    """Master weights, both Adam moments, gradients, and the weights gathered for use.

    Gradients are stored as the master weights are; the layer at work has them whole, in float32.
    ZeRO-1 gathers all weights at once, and their gradients are whole until they are summed; ZeRO-3
    the embedding, the head and two layers, one in use and one on its way. Without remat the
    backward finds the weights that the forward has gathered.
    """
    policy = Policy.of(config.precision)
    parts = shares(config.model, policy, layout)
    stacks = [part for name, part in parts.items() if name in STACKS and part]
    outside = [share for name, part in parts.items() if name not in STACKS for share in part]
    n_stored = sum(share.stored for part in parts.values() for share in part)
    whole = sum(share.used_bytes for part in parts.values() for share in part)
    layer = max(sum(share.used_bytes / share.layers for share in part) for part in stacks)
    gradients = max(sum(4 * share.used / share.layers for share in part) for part in stacks)
    gradients += n_stored * policy.master.itemsize
    gathered = whole
    if layout.zero == 1:
        gradients += whole
    elif config.parallel.remat != "none":
        gathered = sum(share.used_bytes for share in outside) + 2 * layer
    return {
        "master": n_stored * policy.master.itemsize,
        "moments": 2 * n_stored * policy.moments.itemsize,
        "gradients": gradients,
        "gathered": gathered,
    }


def tokens_a_device(config: Config, mesh: MeshSpec) -> int:
    """Tokens that a device runs at once: there is no gradient accumulation yet."""
    return config.train.batch * config.train.seq_len // mesh.n_data_shards


def expert_rows(config: Config, mesh: MeshSpec) -> int:
    """Rows of the receive buffer of one round of the expert exchange."""
    if config.model.moe is None:
        return 0
    n_pairs = tokens_a_device(config, mesh) * config.model.moe.top_k
    return mesh.ep * round_capacity(n_pairs, mesh.ep, config.parallel.capacity_factor)


def layer_bytes(config: Config, mesh: MeshSpec, remat: str, experts: bool) -> float:
    """What the backward of one layer finds in memory.

    With "full" its input; with "report" also what `KEPT_BY_REPORT` in layers/stack.py lists: the
    residual, latents, attention's output, the inputs and hidden layers of experts (report sec.
    3.2.3); with "none" also norms, queries, keys, values, the scores that the causal mask leaves
    (float32) and SwiGLU products. In FP8 the inputs and hidden layers are codes with their scales.
    """
    policy = Policy.of(config.precision)
    model, a, m = config.model, config.model.attention, config.model.moe
    n_tokens, rows = tokens_a_device(config, mesh), expert_rows(config, mesh) if experts else 0
    hidden, expert_hidden = model.dense_hidden, 0
    if experts:
        hidden, expert_hidden = m.n_shared * m.hidden, m.hidden
    latents = (a.q_rank or 0) + a.kv_rank + a.rope_dim
    expanded = a.n_heads * (2 * (a.nope_dim + a.rope_dim) + a.value_dim)
    numbers = n_tokens * model.width
    scores, codes = 0.0, 0
    if remat != "full":
        numbers += n_tokens * (model.width + latents + a.n_heads * a.value_dim)
        codes = n_tokens * 2 * hidden + rows * (model.width + 2 * expert_hidden)
    if remat == "none":
        numbers += n_tokens * (2 * model.width + latents + expanded + hidden) + rows * expert_hidden
        length = config.train.seq_len
        long = length >= 2 * SPANS * QUERY_CHUNK  # then a chunk of them at a time
        seen = QUERY_CHUNK if long else (length + min(QUERY_CHUNK, length)) / 2
        scores = n_tokens * a.n_heads * seen * 4
    item = policy.compute.itemsize
    code = E4M3.itemsize + 4 / TILE[1] if policy.fp8 else item
    return numbers * item + codes * code + scores


def activations(config: Config, mesh: MeshSpec) -> dict[str, float]:
    """What all layers save for the backward, and all that the layer at work has besides."""
    kinds = {False: config.model.n_dense, True: config.model.n_moe_layers}
    kinds = {experts: n for experts, n in kinds.items() if n}
    remat = config.parallel.remat
    return {
        "saved": sum(n * layer_bytes(config, mesh, remat, kind) for kind, n in kinds.items()),
        "layer": max(layer_bytes(config, mesh, "none", kind) for kind in kinds),
    }


def exchange(config: Config, mesh: MeshSpec) -> dict[str, float]:
    """Buffers of the expert exchange: rows sent, received, grouped and their results.

    With more ranks than one, the loop for further rounds also has float32 sums of the gradients of
    this rank's experts and of its tokens (`_further_rounds` in sharding/expert_parallel.py).
    """
    model, m = config.model, config.model.moe
    if m is None:
        return {"rows": 0.0}
    item = Policy.of(config.precision).compute.itemsize
    total = 4 * expert_rows(config, mesh) * model.width * item
    if mesh.ep > 1:
        experts = m.n_experts // mesh.ep * 3 * model.width * m.hidden
        total += 4 * (experts + tokens_a_device(config, mesh) * model.width)
    return {"rows": total}


def head(config: Config, mesh: MeshSpec) -> dict[str, float]:
    """The loss's walk along the head (`cross_entropy` in losses.py), sums in float32.

    Logits of one piece and their gradient, the piece and its gradient; the gradients of hidden
    states and of this rank's rows of the head, and copies of these that wait for the backward, one
    a walk (main and MTP).
    """
    model, n_tokens = config.model, tokens_a_device(config, mesh)
    item = Policy.of(config.precision).compute.itemsize
    share = model.vocab_size // mesh.ep
    piece = model.vocab_size // n_vocab_chunks(share, mesh, PIECE)
    at_work = 2 * 4 * n_tokens * piece + (item + 4) * piece * model.width
    waiting = (4 + (1 + model.mtp_depth) * item) * (n_tokens + share) * model.width
    return {"head": at_work + waiting}


def memory(config: Config, mesh: MeshSpec) -> dict[str, float]:
    """Bytes that a device holds, by part, taken as all alive at once."""
    parts = weights(config, layout_of(config, mesh)) | activations(config, mesh)
    return parts | exchange(config, mesh) | head(config, mesh)
