"""How long a step takes on paper: compute, expert exchange, gathering of weights, head, update."""

import collections
import functools
from typing import NamedTuple

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.flops import activated_parameters, training_flops_per_token
from dsv3_jax.hardware import Chip
from dsv3_jax.interconnect import HostMesh, TorusMesh, lay_out
from dsv3_jax.model.deepseek import count_parameters
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.quantize import TILE
from dsv3_jax.plan.memory import (
    STACKS,
    expert_rows,
    shares,
    tokens_a_device,
    weights,
)
from dsv3_jax.training.state import layout_of
from sharding.mesh import MeshSpec

# A layer's FLOPs over its time, communication apart, as a share of the bf16 peak. A guess: the
# tunnel's walk through the 671B step comes to 0.76 with products at their full peak, of which large
# ones reach 0.8 to 0.9.
EFFICIENCY = 0.65
# Share of the communication that no compute hides: the same walk, on v5p:8x8x16 with dp16,ep64 and
# a sequence a device. Where exchange outweighs compute, as on tpu7x, it is more: 0.77 there.
EXPOSED = 0.30


@functools.cache
def flops_per_token(model: ModelConfig, length: int, remat: str) -> tuple[float, float]:
    """FLOPs of the model itself, and those that a device makes, both for a token of training.

    The latter also has the MTP modules and their walk along the head, the head's logits a second
    time, and what remat repeats: whole layers, or MLA's up-projections and scores.
    """
    a = model.attention
    table, depth = model.vocab_size * model.width, model.mtp_depth
    layers = activated_parameters(model) - 2 * table
    if model.moe:
        idle = (model.moe.n_experts - model.moe.top_k) * 3 * model.width * model.moe.hidden
        layers += count_parameters(model)["mtp"] - depth * idle
    n_layers, key_dim = model.n_layers + depth, a.nope_dim + a.rope_dim
    up = a.n_heads * ((a.q_rank or model.width) * key_dim + a.kv_rank * (a.nope_dim + a.value_dim))
    pairs = length * a.n_heads  # half of the length, 2 FLOPs a product
    forward = 2 * layers + n_layers * pairs * (key_dim + a.value_dim)
    again = {"none": 0, "report": n_layers * (2 * up + pairs * key_dim), "full": forward}
    made = 3 * forward + again[remat] + 8 * (1 + depth) * table
    return training_flops_per_token(model, length), made


def exchange_bytes(config: Config, mesh: MeshSpec) -> float:
    """Bytes that a device sends in all all-to-alls of a step, one round each, padding included.

    A layer has dispatch and combine, forward and backward; "full" remat dispatches again. What
    goes out may be FP8, with an exponent a tile; what comes back is wide. Taken as one hop.
    """
    item = Policy.of(config.precision).compute.itemsize
    out = 1 + 1 / TILE[1] if config.precision.dispatch == "fp8" else item
    n_out = 3 if config.parallel.remat == "full" else 2
    rows = config.model.n_moe_layers * expert_rows(config, mesh)
    return rows * config.model.width * (n_out * out + 2 * item)


def context_bytes(config: Config, mesh: MeshSpec) -> float:
    """Bytes that a device sends where slices become heads and heads slices (`context_parallel.py`).

    Queries, keys without the rotary part, values and outputs of every head; forward, backward, and
    the forward again where remat repeats it.
    """
    if config.parallel.context == 1:
        return 0.0
    a, n_layers = config.model.attention, config.model.n_layers + config.model.mtp_depth
    numbers = a.n_heads * (2 * a.nope_dim + a.rope_dim + 2 * a.value_dim)
    times = 2 if config.parallel.remat == "none" else 3
    item = Policy.of(config.precision).compute.itemsize
    return times * n_layers * tokens_a_device(config, mesh) * numbers * item


def zero_seconds(config: Config, mesh: MeshSpec, links: TorusMesh | HostMesh) -> float:
    """All-gathers of weights in the format of use, reduce-scatters of gradients in the stored one.

    ZeRO-1 gathers once; ZeRO-3 every layer, and again when remat repeats it. What is not divided
    over all devices is also summed over the others.
    """
    layout, policy = layout_of(config, mesh), Policy.of(config.precision)
    repeats = 2 if layout.zero == 3 and config.parallel.remat != "none" else 1
    moved, master = collections.Counter(), policy.master.itemsize
    for name, part in shares(config.model, policy, layout).items():
        times = repeats if name in STACKS else 1
        for share in part:
            n_bytes = times * share.used_bytes + share.used * master
            moved[share.axes] += (1 - share.stored / share.used) * n_bytes
            away = 1 - 1 / mesh.size(*share.missing)
            moved[share.missing] += 2 * away * share.stored * master
    return sum(
        links.group(axes).all_gather_seconds(n_bytes) for axes, n_bytes in moved.items() if n_bytes
    )


def head_seconds(config: Config, mesh: MeshSpec, links: TorusMesh | HostMesh) -> float:
    """Two walks a loss (main and MTP): the head comes past twice, its gradient goes back once."""
    model, policy = config.model, Policy.of(config.precision)
    n_bytes = (2 * policy.compute.itemsize + 4) * model.vocab_size * model.width
    moved = (1 + model.mtp_depth) * n_bytes * (1 - 1 / mesh.ep)
    return links.group(("node", "rank")).all_gather_seconds(moved)


def update_seconds(config: Config, mesh: MeshSpec, chip: Chip) -> float:
    """AdamW: master weights and moments read and written, gradients read, at the HBM's rate."""
    parts = weights(config, layout_of(config, mesh))
    return (3 * parts["master"] + 2 * parts["moments"]) / chip.hbm_bandwidth


class Speed(NamedTuple):
    """Seconds of one step by kind, and what comes of them."""

    compute: float
    exchange: float  # of expert rows, and of heads where sequences lie over several ranks
    weights: float  # gathered, and their gradients scattered
    head: float
    update: float
    step: float
    tokens_per_second: float  # of the whole mesh
    mfu: float  # the model's FLOPs, without MTP and recomputation, over the bf16 peak


def speed(config: Config, mesh: MeshSpec, chip: Chip, shape: tuple[int, ...]) -> Speed:
    """Compute, update and the exposed communication one after the other, with balanced routing."""
    links, train = lay_out(chip, shape, mesh), config.train
    useful, made = flops_per_token(config.model, train.seq_len, config.parallel.remat)
    compute = made * tokens_a_device(config, mesh) / (EFFICIENCY * chip.bf16_flops)
    exchange = links.group(("node", "rank")).all_to_all_seconds(exchange_bytes(config, mesh))
    exchange += links.group(("rank",)).all_to_all_seconds(context_bytes(config, mesh))
    zero = zero_seconds(config, mesh, links)
    head, update = head_seconds(config, mesh, links), update_seconds(config, mesh, chip)
    moved = exchange + zero + head
    step = max(compute + update + EXPOSED * moved, moved)
    rate = train.batch * train.seq_len / step
    mfu = useful * rate / (mesh.n_devices * chip.bf16_flops)
    return Speed(compute, exchange, zero, head, update, step, rate, mfu)
