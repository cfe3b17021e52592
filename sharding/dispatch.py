"""One hop of an expert all-to-all: copies of rows go to peers, and results come back.

A device has t rows and sends up to K copies of each to `size` peers along some mesh axes. At a peer
a copy belongs to one of `n_groups` groups (its expert; a single group where only the peer matters).
A hop moves in rounds of at most `capacity` copies from one peer to another, so its buffers are
bounded whatever the routing is:

    plan = plan_rounds(keys, hop)                   what goes where, computed once
    indices = round_indices(plan, hop, index)       the indices of one round
    received = dispatch(rows, indices, hop)         the rows of the round, sorted by group
    result = combine(out, indices, hop)             and back: the sum over each row's copies

`dispatch` and `combine` are each other's transposes, so the gradient of one is the other. Rows are
dispatched in the hop's `WireFormat`, as are the gradients of results; what is combined always
travels as it is (report sec. 3.3.3).

Two transports carry the same rounds. The padded one sends full rounds by `all_to_all` and sorts
what arrives. The ragged one sends only the rows there are by `ragged_all_to_all`, each group
directly to its final position (tested on CPUs by an emulation, compiled for v5p, tpu7x and H100).

Shapes: t rows of this device, K copies of each, r = size * capacity slots of a buffer, D width,
p peers, g groups at each peer.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped


class WireFormat(NamedTuple):
    """The format in which rows [t D] travel: a pytree of arrays [t ...], such as values and scales.

    Encoding again what `decode` returns must give the same pytree, since rows may take two hops.
    """

    encode: Callable  # rows -> pytree
    decode: Callable  # (pytree, dtype of the rows) -> rows


def _decode_identity(x, dtype):
    return x.astype(dtype)


IDENTITY = WireFormat(lambda x: x, _decode_identity)


class Hop(NamedTuple):
    """The static sizes of a hop."""

    axes: tuple[str, ...]
    size: int  # peers, including the device itself
    n_groups: int  # at each peer
    capacity: int  # copies per round from one peer to another
    ragged: bool = False
    wire_format: WireFormat = IDENTITY
    keep_source_order: bool = False  # do not sort by group what arrives; for a single group


class DispatchPlan(NamedTuple):
    """The peer and position of every copy, counted over a device's copies by peer and group."""

    order: Int[Array, " tK"]  # position -> copy, as row * K + k
    peer: Int[Array, "t K"]  # where each copy goes; `size` for nowhere
    offset: Int[Array, "t K"]  # position of each copy among the copies to the same peer
    counts: Int[Array, "p p g"]  # copies from each peer to each group of each peer, in all rounds
    n_rounds: Int[Array, ""]  # the same on all peers


class RoundIndices(NamedTuple):
    """One round of a plan. Its send and receive buffers have `capacity` slots per peer.

    Sizes and offsets are those of the rows that go to each group of each peer (send), and of the
    rows that come from each peer for each group here (recv), as in `lax.ragged_all_to_all`.
    """

    slot_to_copy: Int[Array, " r"]  # the copy in each slot to send; any copy where there is none
    copy_to_slot: Int[Array, "t K"]  # r or more for a copy that is not in this round
    send_sizes: Int[Array, "p g"]
    send_offsets: Int[Array, "p g"]  # in this device's send buffer
    peer_recv_offsets: Int[Array, "p g"]  # in the peer's receive buffer
    recv_sizes: Int[Array, "p g"]
    recv_offsets: Int[Array, "p g"]  # in this device's receive buffer
    peer_send_offsets: Int[Array, "p g"]  # in the peer's send buffer

    @property
    def group_sizes(self) -> Int[Array, " g"]:
        """The number of copies received for each group."""
        return self.recv_sizes.sum(0)

    def received_mask(self, hop: Hop) -> Bool[Array, " r"]:
        """Return which slots of the receive buffer are filled, if the hop keeps source order."""
        return (jnp.arange(hop.capacity)[None, :] < self.recv_sizes).reshape(-1)

    def per_copy(self) -> "RoundIndices":
        """Return the same round for an array [t*K ...] that has one row per copy."""
        return self._replace(copy_to_slot=self.copy_to_slot.reshape(-1, 1))


def round_capacity(n_copies: int, size: int, factor: float) -> int:
    """Return the copies per round from one peer to another.

    They are `factor` times the balanced load, rounded up to a multiple of 8.
    """
    if size == 1:
        return n_copies
    return min(n_copies, -(-int(factor * n_copies) // (8 * size)) * 8)


def plan_rounds(keys: Int[Array, "t K"], hop: Hop) -> DispatchPlan:
    """Plan a hop.

    Args:
        keys: peer * n_groups + group of each copy; larger than that of the last peer for no copy.
    """
    n_keys = hop.size * hop.n_groups
    flat = jnp.minimum(keys.reshape(-1), n_keys)  # [t*K]
    order = jnp.argsort(flat, stable=True)
    position = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    sent = jnp.zeros(n_keys, jnp.int32).at[flat].add(1, mode="drop")
    sent = sent.reshape(hop.size, hop.n_groups)
    first = jnp.append(_exclusive_cumsum(sent.sum(1)), 0)
    counts = _all_gather_counts(sent, hop)
    peer = flat // hop.n_groups
    return DispatchPlan(
        order=order,
        peer=peer.reshape(keys.shape),
        offset=(position - first[peer]).reshape(keys.shape),
        counts=counts,
        n_rounds=-(-counts.sum(2).max() // hop.capacity),
    )


def round_indices(plan: DispatchPlan, hop: Hop, index: int | Int[Array, ""]) -> RoundIndices:
    """Return the indices of round `index` of a plan."""
    me = lax.axis_index(hop.axes) if hop.size > 1 else 0
    begin = index * hop.capacity  # the round takes the copies begin .. begin + capacity to a peer
    first = _exclusive_cumsum(plan.counts[me].sum(1))[:, None] + begin
    position = (first + jnp.arange(hop.capacity)[None, :]).reshape(-1)
    slot = plan.peer * hop.capacity + plan.offset - begin
    in_round = (plan.offset >= begin) & (plan.offset < begin + hop.capacity)
    in_round = in_round & (plan.peer < hop.size)
    # Of the copies from one peer to another, sorted by group, the round takes a window.
    group_end = jnp.cumsum(plan.counts, 2)
    start, end = (
        jnp.clip(x - begin, 0, hop.capacity) for x in (group_end - plan.counts, group_end)
    )
    sizes = end - start  # [from to group]
    block = jnp.arange(hop.size, dtype=jnp.int32) * hop.capacity  # slots of each peer begin here
    start = start + block[None, :, None]
    target = (
        jnp.broadcast_to(block[:, None, None], sizes.shape)
        if hop.keep_source_order
        else jnp.cumsum(sizes, 0) - sizes + _exclusive_cumsum(sizes.sum(0))[None, :, :]
    )
    return RoundIndices(
        slot_to_copy=plan.order.at[position].get(mode="clip"),
        copy_to_slot=jnp.where(in_round, slot, position.size),
        send_sizes=sizes[me],
        send_offsets=start[me],
        peer_recv_offsets=target[me],
        recv_sizes=sizes[:, me],
        recv_offsets=target[:, me],
        peer_send_offsets=start[:, me],
    )


def _exclusive_cumsum(sizes: jax.Array) -> jax.Array:
    """Return the sum of the entries before each entry along the last dimension."""
    return jnp.cumsum(sizes, -1) - sizes


def _all_gather_counts(sent: jax.Array, hop: Hop) -> jax.Array:
    """Gather all peers' counts [size ...].

    This is an all-to-all because, unlike an all-gather, it runs beside matrix products.
    """
    return _all_to_all(jnp.broadcast_to(sent[None], (hop.size, *sent.shape)), hop)


def _all_to_all(x: jax.Array, hop: Hop) -> jax.Array:
    """Send the i-th block of the first dimension to peer i; block i of the result is from it."""
    if hop.size == 1:
        return x
    return lax.all_to_all(x, hop.axes, split_axis=0, concat_axis=0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(rows: Shaped[Array, "t D"], indices: RoundIndices, hop: Hop) -> Shaped[Array, "r D"]:
    """Send the copies of one round to their peers; return the rows received.

    They are sorted by group and begin at slot 0, or, with `keep_source_order`, each peer's rows
    begin at its first slot. The contents of all other slots are unspecified.
    """
    row_ids = indices.slot_to_copy // indices.copy_to_slot.shape[1]
    buffer = jax.tree.map(lambda x: x.at[row_ids].get(mode="clip"), hop.wire_format.encode(rows))
    send = _send_ragged if hop.ragged else _send_padded
    received = jax.tree.map(lambda x: send(x, indices, hop), buffer)
    return hop.wire_format.decode(received, rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(out: Shaped[Array, "r D"], indices: RoundIndices, hop: Hop) -> Shaped[Array, "t D"]:
    """Return results, in the order of `dispatch`, to their rows: the sum over a row's copies."""
    send_back = _return_ragged if hop.ragged else _return_padded
    returned = send_back(out, indices, hop)
    # One gather for each k, since one gather for all would fill [t K D].
    slots = rearrange(indices.copy_to_slot, "t k -> k t")
    copies = (returned.at[slot].get(mode="fill", fill_value=0) for slot in slots)
    return sum(copy.astype(jnp.float32) for copy in copies).astype(out.dtype)


dispatch.defvjp(
    lambda rows, indices, hop: (dispatch(rows, indices, hop), indices),
    lambda hop, indices, grad: (combine(grad, indices, hop), None),
)
combine.defvjp(
    lambda out, indices, hop: (combine(out, indices, hop), indices),
    lambda hop, indices, grad: (dispatch(grad, indices, hop), None),
)


def _send_padded(buffer: jax.Array, indices: RoundIndices, hop: Hop) -> jax.Array:
    if hop.size == 1 or hop.keep_source_order:
        return _all_to_all(buffer, hop)  # sorted already
    sorted_slots, slots = _sorted_slots(indices, hop), jnp.arange(len(buffer), dtype=jnp.int32)
    order = jnp.zeros_like(slots).at[sorted_slots].set(slots, mode="drop")
    return _all_to_all(buffer, hop).at[order].get(mode="clip")


def _return_padded(buffer: jax.Array, indices: RoundIndices, hop: Hop) -> jax.Array:
    if hop.size == 1 or hop.keep_source_order:
        return _all_to_all(buffer, hop)
    return _all_to_all(buffer.at[_sorted_slots(indices, hop)].get(mode="clip"), hop)


def _sorted_slots(indices: RoundIndices, hop: Hop) -> jax.Array:
    """Return where each slot of a padded round goes when sorted by group; r if it is empty."""
    column = jnp.arange(hop.capacity)
    end = jnp.cumsum(indices.recv_sizes, 1)
    group = (column[None, :, None] >= end[:, None, :]).sum(-1)  # [size capacity]
    shift = indices.recv_offsets - (end - indices.recv_sizes)
    slot = column[None, :] + jnp.take_along_axis(shift, group, axis=1, mode="clip")
    return jnp.where(group < hop.n_groups, slot, slot.size).reshape(-1)


def _send_ragged(buffer: jax.Array, indices: RoundIndices, hop: Hop) -> jax.Array:
    return _ragged_all_to_all(
        buffer,
        hop,
        indices.send_offsets,
        indices.send_sizes,
        indices.peer_recv_offsets,
        indices.recv_sizes,
    )


def _return_ragged(buffer: jax.Array, indices: RoundIndices, hop: Hop) -> jax.Array:
    return _ragged_all_to_all(
        buffer,
        hop,
        indices.recv_offsets,
        indices.recv_sizes,
        indices.peer_send_offsets,
        indices.send_sizes,
    )


def _ragged_all_to_all(x: jax.Array, hop: Hop, *offsets_and_sizes: jax.Array) -> jax.Array:
    flat = (array.reshape(-1) for array in offsets_and_sizes)
    return lax.ragged_all_to_all(x, lax.empty(x.shape, x.dtype), *flat, axis_name=hop.axes)
