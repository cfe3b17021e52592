"""Expert parallelism: rows go to the ranks that hold their experts, and their results come back.

Every device holds t rows and n_experts / ep experts. A row is wanted by the K experts that its
router chose: t * K pairs. Pairs travel by all-to-all in rounds of fixed capacity until none is
left, so buffers are bounded and no pair is dropped, whatever the routing:

    plan = plan_rounds(ids, ...)                       index arithmetic only, once
    received, ... = dispatch(rows, ..., plan, i)       round i on its way out
    result = combine(fn(received), plan, i)            and back: the sum over each row's pairs

`exchange` is the sum over all rounds. Near balance that is one
round, which is differentiated as ordinary code; further rounds run in a loop that stores nothing.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding.mesh import EXPERT_AXES, MeshSpec


class Route(NamedTuple):
    """Static sizes of an exchange."""

    mesh: MeshSpec
    n_experts: int
    capacity: int  # pairs a round from one rank to another

    @property
    def n_local(self) -> int:
        """Experts that each rank holds."""
        return self.n_experts // self.mesh.ep


class Plan(NamedTuple):
    """Where each pair travels; positions count a device's pairs in the order of their experts."""

    order: jax.Array  # [t*K] position -> pair (row * K + choice)
    experts: jax.Array  # [t*K] position -> expert, counted from the first of its rank
    rank: jax.Array  # [t K] pair -> destination
    offset: jax.Array  # [t K] pair -> place among the pairs of that destination
    count: jax.Array  # [ep] pairs that go to each rank
    n_rounds: jax.Array  # [] the same on all ranks of the expert axes


def capacity_of(n_pairs: int, ep: int, factor: float) -> int:
    """Pairs a round from one rank to another: `factor` times the balanced load, in eights."""
    if ep == 1:
        return n_pairs
    return min(n_pairs, -(-int(factor * n_pairs) // (8 * ep)) * 8)


def plan_rounds(ids: jax.Array, route: Route) -> Plan:
    """The plan for expert ids [t K], each in [0, n_experts) and distinct within a row."""
    flat = ids.reshape(-1)  # [t*K]
    order = jnp.argsort(flat, stable=True)
    position = _inverse(order)
    rank = flat // route.n_local
    count = jnp.zeros(route.mesh.ep, jnp.int32).at[rank].add(1)
    start = jnp.cumsum(count) - count
    n_rounds = -(-count.max() // route.capacity)
    return Plan(
        order=order,
        experts=flat[order] % route.n_local,
        rank=rank.reshape(ids.shape),
        offset=(position - start[rank]).reshape(ids.shape),
        count=count,
        n_rounds=lax.pmax(n_rounds, EXPERT_AXES) if route.mesh.ep > 1 else n_rounds,
    )


def dispatch(rows, weights: jax.Array, plan: Plan, route: Route, index) -> tuple:
    """Round `index` on its way out.

    Args:
        rows: pytree of [t ...], such as values and their scales: one row a token.
        weights: [t K], one number a pair.

    Returns:
        The rows received [r ...], their weights [r] and local experts [r], r = ep * capacity;
        places that nothing was sent to hold any row and the expert `n_local`. What each rank sent
        is in the order of its experts.
    """
    slots, pairs, back = _places(plan, route, index)
    choices = weights.shape[1]
    sent = jax.tree.map(lambda x: _spread(x, pairs // choices, back), rows)
    sent_weights = _spread(weights.reshape(-1), pairs, back.reshape(-1, 1))
    experts = plan.experts.at[slots].get(mode="fill", fill_value=route.n_local)
    return jax.tree.map(lambda x: _all_to_all(x, route), (sent, sent_weights, experts))


def combine(out: jax.Array, plan: Plan, route: Route, index) -> jax.Array:
    """Round `index` on its way back: results [r D] -> [t D], summed over the pairs of each row."""
    _, pairs, back = _places(plan, route, index)
    return _collect(_all_to_all(out, route), pairs // back.shape[1], back)


def exchange(fn: Callable, params, rows, weights: jax.Array, ids: jax.Array, route: Route):
    """Sum over each row's experts of weight * expert(row), exact for every routing.

    Args:
        fn: (params, rows, weights [r], sizes [n_local]) -> [r D], of rows grouped by local expert,
            `sizes` of each; what lies beyond the last group is not looked at.
        params: this rank's share of the experts.
        rows: pytree of [t ...].
        weights: [t K].
        ids: [t K] global expert ids.

    Returns:
        [t D], and the plan, whose counts and rounds are for the metrics.
    """
    plan = plan_rounds(ids, route)

    def one_round(index, params, rows, weights, plan):
        *received, experts = dispatch(rows, weights, plan, route, index)
        received, sizes, ungroup = _grouped(tuple(received), experts, route)
        return combine(ungroup(fn(params, *received, sizes)), plan, route, index)

    y = one_round(0, params, rows, weights, plan)
    most = ids.shape[0] * min(ids.shape[1], route.n_local)  # pairs from one rank to another
    if most > route.capacity:
        y = y + _further_rounds(one_round, params, rows, weights, plan, y.dtype)
    return y, plan


def _inverse(order: jax.Array) -> jax.Array:
    """The permutation that undoes `order`."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))


def _grouped(received, experts: jax.Array, route: Route) -> tuple:
    """What was received in the order of local experts, their sizes, and the way back."""
    sizes = jnp.zeros(route.n_local, jnp.int32).at[experts].add(1, mode="drop")
    if route.mesh.ep == 1:  # what one rank sent is in that order
        return received, sizes, lambda out: out
    order = jnp.argsort(experts, stable=True)
    inverse = _inverse(order)
    grouped = jax.tree.map(lambda x: _spread(x, order, inverse[:, None]), received)
    return grouped, sizes, lambda out: _spread(out, inverse, order[:, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def _further_rounds(one_round, params, rows, weights, plan, dtype):
    """Sum of `one_round(i, ...)` for 1 <= i < n_rounds; the backward runs each round again."""
    shape = jax.eval_shape(one_round, 1, params, rows, weights, plan).shape

    def body(i, total):
        return total + one_round(i, params, rows, weights, plan)

    return lax.fori_loop(1, plan.n_rounds, body, jnp.zeros(shape, dtype))


def _further_rounds_forward(one_round, params, rows, weights, plan, dtype):
    saved = (params, rows, weights, plan)
    return _further_rounds(one_round, *saved, dtype), saved


def _further_rounds_backward(one_round, dtype, saved, grad):
    *inputs, plan = saved

    def body(i, totals):
        _, pull = jax.vjp(lambda *inputs: one_round(i, *inputs, plan), *inputs)
        return jax.tree.map(lambda total, d: total + d.astype(total.dtype), totals, pull(grad))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tuple(inputs))
    totals = lax.fori_loop(1, plan.n_rounds, body, zeros)
    return *jax.tree.map(lambda total, x: total.astype(x.dtype), totals, tuple(inputs)), None


_further_rounds.defvjp(_further_rounds_forward, _further_rounds_backward)


def _places(plan: Plan, route: Route, index) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What round `index` carries, in both directions; one past the end where there is nothing.

    Returns:
        Position in each slot of the send buffer [ep * capacity], pair in each slot, and the slot
        of each pair [t K].
    """
    first = index * route.capacity
    column = first + jnp.arange(route.capacity)[None, :]
    start = (jnp.cumsum(plan.count) - plan.count)[:, None]
    slots = jnp.where(column < plan.count[:, None], start + column, plan.order.size).reshape(-1)
    pairs = plan.order.at[slots].get(mode="fill", fill_value=plan.order.size)
    inside = (plan.offset >= first) & (plan.offset < first + route.capacity)
    back = jnp.where(inside, plan.rank * route.capacity + plan.offset - first, slots.size)
    return slots, pairs, back


def _all_to_all(x: jax.Array, route: Route) -> jax.Array:
    """Chunk d of the leading dimension goes to rank d; chunk s of the result came from rank s."""
    if route.mesh.ep == 1:
        return x
    return lax.all_to_all(x, EXPERT_AXES, split_axis=0, concat_axis=0, tiled=True)


@jax.custom_vjp
def _spread(x: jax.Array, source: jax.Array, back: jax.Array) -> jax.Array:
    """x [t ...] -> [s ...], out[i] = x[source[i]]; `back` [t K] lists where each row went.

    Knowing both directions, this and `_collect` are each other's transpose without a scatter. A
    place without a source holds any row: nobody looks there, and clearing it would cost a pass.
    """
    return x.at[source].get(mode="clip")


@jax.custom_vjp
def _collect(x: jax.Array, source: jax.Array, back: jax.Array) -> jax.Array:
    """x [s ...] -> [t ...], out[t] = sum over k of x[back[t, k]], zero past the end."""
    return x.at[back].get(mode="fill", fill_value=0).sum(1)


_spread.defvjp(
    lambda x, source, back: (_spread(x, source, back), (source, back)),
    lambda saved, grad: (_collect(grad, *saved), None, None),
)
_collect.defvjp(
    lambda x, source, back: (_collect(x, source, back), (source, back)),
    lambda saved, grad: (_spread(grad, *saved), None, None),
)
