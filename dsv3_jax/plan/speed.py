"""The predicted seconds of a step without pipeline stages, from the model's sizes and the links.

A step is compute, the expert all-to-all, gathering of weights, the head and the update. FLOPs come
from `flops.py`, buffers from the exchange itself, the bytes of weights from the layout. How often
something is sent again and how much of the communication is hidden are a model: ranking all meshes
takes seconds with it, compiling each of them minutes.
"""

import collections
import functools
from typing import NamedTuple

import jax
from flax import nnx

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.flops import forward_flops, training_flops_per_token
from dsv3_jax.hardware import Chip
from dsv3_jax.interconnect import HostMesh, TorusMesh, lay_out
from dsv3_jax.model.deepseek import STACKS, abstract_model
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.plan.memory import expert_rows, param_shards, tokens_per_device, weights
from dsv3_jax.training.state import make_layout
from sharding.mesh import MeshSpec

# A layer's FLOPs over its time without communication, as a share of the bf16 peak. An estimate: the
# simulated 671B step comes to 0.76 with matmuls at their full peak, of which large ones reach 0.8
# to 0.9.
EFFICIENCY = 0.65
# The share of the communication that no compute hides: in the same simulation, for v5p:8x8x16 with
# dp16,ep64 and a sequence per device. It is larger where the all-to-alls outweigh compute: 0.77 on
# tpu7x.
EXPOSED_SHARE = 0.30


@functools.cache
def flops_per_token(model: ModelConfig, length: int, remat: str) -> tuple[float, float]:
    """Return the FLOPs of the model, and those that a device computes, per token of training.

    The latter include the MTP modules and their scan of the head, the head's logits a second time,
    and what remat repeats: whole layers, or MLA's up-projections and attention scores.
    """
    a, flops = model.attention, forward_flops(model, length)
    depth, n_layers = model.mtp_depth, model.n_layers + model.mtp_depth
    layers = model.n_dense * flops["dense"] + depth * flops["mtp"] + flops["norm"]
    layers += (model.n_layers - model.n_dense) * flops["moe"]
    scores = length * a.n_heads * (a.nope_dim + a.rope_dim)
    again = {"none": 0.0, "full": layers}
    again["report"] = n_layers * (2.0 * up_projections(model) + scores)
    head = (1 + depth) * flops["head"]
    computed = 3 * layers + again[remat] + 4 * head
    return training_flops_per_token(model, length), computed


def up_projections(config: ModelConfig) -> int:
    """Return the parameters of MLA's up-projections of queries, keys and values in one layer."""
    model = abstract_model(config, Policy())
    blocks = model.moe if model.moe is not None else model.dense
    attention = nnx.state(blocks, nnx.Param)["attention"]
    leaves = jax.tree.leaves((attention["q_up"], attention["kv_up"]))
    return sum(leaf.size // leaf.shape[0] for leaf in leaves)


def dispatch_bytes(config: Config) -> float:
    """Return the bytes per number of a row on its way to its experts, scales included."""
    policy = Policy.of(config.precision)
    row = jax.ShapeDtypeStruct((1, config.model.width), policy.compute)
    encoded = jax.eval_shape(policy.wire_format.encode, row)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(encoded)) / config.model.width


def exchange_bytes(config: Config, mesh: MeshSpec) -> float:
    """Return the bytes that a device sends in all expert all-to-alls of a step, padding included.

    A layer has one dispatch and one combine forward and backward; "full" remat dispatches again.
    Counted are one round each, and one level of dispatch.
    """
    item = Policy.of(config.precision).compute.itemsize
    n_dispatches = 3 if config.parallel.remat == "full" else 2
    rows = config.model.n_moe_layers * expert_rows(config, mesh)
    return rows * config.model.width * (n_dispatches * dispatch_bytes(config) + 2 * item)


def context_bytes(config: Config, mesh: MeshSpec) -> float:
    """Return the bytes that a device sends to change sequence slices into heads and back.

    Queries, keys without the rotary part, values and outputs of every head move; forward, backward,
    and in the repeated forward of remat (sharding/context_parallel.py).
    """
    if config.parallel.context == 1:
        return 0.0
    a, n_layers = config.model.attention, config.model.n_layers + config.model.mtp_depth
    numbers = a.n_heads * (2 * a.nope_dim + a.rope_dim + 2 * a.value_dim)
    times = 2 if config.parallel.remat == "none" else 3
    item = Policy.of(config.precision).compute.itemsize
    return times * n_layers * tokens_per_device(config, mesh) * numbers * item


def zero_seconds(config: Config, mesh: MeshSpec, links: TorusMesh | HostMesh) -> float:
    """Return the seconds of gathering weights and of reduce-scattering their gradients.

    ZeRO-1 gathers once; ZeRO-3 every layer, and again when remat repeats it. Gradients of arrays
    that some axes replicate are also summed over those.
    """
    layout, policy = make_layout(config, mesh), Policy.of(config.precision)
    repeats = 2 if layout.zero == 3 and config.parallel.remat != "none" else 1
    moved, master = collections.Counter(), policy.master.itemsize
    for name, part in param_shards(config.model, policy, layout).items():
        times = repeats if name in STACKS else 1
        for shard in part:
            n_bytes = times * shard.used_bytes + shard.used * master
            moved[shard.zero_axes] += (1 - shard.stored / shard.used) * n_bytes
            others = 1 - 1 / mesh.size(*shard.replicated_axes)
            moved[shard.replicated_axes] += 2 * others * shard.stored * master
    return sum(
        links.group(axes).all_gather_seconds(n_bytes) for axes, n_bytes in moved.items() if n_bytes
    )


def head_seconds(config: Config, mesh: MeshSpec, links: TorusMesh | HostMesh) -> float:
    """Return the seconds of moving the head: two gathers and a reduce-scatter per loss."""
    model, policy = config.model, Policy.of(config.precision)
    n_bytes = (2 * policy.compute.itemsize + 4) * model.vocab_size * model.width
    moved = (1 + model.mtp_depth) * n_bytes * (1 - 1 / mesh.ep)
    return links.group(("node", "rank")).all_gather_seconds(moved)


def update_seconds(config: Config, mesh: MeshSpec, chip: Chip) -> float:
    """Return the seconds of AdamW, which reads and writes weights and moments in HBM."""
    parts = weights(config, make_layout(config, mesh))
    return (3 * parts["master"] + 2 * parts["moments"]) / chip.hbm_bandwidth


class Speed(NamedTuple):
    """The seconds of one step by kind, and the rates that follow."""

    compute: float
    exchange: float  # of expert rows, and of heads where sequences lie over several ranks
    weights: float  # gathered, and their gradients scattered
    head: float
    update: float
    step: float
    tokens_per_second: float  # of the whole mesh
    mfu: float  # the model's FLOPs, without MTP and recomputation, over the bf16 peak


def speed(config: Config, mesh: MeshSpec, chip: Chip, shape: tuple[int, ...]) -> Speed:
    """Return the sum of compute, update and exposed communication, under balanced routing."""
    links, train = lay_out(chip, shape, mesh), config.train
    useful, computed = flops_per_token(config.model, train.seq_len, config.parallel.remat)
    compute = computed * tokens_per_device(config, mesh) / (EFFICIENCY * chip.bf16_flops)
    exchange = links.group(("node", "rank")).all_to_all_seconds(exchange_bytes(config, mesh))
    exchange += links.group(("rank",)).all_to_all_seconds(context_bytes(config, mesh))
    zero = zero_seconds(config, mesh, links)
    head, update = head_seconds(config, mesh, links), update_seconds(config, mesh, chip)
    moved = exchange + zero + head
    step = max(compute + update + EXPOSED_SHARE * moved, moved)
    rate = train.batch * train.seq_len / step
    mfu = useful * rate / (mesh.n_devices * chip.bf16_flops)
    return Speed(compute, exchange, zero, head, update, step, rate, mfu)
