"""Expert parallelism: rows go to the ranks that hold their experts, and their results come back.

Every device holds t rows and n_experts / ep experts. A row is wanted by the K experts that its
router chose. On one node (`ep8`) each of these t * K pairs of row and expert is a copy of its own
that travels to the expert's rank. On several (`ep2x4`) a row first goes ONCE to every node that
has experts of it, to the rank of the same number; there it fans out to the node's ranks, its
results are summed, and one sum comes back (report sec. 3.2.2). With as many groups of experts as
nodes, or a multiple, node-limited routing bounds the nodes of a row.

Both ways rows travel in rounds of bounded size until none is left (`sharding/dispatch.py`): no pair
is dropped, whatever the routing. Near balance that is one round, which is differentiated as
ordinary code; further rounds run in a loop that stores nothing and runs again in the backward.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding.dispatch import (
    IDENTITY,
    DispatchPlan,
    Hop,
    WireFormat,
    combine,
    dispatch,
    indices_per_copy,
    plan_rounds,
    round_capacity,
    round_indices,
)
from sharding.mesh import MeshSpec

EXTRA_ROUNDS = "extra_rounds"  # the scope of the loops over all rounds but the first


class DispatchConfig(NamedTuple):
    """Static sizes of an exchange, and how it travels."""

    mesh: MeshSpec
    n_experts: int
    pairs: int  # capacity of a round from rank to rank, in pairs
    rows: int = 0  # and from node to node, in rows
    max_nodes: int = 1  # that the experts of a row may lie on
    ragged: bool = False
    wire: WireFormat = IDENTITY

    def to_nodes(self) -> Hop:
        """The hop between the ranks of one number in all nodes."""
        return Hop(("node",), self.mesh.nodes, 1, self.rows, self.ragged, self.wire, loose=True)

    def to_ranks(self) -> Hop:
        """The hop between the ranks of a node."""
        n_local = self.n_experts // self.mesh.ranks
        return Hop(("rank",), self.mesh.ranks, n_local, self.pairs, self.ragged, self.wire)

    def inside(self) -> "DispatchConfig":
        """The exchange within a node, of its own experts."""
        mesh = dataclasses.replace(self.mesh, nodes=1)
        return self._replace(mesh=mesh, n_experts=self.n_experts // self.mesh.nodes)


class DispatchStats(NamedTuple):
    """What an exchange did on a device."""

    rounds: jax.Array  # [] times that the experts ran
    pairs: jax.Array  # [] rows that they were given


def make_dispatch_config(
    mesh: MeshSpec,
    n_experts: int,
    n_rows: int,
    top_k: int,
    capacity: float,
    max_nodes: int,
    ragged: bool = False,
    wire: WireFormat = IDENTITY,
) -> DispatchConfig:
    """The route of `n_rows` rows with `top_k` experts each, on at most `max_nodes` nodes.

    Args:
        capacity: receive buffer of a round over the balanced load, at least 1.
    """
    nodes = min(max_nodes, mesh.nodes)
    pairs = round_capacity(n_rows * top_k, mesh.ranks, capacity)
    rows = min(n_rows, round_capacity(n_rows * nodes, mesh.nodes, capacity))
    return DispatchConfig(mesh, n_experts, pairs, rows, nodes, ragged, wire)


def expert_all_to_all(
    fn: Callable,
    params,
    rows: jax.Array,
    weights: jax.Array,
    ids: jax.Array,
    route: DispatchConfig,
    later=None,
) -> tuple[jax.Array, DispatchStats]:
    """Sum over each row's experts of weight * expert(row), exact for every routing.

    Args:
        fn: (params, rows [r D], weights [r], sizes [n_local]) -> [r D], of rows grouped by local
            expert, `sizes` of each; what lies beyond the last group is not looked at.
        params: this rank's share of the experts.
        rows: [t D].
        weights: [t K].
        ids: [t K] global expert ids, distinct within a row; one of n_experts or more is none.
        later: the same params for all rounds but the first, where their gradients are to come out
            apart; None if not.

    Returns:
        [t D], and what the exchange did.
    """
    both = (params, params if later is None else later)
    over = _over_ranks if route.mesh.nodes == 1 else _over_nodes
    return over(fn, both, rows, weights, ids, route)


def _over_ranks(fn, params, rows, weights, ids, route: DispatchConfig):
    """A copy of a row for each of its experts."""
    hop = route.to_ranks()

    def one_round(index, params, rows, weights, plan: DispatchPlan):
        at = round_indices(plan, hop, index)
        received = dispatch(rows, at, hop)
        plain = hop._replace(wire=IDENTITY)
        gates = dispatch(weights.reshape(-1, 1), indices_per_copy(at), plain)
        out = fn(params[0], received, gates[:, 0], at.sizes)
        return combine(out, at, hop), DispatchStats(jnp.int32(1), at.sizes.sum())

    plan = plan_rounds(ids, hop)
    most = ids.shape[0] * min(ids.shape[1], hop.n_groups)
    return _in_rounds(one_round, params, rows, weights, plan, plan.n_rounds, most > hop.capacity)


def _over_nodes(fn, params, rows, weights, ids, route: DispatchConfig):
    """A copy of a row for each node, where it goes on to its experts' ranks."""
    hop, inside = route.to_nodes(), route.inside()
    nowhere, plain = inside.n_experts, hop._replace(wire=IDENTITY)

    def one_round(index, params, rows, weights, plan_ids):
        plan, ids = plan_ids
        at = round_indices(plan, hop, index)
        received = dispatch(rows, at, hop)
        gates = dispatch(weights, at, plain)
        there = dispatch(ids, at, plain) - lax.axis_index("node") * nowhere
        local = jnp.where(
            at.filled(hop)[:, None] & (there >= 0) & (there < nowhere), there, nowhere
        )
        y, traffic = _over_ranks(fn, params, received, gates, local, inside)
        return combine(y, at, hop), traffic

    nodes = jnp.arange(hop.size)[None, None, :]
    wanted = (ids[:, :, None] // nowhere == nodes).any(1)  # [t nodes]
    keys = jnp.sort(jnp.where(wanted, nodes[0], hop.size), axis=1)[:, : route.max_nodes]
    plan = plan_rounds(keys, hop)
    n_rounds = lax.pmax(plan.n_rounds, "rank")  # inside, all ranks of a node work together
    more = rows.shape[0] > hop.capacity
    return _in_rounds(one_round, params, rows, weights, (plan, ids), n_rounds, more)


def _in_rounds(one_round: Callable, params, rows, weights, plan, n_rounds, more: bool):
    """Sum of `one_round(i, params, rows, weights, plan)` over all rounds.

    Args:
        params: those of the first round, and of all others.
        more: whether any routing needs more than one.
    """
    y, traffic = one_round(0, params, rows, weights, plan)
    if not more:
        return y, traffic

    def further(index, later, *inputs):
        return one_round(index, (later, later), *inputs)

    rest = _further_rounds(further, params[1], rows, weights, (plan, n_rounds))
    return jax.tree.map(jnp.add, (y, traffic), rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further_rounds(one_round, params, rows, weights, plan):
    """Sum of `one_round(i, ...)` for 1 <= i < n_rounds; the backward runs each round again."""
    plan, n_rounds = plan
    shapes = jax.eval_shape(one_round, 1, params, rows, weights, plan)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(i, total):
        return jax.tree.map(jnp.add, total, one_round(i, params, rows, weights, plan))

    with jax.named_scope(EXTRA_ROUNDS):
        return lax.fori_loop(1, n_rounds, body, zeros)


def _further_rounds_forward(one_round, *saved):
    return _further_rounds(one_round, *saved), saved


def _further_rounds_backward(one_round, saved, grads):
    *inputs, (plan, n_rounds) = saved

    def body(i, totals):
        _, pull = jax.vjp(lambda *inputs: one_round(i, *inputs, plan)[0], *inputs)
        d_inputs = pull(grads[0])
        return jax.tree.map(lambda total, d: total + d.astype(total.dtype), totals, d_inputs)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tuple(inputs))
    with jax.named_scope(EXTRA_ROUNDS):
        totals = lax.fori_loop(1, n_rounds, body, zeros)
    return *jax.tree.map(lambda total, x: total.astype(x.dtype), totals, tuple(inputs)), None


_further_rounds.defvjp(_further_rounds_forward, _further_rounds_backward)
