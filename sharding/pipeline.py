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

SCOPE = "pipeline_"  # starts the named scope of every part of a tick, for who reads the program


class Parts(NamedTuple):
    """What a micro-batch passes through, forwards and backwards; closed over shared weights.

    Gradients are dicts by the names of parameters, of which a function may have some or none. They
    are summed over micro-batches in float32. `seen` is whatever else comes out, summed by `join`.
    """

    first: Callable  # micro -> x
    forward: Callable  # (weights, x, micro) -> (y, kept, seen)
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
    rank = lax.axis_index("pp")
    counts = (layers_of(table, sizes) < sum(sizes)).sum(-1)  # [ranks chunks]
    at_all = frozenset(name for name, n in turns(table, sizes).items() if n.any())
    count = jnp.asarray(counts, jnp.int32)[rank]
    tick = _Tick(table, parts, weights, micros, count, max(sizes), at_all)
    shapes = _shapes(parts, _at(weights, 0), _at(micros, 0))
    zeros = _zeros(shapes, table, jax.tree.leaves(weights)[0].shape[0], max(sizes))
    c, _ = lax.scan(tick.run, zeros, jnp.asarray(table.rows)[:, rank])
    return Result(c["total"], c["shared"], c["seen"], c["seen_last"])


class _Tick(NamedTuple):
    """One turn of the loop: `c` is what it carries (`_zeros`), `q` the numbers of a row."""

    table: Table
    parts: Parts
    weights: PyTree
    micros: PyTree
    count: jax.Array  # layers of each chunk of this rank
    most: int  # of any stage
    at_all: frozenset[str]  # parts that any rank ever runs

    def run(self, carry: dict, row: jax.Array) -> tuple[dict, None]:
        q, c = dict(zip(FIELDS, row, strict=True)), dict(carry)
        begun = self.late_weights(c, q)
        x, d_y = self.layers(c, q, self.first(c, q), self.last(c, q), begun)
        self.first_backward(c, q, d_y)
        self.send(c, q, x, d_y)
        return c, None

    def late_weights(self, c: dict, q: dict) -> jax.Array:
        """Runs W. Returns 0, but not before it is done: nothing else is to be sent before."""
        if "W" not in self.at_all:
            return jnp.int32(0)

        def body(i, v):
            total, done = v
            late = self.tied(_at(c["late"], q["w_late"], i), i)
            grads = self.parts.late(late)
            return _add(total, grads, q["w_chunk"] * self.most + i), done + 1

        n = jnp.where(q["w_on"] == 1, self.count[q["w_chunk"]], 0)
        c["total"], done = _loop("W", 0, n, body, (c["total"], jnp.int32(0)))
        return done - n

    def first(self, c: dict, q: dict) -> jax.Array:
        """The input of F: what has arrived, or that of the first layer."""
        micro = _at(self.micros, q["f_micro"])

        def enter(x):
            return (self.parts.first(micro).astype(x.dtype),)

        enters = (q["f_on"] == 1) & (q["f_first"] == 1)
        return _branch("first", enters, enter, _at(c["x"], q["f_in"]))[0]

    def last(self, c: dict, q: dict) -> jax.Array:
        """The gradient that B begins with: what has arrived, or that of the last layer's output."""
        micro = _at(self.micros, q["b_micro"])

        def turn(h, shared, seen):
            d_h, grads, noticed = self.parts.last(h, micro)
            return d_h.astype(h.dtype), _add(shared, grads), self.parts.join(seen, noticed)

        turns_back = (q["b_on"] == 1) & (q["b_last"] == 1)
        v = (_at(c["g"], q["b_in"]), c["shared"], c["seen_last"])
        d_y, c["shared"], c["seen_last"] = _branch("last", turns_back, turn, *v)
        return d_y

    def layers(self, c: dict, q: dict, x, d_y, begun) -> tuple[jax.Array, jax.Array]:
        """x through the layers of F and d_y back through those of B or X, side by side if so."""
        n_f = jnp.where(q["f_on"] == 1, self.count[q["f_chunk"]], 0)
        n_b = jnp.where(q["b_on"] == 1, self.count[q["b_chunk"]], 0)
        n_whole = jnp.where(q["b_split"] == 1, 0, n_b)
        both = begun

        def side_by_side(i, v):
            x, d_y, kept, seen, total = v
            saved, kept = self.read(q, kept, i)
            d_y, total = self.whole(q, saved, i, d_y, total)
            x, kept, seen = self.forward(q, i, x, kept, seen)
            return x, d_y, kept, seen, total

        if "FB" in self.at_all:
            both = begun + jnp.where(q["fused"] == 1, jnp.minimum(n_f, n_whole), 0)
            v = (x, d_y, c["kept"], c["seen"], c["total"])
            x, d_y, c["kept"], c["seen"], c["total"] = _loop("FB", begun, both, side_by_side, v)
        v = (x, c["kept"], c["seen"])
        x, c["kept"], c["seen"] = _loop("F", both, n_f, lambda i, v: self.forward(q, i, *v), v)
        if "B" in self.at_all:
            d_y, c["total"] = _loop(
                "B",
                both,
                n_whole,
                lambda i, v: self.whole(q, self.read(q, c["kept"], i)[0], i, *v),
                (d_y, c["total"]),
            )
        if "X" in self.at_all:
            v = (d_y, c["late"], c["total"])
            d_y, c["late"], c["total"] = _loop(
                "X", begun, n_b - n_whole, lambda i, v: self.inputs(q, c["kept"], i, *v), v
            )
        return x, d_y

    def forward(self, q: dict, i, x, kept, seen):
        layer = q["f_chunk"] * self.most + i
        micro = _at(self.micros, q["f_micro"])
        y, saved, noticed = self.parts.forward(_at(self.weights, layer), x, micro)
        total = self.parts.join(_at(seen, layer), noticed)
        return y, _put(kept, saved, q["f_kept"], i), _put(seen, total, layer)

    def read(self, q: dict, kept, i):
        """What the last layer but i has kept, and all, to which may be written now."""
        inner = self.count[q["b_chunk"]] - 1 - i
        return lax.optimization_barrier((_at(kept, q["b_kept"], inner), kept))

    def tied(self, tree, i):
        """The same, but different in every turn of a loop, for all that a compiler knows.

        Work that is the same in all turns is moved out of a loop, and would run in every tick. With
        more than one layer in a stage, what is read differs from turn to turn.
        """
        if self.most > 1:
            return tree
        return jax.tree.map(lambda x: jnp.where(i < 0, jnp.zeros_like(x), x), tree)

    def backward(self, q: dict, saved, i, d_y, total):
        """Of the last layer but i: gradient of its input, `total` with those that come at once,
        what those of its products need, number within its stage, and among the rank's layers."""
        inner = self.count[q["b_chunk"]] - 1 - i
        layer = q["b_chunk"] * self.most + inner
        d_x, grads, late = self.parts.backward(_at(self.weights, layer), self.tied(saved, i), d_y)
        return d_x, _add(total, grads, layer), late, inner, layer

    def whole(self, q: dict, saved, i, d_y, total):
        """B: with all gradients of the weights."""
        d_x, total, late, _, layer = self.backward(q, saved, i, d_y, total)
        return d_x, _add(total, self.parts.late(late), layer)

    def inputs(self, q: dict, kept, i, d_y, lates, total):
        """X: those of products wait."""
        saved, _ = self.read(q, kept, i)
        d_x, total, late, inner, _ = self.backward(q, saved, i, d_y, total)
        return d_x, _put(lates, late, q["b_late"], inner), total

    def first_backward(self, c: dict, q: dict, d_x: jax.Array):
        micro = _at(self.micros, q["b_micro"])

        def leave(shared):
            return (_add(shared, self.parts.first_backward(d_x, micro)),)

        leaves = (q["b_on"] == 1) & (q["b_first"] == 1)
        (c["shared"],) = _branch("first_backward", leaves, leave, c["shared"])

    def send(self, c: dict, q: dict, x: jax.Array, d_y: jax.Array):
        """Put what arrives at the end of the tick where it waits."""
        arrived = _exchange(self.table, x, d_y) | {"x_self": x, "g_self": d_y, "g_end": x}
        for name, what in arrived.items():
            if self.table.used(name):
                waiting = c[name[0]]
                place = jnp.where(q[name] < 0, waiting.shape[0] - 1, q[name])
                c[name[0]] = lax.dynamic_update_index_in_dim(waiting, what, place, 0)


def _loop(name: str, start, stop, body: Callable, carry):
    """`fori_loop` under the name that `turns` has for it."""
    with jax.named_scope(SCOPE + name):
        return lax.fori_loop(start, stop, body, carry)


def _branch(name: str, wanted: jax.Array, fn: Callable, *carry) -> tuple:
    """fn(*carry) if it is wanted, else the carry, under the name that `turns` has for it."""
    with jax.named_scope(SCOPE + name):
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
        y, kept, seen = parts.forward(weights, x, micro)
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
