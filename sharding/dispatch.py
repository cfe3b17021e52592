"""One hop of an expert exchange: copies of rows go to peers, and what they become comes back.

A device has t rows and wants C copies of each, or fewer, to go to `size` peers along some mesh
axes. At a peer a copy belongs to one of `n_groups` groups (its expert; there is one group where
only the way there matters). A hop moves in rounds, each of at most `capacity` copies from one peer
to another, so its buffers are bounded whatever the copies want:

    plan = plan_rounds(keys, hop)           what goes where, once: index arithmetic only
    at = places(plan, hop, index)           round `index` of it
    received = dispatch(rows, at, hop)      rows of the round, each group's together
    result = combine(out, at, hop)          and back: the sum over each row's copies

`dispatch` and `combine` are each other's transposes, so the gradient of one is the other. On the
way out rows travel in the `Wire`'s format, in the gradient of `combine` as well; on the way back
always as they are (report sec. 3.3.3).

Two transports carry the same rounds. The padded one sends full rounds by `all_to_all` and puts in
order what arrived. The ragged one sends what there is by `ragged_all_to_all`, each piece straight
to its place (checked here by an emulation, compiled for v5p, tpu7x and H100).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class WireFormat(NamedTuple):
    """How rows [t D] travel: as a pytree of arrays [t ...], such as values and their scales.

    What `decode` returns must encode to the same again, as rows may take a second hop.
    """

    encode: Callable
    decode: Callable  # (encoded, dtype of the rows) -> rows


def _as_it_is(x, dtype):
    return x.astype(dtype)


IDENTITY = WireFormat(lambda x: x, _as_it_is)


class Hop(NamedTuple):
    """Static sizes of a hop."""

    axes: tuple[str, ...]
    size: int  # peers, the device itself among them
    n_groups: int  # at each peer
    capacity: int  # copies a round from one peer to another
    ragged: bool = False
    wire: WireFormat = IDENTITY
    loose: bool = False  # what is received keeps its peers' slots; for a single group


class DispatchPlan(NamedTuple):
    """What goes where; positions count a device's copies in the order of peers and groups."""

    order: jax.Array  # [t*C] position -> copy (row * C + which)
    peer: jax.Array  # [t C] where each copy goes; `size` for nowhere
    offset: jax.Array  # [t C] its place among the copies to that peer
    copies: jax.Array  # [size size n_groups] from each peer to each group of each, all of them
    n_rounds: jax.Array  # [] the same on all ranks of the expert axes


class RoundIndices(NamedTuple):
    """One round of a plan; both ways a peer has `capacity` slots.

    Of the pieces that go to each group of each peer, and of those that come from each peer for each
    group [size n_groups]: how many copies, where they begin here and where at the peer.
    """

    copy: jax.Array  # [slots] what goes into each slot; any copy where none does
    back: jax.Array  # [t C] slot of each copy; past the end if it is not of this round
    sent: jax.Array
    sent_from: jax.Array
    sent_to: jax.Array
    received: jax.Array
    received_to: jax.Array
    received_from: jax.Array

    @property
    def sizes(self) -> jax.Array:
        """[n_groups] copies received for each group."""
        return self.received.sum(0)

    def filled(self, hop: Hop) -> jax.Array:
        """[r] which places a loose `dispatch` fills."""
        return (jnp.arange(hop.capacity)[None, :] < self.received).reshape(-1)


def round_capacity(n_copies: int, size: int, factor: float) -> int:
    """Copies a round from one peer to another: `factor` times the balanced load, in eights."""
    if size == 1:
        return n_copies
    return min(n_copies, -(-int(factor * n_copies) // (8 * size)) * 8)


def plan_rounds(keys: jax.Array, hop: Hop) -> DispatchPlan:
    """The plan for keys [t C]: peer * n_groups + group, or anything past the last for no copy."""
    n_keys = hop.size * hop.n_groups
    flat = jnp.minimum(keys.reshape(-1), n_keys)  # [t*C]
    order = jnp.argsort(flat, stable=True)
    position = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    sent = jnp.zeros(n_keys, jnp.int32).at[flat].add(1, mode="drop")
    sent = sent.reshape(hop.size, hop.n_groups)
    start = jnp.append(_before(sent.sum(1)), 0)
    copies = _told(sent, hop)
    peer = flat // hop.n_groups
    return DispatchPlan(
        order=order,
        peer=peer.reshape(keys.shape),
        offset=(position - start[peer]).reshape(keys.shape),
        copies=copies,
        n_rounds=-(-copies.sum(2).max() // hop.capacity),
    )


def round_indices(plan: DispatchPlan, hop: Hop, index) -> RoundIndices:
    """Round `index` of the plan."""
    me = lax.axis_index(hop.axes) if hop.size > 1 else 0
    first = index * hop.capacity
    start = _before(plan.copies[me].sum(1))[:, None] + first
    position = (start + jnp.arange(hop.capacity)[None, :]).reshape(-1)
    slot = plan.peer * hop.capacity + plan.offset - first
    mine = (plan.offset >= first) & (plan.offset < first + hop.capacity) & (plan.peer < hop.size)
    # Of all peers' copies in the order of groups, the round takes a window.
    stop = jnp.cumsum(plan.copies, 2)
    begin, end = (jnp.clip(at - first, 0, hop.capacity) for at in (stop - plan.copies, stop))
    moved = end - begin  # [from to group]
    slots = jnp.arange(hop.size, dtype=jnp.int32) * hop.capacity
    begin = begin + slots[None, :, None]
    grouped = jnp.cumsum(moved, 0) - moved + _before(moved.sum(0))[None, :, :]
    target = jnp.broadcast_to(slots[:, None, None], moved.shape) if hop.loose else grouped
    return RoundIndices(
        copy=plan.order.at[position].get(mode="clip"),
        back=jnp.where(mine, slot, position.size),
        sent=moved[me],
        sent_from=begin[me],
        sent_to=target[me],
        received=moved[:, me],
        received_to=target[:, me],
        received_from=begin[:, me],
    )


def indices_per_copy(at: RoundIndices) -> RoundIndices:
    """The same round for an array [t*C ...] that has an entry a copy instead of a row."""
    return at._replace(back=at.back.reshape(-1, 1))


def _before(sizes: jax.Array) -> jax.Array:
    """Sum of the entries before each, along the last dim."""
    return jnp.cumsum(sizes, -1) - sizes


def _told(x: jax.Array, hop: Hop) -> jax.Array:
    """[size ...]: everyone's x. By all-to-all, which runs beside products where gathers do not."""
    return _swap(jnp.broadcast_to(x[None], (hop.size, *x.shape)), hop)


def _swap(x: jax.Array, hop: Hop) -> jax.Array:
    """Entry d goes to peer d; entry s of the result came from peer s."""
    if hop.size == 1:
        return x
    return lax.all_to_all(x, hop.axes, split_axis=0, concat_axis=0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(rows: jax.Array, at: RoundIndices, hop: Hop) -> jax.Array:
    """Rows [t D] -> those received [r D], r = size * capacity; unspecified where there are none.

    They come in the order of their groups, from the front, or each peer's in the slots it has.
    """
    source = at.copy // at.back.shape[1]
    outbox = jax.tree.map(lambda x: x.at[source].get(mode="clip"), hop.wire.encode(rows))
    send = _send_ragged if hop.ragged else _send_padded
    return hop.wire.decode(jax.tree.map(lambda x: send(x, at, hop), outbox), rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(out: jax.Array, at: RoundIndices, hop: Hop) -> jax.Array:
    """Results [r D] in the order of `dispatch` -> [t D], summed over the copies of each row."""
    returned = _return_ragged(out, at, hop) if hop.ragged else _return_padded(out, at, hop)
    slots = jnp.moveaxis(at.back, 1, 0)  # one gather a copy: all at once would fill [t C D]
    copies = (returned.at[slot].get(mode="fill", fill_value=0) for slot in slots)
    return sum(copy.astype(jnp.float32) for copy in copies).astype(out.dtype)


dispatch.defvjp(
    lambda rows, at, hop: (dispatch(rows, at, hop), at),
    lambda hop, at, grad: (combine(grad, at, hop), None),
)
combine.defvjp(
    lambda out, at, hop: (combine(out, at, hop), at),
    lambda hop, at, grad: (dispatch(grad, at, hop), None),
)


def _send_padded(outbox: jax.Array, at: RoundIndices, hop: Hop) -> jax.Array:
    if hop.size == 1 or hop.loose:
        return _swap(outbox, hop)  # it is in order
    target, slots = _targets(at, hop), jnp.arange(outbox.shape[0], dtype=jnp.int32)
    order = jnp.zeros_like(slots).at[target].set(slots, mode="drop")
    return _swap(outbox, hop).at[order].get(mode="clip")


def _return_padded(inbox: jax.Array, at: RoundIndices, hop: Hop) -> jax.Array:
    if hop.size == 1 or hop.loose:
        return _swap(inbox, hop)
    return _swap(inbox.at[_targets(at, hop)].get(mode="clip"), hop)


def _targets(at: RoundIndices, hop: Hop) -> jax.Array:
    """Where each slot of what arrives by padded rounds belongs; past the end if it is empty."""
    column = jnp.arange(hop.capacity)
    stop = jnp.cumsum(at.received, 1)
    group = (column[None, :, None] >= stop[:, None, :]).sum(-1)  # [size capacity]
    shift = at.received_to - (stop - at.received)
    place = column[None, :] + jnp.take_along_axis(shift, group, axis=1, mode="clip")
    return jnp.where(group < hop.n_groups, place, place.size).reshape(-1)


def _send_ragged(outbox: jax.Array, at: RoundIndices, hop: Hop) -> jax.Array:
    return _ragged(outbox, hop, at.sent_from, at.sent, at.sent_to, at.received)


def _return_ragged(inbox: jax.Array, at: RoundIndices, hop: Hop) -> jax.Array:
    return _ragged(inbox, hop, at.received_to, at.received, at.received_from, at.sent)


def _ragged(x: jax.Array, hop: Hop, *index: jax.Array) -> jax.Array:
    pieces = [part.reshape(-1) for part in index]
    return lax.ragged_all_to_all(x, lax.empty(x.shape, x.dtype), *pieces, axis_name=hop.axes)
