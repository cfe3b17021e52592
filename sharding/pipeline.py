"""Pipeline parallelism as one loop: `lax.scan` over the ticks of any table (`sharding/ticks.py`).

Each rank reads its own row of the table and runs its own layers: loops over the layers of a stage
with as many turns as the rank has layers to run, none where it waits. So idle ranks compute
nothing, stages may be uneven, and all ranks share one program. Forward and backward are written
out: the loop is never differentiated. What F keeps for B, X for W, and what waits for a rank, lies
in buffers whose places the table gives.

Where a rank has an F and a B to run, one turn of a loop runs a layer of each. They don't depend on
each other, so a compiler lays the exchange of tokens of one beside the products of the other
(report sec. 3.2.1): that is what DualPipe is for.

Everything here happens inside the manual region, on one device's shards; nothing knows what a layer
is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.ticks import FIELDS, Table

PyTree = Any
Gradients = dict[str, jax.Array]


class Parts(NamedTuple):
    """What a micro-batch passes through, forwards and backwards; closed over shared weights.

    Gradients are dicts by the names of parameters, of which a function may have some or none. They
    are summed over micro-batches in float32. `seen` is whatever else comes out, summed by `join`.
    """

    first: Callable  # micro -> x
    forward: Callable  # (weights, x) -> (y, kept, seen)
    last: Callable  # (x, micro) -> (d_x, gradients of shared weights, seen): at the end, both ways
    backward: Callable  # (weights, kept, d_y) -> (d_x, gradients, late)
    late: Callable  # late -> gradients: all that nobody waits for
    first_backward: Callable  # (d_x, micro) -> gradients of shared weights
    join: Callable  # (seen, seen) -> seen


class Result(NamedTuple):
    """Sums over all micro-batches of what a rank has worked on."""

    gradients: Gradients  # [S ...], of the layers of the rank
    shared: Gradients
    seen: PyTree  # [S ...], of the same
    seen_last: PyTree


def layers_of(table: Table, sizes: list[int]) -> np.ndarray:
    """Layers [ranks chunks most] of all stages of these sizes; past the last one where there are
    fewer than in the largest stage."""
    stages, first = table.stages, np.cumsum([0, *sizes])
    layers = np.full((stages.n_ranks, stages.n_chunks, max(sizes)), sum(sizes))
    for rank in range(stages.n_ranks):
        for chunk in range(stages.n_chunks):
            stage = stages.stage(rank, chunk)
            layers[rank, chunk, : sizes[stage]] = first[stage] + np.arange(sizes[stage])
    return layers


def turns(table: Table, sizes: list[int]) -> dict[str, np.ndarray]:
    """How often each part of a tick runs [ticks ranks], by the name that it has in the program.

    Layers: "FB" of an F and a B side by side, "F", "B", "X" and "W" by themselves; and `first`,
    `last` and `first_backward` of `Parts`.
    """
    stages, q = table.stages, {name: table.field(name) for name in FIELDS}
    ranks = np.arange(stages.n_ranks)[None, :]
    held = np.array(
        [
            [sizes[stages.stage(rank, chunk)] for chunk in range(stages.n_chunks)]
            for rank in range(stages.n_ranks)
        ]
    )
    n_f = held[ranks, q["f_chunk"]] * q["f_on"]
    n_b = held[ranks, q["b_chunk"]] * q["b_on"]
    both = np.minimum(n_f, n_b) * q["fused"]
    return {
        "FB": both,
        "F": n_f - both,
        "B": n_b * (1 - q["b_split"]) - both,
        "X": n_b * q["b_split"],
        "W": held[ranks, q["w_chunk"]] * q["w_on"],
        "first": q["f_on"] * q["f_first"],
        "last": q["b_on"] * q["b_last"],
        "first_backward": q["b_on"] * q["b_first"],
    }


def run(table: Table, sizes: list[int], parts: Parts, weights, micros) -> Result:
    """Forward and backward of all micro-batches.

    Args:
        sizes: layers of every stage.
        weights: [S ...] of the rank's layers as `layers_of` says, chunk by chunk; what stands past
            the last layer of a stage is not looked at.
        micros: [M ...] input of every micro-batch, on all ranks.
    """
    rank, most = lax.axis_index("pp"), max(sizes)
    counts = (layers_of(table, sizes) < sum(sizes)).sum(-1)  # [ranks chunks]
    count = jnp.asarray(counts, jnp.int32)[rank]
    rows = jnp.asarray(table.rows)[:, rank]
    shapes = _shapes(parts, _at(weights, 0), _at(micros, 0))
    zeros = _zeros(shapes, table, jax.tree.leaves(weights)[0].shape[0], most)
    splits, fuses = table.n_late > 0, bool(table.field("fused").any())

    def forward(i, q, x, kept, seen):
        layer = q["f_chunk"] * most + i
        y, saved, noticed = parts.forward(_at(weights, layer), x)
        total = parts.join(_at(seen, layer), noticed)
        return y, _put(kept, saved, q["f_kept"], i), _put(seen, total, layer)

    def read(i, q, kept):
        """What the last layer but i has kept, and all, to which may be written now."""
        return lax.optimization_barrier((_at(kept, q["b_kept"], count[q["b_chunk"]] - 1 - i), kept))

    def backward(i, q, d_y, saved):
        """Of the last layer but i."""
        inner = count[q["b_chunk"]] - 1 - i
        layer = q["b_chunk"] * most + inner
        # Tied to the loop: what doesn't depend on it would be moved out, and run in every tick.
        saved, layer = lax.optimization_barrier((saved, layer))
        d_x, grads, late = parts.backward(_at(weights, layer), saved, d_y)
        return d_x, grads, late, inner, layer

    def whole(i, q, d_y, kept, total):
        """A backward with all of its gradients."""
        d_x, grads, late, _, layer = backward(i, q, d_y, read(i, q, kept)[0])
        return d_x, _add(_add(total, grads, layer), parts.late(late), layer)

    def tick(carry, row):
        q = dict(zip(FIELDS, row, strict=True))
        c: dict = dict(carry)
        f_micro, b_micro = _at(micros, q["f_micro"]), _at(micros, q["b_micro"])
        n_f = jnp.where(q["f_on"] == 1, count[q["f_chunk"]], 0)
        n_b = jnp.where(q["b_on"] == 1, count[q["b_chunk"]], 0)
        n_whole = jnp.where(q["b_split"] == 1, 0, n_b)
        (x,) = _branch(
            "first",
            (q["f_on"] == 1) & (q["f_first"] == 1),
            lambda x: (parts.first(f_micro).astype(x.dtype),),
            _at(c["x"], q["f_in"]),
        )

        def end(h, shared, seen):
            d_h, grads, noticed = parts.last(h, b_micro)
            return d_h.astype(x.dtype), _add(shared, grads), parts.join(seen, noticed)

        ends = (q["b_on"] == 1) & (q["b_last"] == 1)
        v = (_at(c["g"], q["b_in"]), c["shared"], c["seen_last"])
        d_y, c["shared"], c["seen_last"] = _branch("last", ends, end, *v)
        both = 0

        if fuses:

            def side_by_side(i, v):
                x, d_y, kept, seen, total = v
                saved, kept = read(i, q, kept)
                d_y, grads, late, _, layer = backward(i, q, d_y, saved)
                x, kept, seen = forward(i, q, x, kept, seen)
                return x, d_y, kept, seen, _add(_add(total, grads, layer), parts.late(late), layer)

            both = jnp.where(q["fused"] == 1, jnp.minimum(n_f, n_whole), 0)
            v = (x, d_y, c["kept"], c["seen"], c["total"])
            x, d_y, c["kept"], c["seen"], c["total"] = _loop("FB", 0, both, side_by_side, v)
        v = (x, c["kept"], c["seen"])
        x, c["kept"], c["seen"] = _loop("F", both, n_f, lambda i, v: forward(i, q, *v), v)
        d_y, c["total"] = _loop(
            "B", both, n_whole, lambda i, v: whole(i, q, v[0], c["kept"], v[1]), (d_y, c["total"])
        )
        if splits:

            def inputs(i, v):
                d_y, lates, total = v
                d_x, grads, late, inner, layer = backward(i, q, d_y, read(i, q, c["kept"])[0])
                return d_x, _put(lates, late, q["b_late"], inner), _add(total, grads, layer)

            def weights_of(i, v):
                late, layer = lax.optimization_barrier(
                    (_at(c["late"], q["w_late"], i), q["w_chunk"] * most + i)
                )
                return _add(v, parts.late(late), layer)

            n_x, v = n_b - n_whole, (d_y, c["late"], c["total"])
            d_y, c["late"], c["total"] = _loop("X", 0, n_x, inputs, v)
            n_w = jnp.where(q["w_on"] == 1, count[q["w_chunk"]], 0)
            c["total"] = _loop("W", 0, n_w, weights_of, c["total"])

        def begin(shared):
            return (_add(shared, parts.first_backward(d_y, b_micro)),)

        begins = (q["b_on"] == 1) & (q["b_first"] == 1)
        (c["shared"],) = _branch("first_backward", begins, begin, c["shared"])
        arrived = _exchange(table, x, d_y) | {"x_self": x, "g_self": d_y, "g_end": x}
        for name, what in arrived.items():
            if table.used(name):
                scratch = c[name[0]].shape[0] - 1
                place = jnp.where(q[name] < 0, scratch, q[name])
                c[name[0]] = lax.dynamic_update_index_in_dim(c[name[0]], what, place, 0)
        return c, None

    c, _ = lax.scan(tick, zeros, rows)
    return Result(c["total"], c["shared"], c["seen"], c["seen_last"])


def _loop(name: str, start, stop, body: Callable, carry):
    """`fori_loop` under the name that `turns` has for it."""
    with jax.named_scope(f"pipeline_{name}"):
        return lax.fori_loop(start, stop, body, carry)


def _branch(name: str, wanted: jax.Array, fn: Callable, *carry) -> tuple:
    """fn(*carry) if it is wanted, else the carry, under the name that `turns` has for it."""
    with jax.named_scope(f"pipeline_{name}"):
        return lax.cond(wanted, fn, lambda *carry: carry, *carry)


def _exchange(table: Table, x: jax.Array, d_y: jax.Array) -> dict[str, jax.Array]:
    """What the ranks before and after have sent, in one message each."""
    n_ranks, arrived = table.stages.n_ranks, {}
    shifts = {"down": 1, "up": -1}
    for way, shift in shifts.items():
        names = [kind for kind in ("x", "g") if table.used(f"{kind}_{way}")]
        pairs = [(r, r + shift) for r in range(n_ranks) if 0 <= r + shift < n_ranks]
        message = jnp.stack([x, d_y])  # of both, so that it leaves when all is done
        if names:
            message = lax.ppermute(message, "pp", pairs)
        arrived |= {f"{kind}_{way}": message["xg".index(kind)] for kind in names}
    return arrived


def _shapes(parts: Parts, weights, micro) -> dict:
    """Shapes of all that the loop carries, for one layer or micro-batch."""

    def trace(weights, micro):
        x = parts.first(micro)
        y, kept, seen = parts.forward(weights, x)
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            raise TypeError(
                f"a layer must keep shape and type of its input: {x.shape} {x.dtype} became "
                f"{y.shape} {y.dtype}"
            )
        d_x, shared, seen_last = parts.last(y, micro)
        d_x, grads, late = parts.backward(weights, kept, d_x.astype(x.dtype))
        shared = parts.first_backward(d_x, micro) | shared
        total = grads | parts.late(late)
        names = ("x", "kept", "seen", "seen_last", "late", "shared", "total")
        return dict(zip(names, (x, kept, seen, seen_last, late, shared, total), strict=True))

    return jax.eval_shape(trace, weights, micro)


def _zeros(shapes: dict, table: Table, n_layers: int, most: int) -> dict:
    """What the loop begins with; `x` and `g` have a place more, for what nobody wants."""

    def zeros(tree, *lead, dtype=None):
        return jax.tree.map(lambda s: jnp.zeros((*lead, *s.shape), dtype or s.dtype), tree)

    late = {"late": zeros(shapes["late"], table.n_late, most)} if table.n_late else {}
    return late | {
        "x": zeros(shapes["x"], table.n_x + 1),
        "g": zeros(shapes["x"], table.n_g + 1),
        "kept": zeros(shapes["kept"], table.n_kept, most),
        "seen": zeros(shapes["seen"], n_layers),
        "seen_last": zeros(shapes["seen_last"]),
        "total": zeros(shapes["total"], n_layers, dtype=jnp.float32),
        "shared": zeros(shapes["shared"], dtype=jnp.float32),
    }


def _at(tree, *index):
    """The entries at these first dims of all arrays."""

    def one(a: jax.Array) -> jax.Array:
        sizes = (1,) * len(index) + a.shape[len(index) :]
        start = (*index, *(0,) * (a.ndim - len(index)))
        return lax.dynamic_slice(a, start, sizes).reshape(a.shape[len(index) :])

    return jax.tree.map(one, tree)


def _put(tree, values, *index):
    """The inverse of `_at`: all arrays with these entries in their places."""

    def one(a: jax.Array, value) -> jax.Array:
        value = jnp.asarray(value, a.dtype).reshape((1,) * len(index) + value.shape)
        return lax.dynamic_update_slice(a, value, (*index, *(0,) * (a.ndim - len(index))))

    return jax.tree.map(one, tree, values)


def _add(total: Gradients, grads: Gradients, *index) -> Gradients:
    """Gradients added to those of the same names, at these first dims."""
    new = {}
    for name, grad in grads.items():
        wide = grad.astype(jnp.float32)
        old = _at(total[name], *index) if index else total[name]
        new[name] = _put(total[name], old + wide, *index) if index else old + wide
    return total | new
