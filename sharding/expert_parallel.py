"""Expert parallelism: tokens travel to the ranks of their experts, and the results come back.

Every device holds t rows (tokens) and n_experts / ep experts; the router has chosen K experts for
each row. Within one node (`ep8`) each of the t * K token copies travels to its expert's rank. Over
several nodes (`ep2x4`) a row first travels ONCE to every node that has some of its experts, to the
rank with the same index; there it is dispatched to the node's ranks, its results are summed, and
one sum comes back (report sec. 3.2.2). If the groups of experts divide evenly over the nodes,
node-limited routing bounds the number of nodes per row.

Both hops move in rounds of bounded size until nothing is left (`sharding/dispatch.py`): no token
copy is dropped, whatever the routing. Near balance one round suffices. It is differentiated as
ordinary code; extra rounds run in a loop that saves nothing and runs again in backward.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from sharding.dispatch import (
    IDENTITY,
    DispatchPlan,
    Hop,
    WireFormat,
    combine,
    dispatch,
    plan_rounds,
    round_capacity,
    round_indices,
)
from sharding.layout import Layout
from sharding.mesh import MeshSpec

EXTRA_ROUNDS = "extra_rounds"  # the scope of the loops over all rounds but the first


class DispatchConfig(NamedTuple):
    """The static sizes of an expert all-to-all, and its transport."""

    mesh: MeshSpec
    n_experts: int
    copies_per_round: int  # token copies from one rank to another
    rows_per_round: int = 0  # rows from one node to another
    max_nodes: int = 1  # that the experts of a row may be on
    ragged: bool = False
    wire_format: WireFormat = IDENTITY

    def node_hop(self) -> Hop:
        """Return the hop between the ranks of the same index in all nodes."""
        return Hop(
            axes=("node",),
            size=self.mesh.nodes,
            n_groups=1,
            capacity=self.rows_per_round,
            ragged=self.ragged,
            wire_format=self.wire_format,
            keep_source_order=True,
        )

    def rank_hop(self) -> Hop:
        """Return the hop between the ranks of a node."""
        return Hop(
            axes=("rank",),
            size=self.mesh.ranks,
            n_groups=self.n_experts // self.mesh.ranks,
            capacity=self.copies_per_round,
            ragged=self.ragged,
            wire_format=self.wire_format,
        )

    def within_node(self) -> "DispatchConfig":
        """Return the config of the all-to-all within a node, over its own experts."""
        mesh = dataclasses.replace(self.mesh, nodes=1)
        return self._replace(mesh=mesh, n_experts=self.n_experts // self.mesh.nodes)


class DispatchStats(NamedTuple):
    """The counts of an expert all-to-all on a device."""

    n_rounds: Int[Array, ""]  # times that the experts ran
    n_copies: Int[Array, ""]  # token copies that they received


def make_dispatch_config(
    layout: Layout, n_experts: int, n_rows: int, top_k: int, n_groups: int, topk_groups: int
) -> DispatchConfig:
    """Return the config for `n_rows` rows with `top_k` experts each.

    Args:
        n_groups: groups of experts that the router knows.
        topk_groups: groups that the experts of a row may be in.
    """
    mesh, factor = layout.mesh, layout.capacity_factor
    # A group lies on one node if groups divide evenly over nodes; else any node may have experts.
    nodes = mesh.nodes if n_groups % mesh.nodes else min(topk_groups, mesh.nodes)
    return DispatchConfig(
        mesh=mesh,
        n_experts=n_experts,
        copies_per_round=round_capacity(n_rows * top_k, mesh.ranks, factor),
        rows_per_round=min(n_rows, round_capacity(n_rows * nodes, mesh.nodes, factor)),
        max_nodes=nodes,
        ragged=layout.ragged,
        wire_format=layout.wire_format,
    )


class RoundParams(NamedTuple):
    """The experts' parameters, for the first round and for all extra rounds."""

    first: PyTree
    extra: PyTree


def expert_all_to_all(
    expert_fn: Callable,
    params: PyTree,
    rows: Float[Array, "t D"],
    gates: Float[Array, "t K"],
    ids: Int[Array, "t K"],
    config: DispatchConfig,
    extra_params: PyTree = None,
) -> tuple[Float[Array, "t O"], DispatchStats]:
    """Return for each row the sum over its experts of gate * expert(row), for any routing.

    Args:
        expert_fn: (params, rows [r D], gates [r], group_sizes [e]) -> [r O] for rows sorted by
            local expert. Rows after the last group are unspecified, and so may be their results.
        params: this rank's shard of the experts' parameters.
        ids: global expert ids, distinct within a row; n_experts or more for no expert.
        extra_params: the same parameters for the extra rounds, if their gradients are to be kept
            apart; None if not.
    """
    round_params = RoundParams(params, params if extra_params is None else extra_params)
    exchange = _over_ranks if config.mesh.nodes == 1 else _over_nodes
    return exchange(expert_fn, round_params, rows, gates, ids, config)


def _over_ranks(expert_fn, params: RoundParams, rows, gates, ids, config: DispatchConfig):
    """Send a copy of a row to each of its experts, all on this node."""
    hop = config.rank_hop()

    def run_round(index, params: RoundParams, rows, gates, plan: DispatchPlan):
        indices = round_indices(plan, hop, index)
        received = dispatch(rows, indices, hop)
        gates = rearrange(gates, "t k -> (t k) 1")
        gates = dispatch(gates, indices.per_copy(), hop._replace(wire_format=IDENTITY))
        out = expert_fn(params.first, received, gates[:, 0], indices.group_sizes)
        out = combine(out, indices, hop)
        return out, DispatchStats(n_rounds=jnp.int32(1), n_copies=indices.group_sizes.sum())

    plan = plan_rounds(ids, hop)
    # A row's experts are distinct, so a rank gets at most n_groups copies of it.
    most_copies = ids.shape[0] * min(ids.shape[1], hop.n_groups)
    max_rounds = -(-most_copies // hop.capacity)
    return _sum_rounds(run_round, params, rows, gates, plan, plan.n_rounds, max_rounds)


def _over_nodes(expert_fn, params: RoundParams, rows, gates, ids, config: DispatchConfig):
    """Send a row once to each node with some of its experts, and there on to their ranks."""
    hop, within_node = config.node_hop(), config.within_node()
    n_local = none = within_node.n_experts
    plain_hop = hop._replace(wire_format=IDENTITY)

    def run_round(index, params: RoundParams, rows, gates, plan_and_ids):
        plan, ids = plan_and_ids
        indices = round_indices(plan, hop, index)
        received = dispatch(rows, indices, hop)
        gates = dispatch(gates, indices, plain_hop)
        local_ids = dispatch(ids, indices, plain_hop) - lax.axis_index("node") * n_local
        is_local = indices.received_mask(hop)[:, None] & (local_ids >= 0) & (local_ids < n_local)
        local_ids = jnp.where(is_local, local_ids, none)
        out, stats = _over_ranks(expert_fn, params, received, gates, local_ids, within_node)
        return combine(out, indices, hop), stats

    nodes = jnp.arange(hop.size)[None, None, :]
    needed = (ids[:, :, None] // n_local == nodes).any(1)  # [t nodes]
    keys = jnp.sort(jnp.where(needed, nodes[0], hop.size), axis=1)[:, : config.max_nodes]
    plan = plan_rounds(keys, hop)
    n_rounds = lax.pmax(plan.n_rounds, "rank")  # the ranks of a node work together in each round
    max_rounds = -(-rows.shape[0] // hop.capacity)
    return _sum_rounds(run_round, params, rows, gates, (plan, ids), n_rounds, max_rounds)


def _sum_rounds(
    run_round: Callable, params: RoundParams, rows, gates, plan, n_rounds, max_rounds: int
):
    """Return the sum of `run_round(i, params, rows, gates, plan)` over all rounds.

    Args:
        n_rounds: rounds that this routing needs.
        max_rounds: rounds that some routing may need.
    """
    first = run_round(0, params, rows, gates, plan)
    if max_rounds <= 1:
        return first
    extra = _extra_rounds(run_round, params.extra, rows, gates, (plan, n_rounds))
    return jax.tree.map(jnp.add, first, extra)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _extra_rounds(run_round, params, rows, gates, plan_and_n_rounds):
    """Return the sum over the rounds 1 <= i < n_rounds; backward runs each of them again."""
    plan, n_rounds = plan_and_n_rounds

    def one(i):
        return run_round(i, RoundParams(params, params), rows, gates, plan)

    def body(i, total):
        return jax.tree.map(jnp.add, total, one(i))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 1))
    with jax.named_scope(EXTRA_ROUNDS):
        return lax.fori_loop(1, n_rounds, body, zeros)


def _extra_rounds_forward(run_round, *saved):
    return _extra_rounds(run_round, *saved), saved


def _extra_rounds_backward(run_round, saved, grads):
    *inputs, (plan, n_rounds) = saved

    def body(i, totals):
        def one(params, rows, gates):
            return run_round(i, RoundParams(params, params), rows, gates, plan)[0]

        _, pull = jax.vjp(one, *inputs)
        d_inputs = pull(grads[0])
        return jax.tree.map(lambda total, d: total + d.astype(total.dtype), totals, d_inputs)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tuple(inputs))
    with jax.named_scope(EXTRA_ROUNDS):
        totals = lax.fori_loop(1, n_rounds, body, zeros)
    return *jax.tree.map(lambda total, x: total.astype(x.dtype), totals, tuple(inputs)), None


_extra_rounds.defvjp(_extra_rounds_forward, _extra_rounds_backward)
