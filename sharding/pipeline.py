"""Pipeline parallelism as one loop: `lax.scan` over the ticks of any schedule.

**One program, many schedules.** A schedule is data: a table of int32 numbers [ticks, ranks, fields]
(sharding/ticks.py), made ahead of time. The loop's body runs any row of it: receive, forward,
backward for the input (B), backward for the weights (W), send. So GPipe, 1F1B, ZB1P, DualPipe and
DualPipeV are five tables for one piece of code, and the compiler sees each layer a few times,
however many micro-batches and stages there are.

**Trip counts instead of branches.** Inside a tick each kind of work is a `fori_loop` over the
layers of a stage, whose trip count comes from the row: the rank's number of layers if it has such
work, 0 if not. A rank that waits therefore computes nothing (a masked computation would cost as
much as a real one), and stages may be uneven or empty, although all ranks run the same program.

**Forward and backward are written out.** The loop is never differentiated, since the order of
forwards and backwards is what a schedule decides. F leaves residuals in a buffer, B takes them and
leaves the operands of the weight gradients (its input and its output gradient) in another buffer,
and W multiplies those when the schedule has time for it (report sec. 3.2.1). BW does both at once.
The table says which entry of each buffer to use.

**Side by side.** Where a rank has an F and a BW, one iteration of a loop runs a layer of each. They
don't depend on each other, so a compiler lays the token exchange of one beside the matmuls of the
other: that is the purpose of DualPipe.

All of this runs inside the manual region, on one device's shards. It knows no model: `StageFns` are
the functions of a stage.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding.ticks import FIELDS, TickTable, layers_of_ranks, trip_counts

PyTree = Any
Gradients = dict[str, jax.Array]

SCOPE = "pipeline_"  # starts the named scope of every part of a tick, for who reads the program


class StageFns(NamedTuple):
    """The functions that a tick runs; they close over all weights but the layers'.

    Gradients are dicts by parameter name, of which a function may return some or none. They are
    summed over micro-batches in float32. `aux` is any further output, summed by `add_aux`.
    "Shared" weights are those of embedding and head, of which each rank has a copy.
    """

    embed: Callable
    """micro -> x: the input of the first layer. In F, on the rank of the first stage."""
    forward: Callable
    """(weights, x, micro) -> (y, residuals, aux): one layer. In F, for each layer of the stage."""
    head_and_loss: Callable
    """(x, micro) -> (d_x, shared gradients, aux): both directions at once, from the last layer's
    output to its gradient. Before B or BW, on the rank of the last stage."""
    backward: Callable
    """(weights, residuals, d_y) -> (d_x, gradients, operands): one layer's B. In B and BW.
    `gradients` has those weights whose gradient is not deferred."""
    wgrad: Callable
    """operands -> gradients: one layer's W. In W, and in BW right after `backward`."""
    embed_backward: Callable
    """(d_x, micro) -> shared gradients: after B or BW, on the rank of the first stage."""
    add_aux: Callable
    """(aux, aux) -> aux: of two micro-batches, or of nothing (zeros) and one."""


class PipelineResult(NamedTuple):
    """Sums over all micro-batches that a rank has worked on."""

    layer_grads: Gradients  # [S ...], of the layers of the rank
    shared_grads: Gradients
    aux: PyTree  # [S ...], of the layers of the rank
    head_aux: PyTree


def run_pipeline(
    table: TickTable, sizes: list[int], stage_fns: StageFns, weights, micros
) -> PipelineResult:
    """Run forward and backward of all micro-batches.

    Args:
        sizes: layers of every stage.
        weights: [S ...] of the rank's layers in the order of `layers_of_ranks`, chunk by chunk;
            what stands past the last layer of a stage is not read.
        micros: [M ...] input of every micro-batch, on all ranks.
    """
    rank = lax.axis_index("pp")
    counts = (layers_of_ranks(table, sizes) < sum(sizes)).sum(-1)  # [ranks chunks]
    used_ops = frozenset(name for name, n in trip_counts(table, sizes).items() if n.any())
    count = jnp.asarray(counts, jnp.int32)[rank]
    tick = _Tick(table, stage_fns, weights, micros, count, max(sizes), used_ops)
    shapes = _shapes(stage_fns, _at(weights, 0), _at(micros, 0))
    zeros = _zeros(shapes, table, jax.tree.leaves(weights)[0].shape[0], max(sizes))
    carry, _ = lax.scan(tick.run, zeros, jnp.asarray(table.rows)[:, rank])
    return PipelineResult(
        carry["layer_grads"], carry["shared_grads"], carry["aux"], carry["head_aux"]
    )


class _Tick(NamedTuple):
    """The body of the loop.

    In its methods `c` is the carry, a dict of buffers and sums (see `_zeros`), which a tick
    replaces entry by entry; `row` is the rank's row of the table by field.
    """

    table: TickTable
    fns: StageFns
    weights: PyTree
    micros: PyTree
    count: jax.Array  # layers of each chunk of this rank
    largest: int  # layers of the largest stage
    used_ops: frozenset[str]  # parts that any rank ever runs

    def run(self, carry: dict, row: jax.Array) -> tuple[dict, None]:
        row, c = dict(zip(FIELDS, row, strict=True)), dict(carry)
        begun = self.wgrads(c, row)
        x, d_y = self.layers(c, row, self.input_of_f(c, row), self.input_of_b(c, row), begun)
        self.embed_backward(c, row, d_y)
        self.send(c, row, x, d_y)
        return c, None

    def wgrads(self, c: dict, row: dict) -> jax.Array:
        """Run W. Returns 0 that depends on it: nothing is to be sent before W is done."""
        if "W" not in self.used_ops:
            return jnp.int32(0)

        def body(i, v):
            total, done = v
            operands = self.tied(_at(c["operands"], row["w_operands"], i), i)
            grads = self.fns.wgrad(operands)
            return _add(total, grads, row["w_chunk"] * self.largest + i), done + 1

        n = jnp.where(row["w_on"] == 1, self.count[row["w_chunk"]], 0)
        c["layer_grads"], done = _loop("W", 0, n, body, (c["layer_grads"], jnp.int32(0)))
        return done - n

    def input_of_f(self, c: dict, row: dict) -> jax.Array:
        """Return the arrived activations, or the embedding in the first stage."""
        micro = _at(self.micros, row["f_micro"])

        def embed(x):
            return (self.fns.embed(micro).astype(x.dtype),)

        wanted = (row["f_on"] == 1) & (row["f_first"] == 1)
        return _branch("embed", wanted, embed, _at(c["x"], row["f_in"]))[0]

    def input_of_b(self, c: dict, row: dict) -> jax.Array:
        """Return the arrived gradient, or that of the loss by the last layer's output."""
        micro = _at(self.micros, row["b_micro"])

        def head_and_loss(h, shared_grads, head_aux):
            d_h, grads, aux = self.fns.head_and_loss(h, micro)
            return (
                d_h.astype(h.dtype),
                _add(shared_grads, grads),
                self.fns.add_aux(head_aux, aux),
            )

        wanted = (row["b_on"] == 1) & (row["b_last"] == 1)
        v = (_at(c["g"], row["b_in"]), c["shared_grads"], c["head_aux"])
        d_y, c["shared_grads"], c["head_aux"] = _branch("head_and_loss", wanted, head_and_loss, *v)
        return d_y

    def layers(self, c: dict, row: dict, x, d_y, begun) -> tuple[jax.Array, jax.Array]:
        """Take x through the layers of F and d_y back through those of B or BW."""
        n_f = jnp.where(row["f_on"] == 1, self.count[row["f_chunk"]], 0)
        n_b = jnp.where(row["b_on"] == 1, self.count[row["b_chunk"]], 0)
        n_bw = jnp.where(row["b_defers"] == 1, 0, n_b)
        both = begun

        def side_by_side(i, v):
            x, d_y, buffer, aux, total = v
            residuals, buffer = self.read(row, buffer, i)
            d_y, total = self.backward_with_wgrad(row, residuals, i, d_y, total)
            x, buffer, aux = self.forward(row, i, x, buffer, aux)
            return x, d_y, buffer, aux, total

        def bw(i, v):
            residuals, _ = self.read(row, c["residuals"], i)
            return self.backward_with_wgrad(row, residuals, i, *v)

        if "F_BW" in self.used_ops:
            both = begun + jnp.where(row["fused"] == 1, jnp.minimum(n_f, n_bw), 0)
            v = (x, d_y, c["residuals"], c["aux"], c["layer_grads"])
            v = _loop("F_BW", begun, both, side_by_side, v)
            x, d_y, c["residuals"], c["aux"], c["layer_grads"] = v
        v = (x, c["residuals"], c["aux"])
        v = _loop("F", both, n_f, lambda i, v: self.forward(row, i, *v), v)
        x, c["residuals"], c["aux"] = v
        if "BW" in self.used_ops:
            d_y, c["layer_grads"] = _loop("BW", both, n_bw, bw, (d_y, c["layer_grads"]))
        if "B" in self.used_ops:
            v = (d_y, c["operands"], c["layer_grads"])
            d_y, c["operands"], c["layer_grads"] = _loop(
                "B",
                begun,
                n_b - n_bw,
                lambda i, v: self.backward_deferring(row, c["residuals"], i, *v),
                v,
            )
        return x, d_y

    def forward(self, row: dict, i, x, buffer, aux):
        """Run layer i of F; `buffer` receives its residuals."""
        layer = row["f_chunk"] * self.largest + i
        micro = _at(self.micros, row["f_micro"])
        y, residuals, new = self.fns.forward(_at(self.weights, layer), x, micro)
        total = self.fns.add_aux(_at(aux, layer), new)
        return y, _put(buffer, residuals, row["f_residuals"], i), _put(aux, total, layer)

    def read(self, row: dict, buffer, i):
        """Return the residuals of layer i from the end, and the buffer, free to be written now."""
        inner = self.count[row["b_chunk"]] - 1 - i
        return lax.optimization_barrier((_at(buffer, row["b_residuals"], inner), buffer))

    def tied(self, tree, i):
        """Return the same, made to depend on the iteration for all that a compiler knows.

        Work that is the same in all iterations is moved out of a loop, and would run in every tick.
        With several layers per stage, what is read differs from iteration to iteration anyway.
        """
        if self.largest > 1:
            return tree
        return jax.tree.map(lambda x: jnp.where(i < 0, jnp.zeros_like(x), x), tree)

    def backward(self, row: dict, residuals, i, d_y, total):
        """Run B of layer i from the end.

        Returns:
            d_x, `total` with the gradients that are not deferred, the wgrad operands, and the
            layer's number in its stage and among the rank's layers.
        """
        inner = self.count[row["b_chunk"]] - 1 - i
        layer = row["b_chunk"] * self.largest + inner
        residuals = self.tied(residuals, i)
        d_x, grads, operands = self.fns.backward(_at(self.weights, layer), residuals, d_y)
        return d_x, _add(total, grads, layer), operands, inner, layer

    def backward_with_wgrad(self, row: dict, residuals, i, d_y, total):
        """Run BW of layer i from the end."""
        d_x, total, operands, _, layer = self.backward(row, residuals, i, d_y, total)
        return d_x, _add(total, self.fns.wgrad(operands), layer)

    def backward_deferring(self, row: dict, buffer, i, d_y, operands, total):
        """Run B of layer i from the end, and keep the operands for W."""
        residuals, _ = self.read(row, buffer, i)
        d_x, total, new, inner, _ = self.backward(row, residuals, i, d_y, total)
        return d_x, _put(operands, new, row["b_operands"], inner), total

    def embed_backward(self, c: dict, row: dict, d_x: jax.Array):
        micro = _at(self.micros, row["b_micro"])

        def embed_backward(shared_grads):
            return (_add(shared_grads, self.fns.embed_backward(d_x, micro)),)

        wanted = (row["b_on"] == 1) & (row["b_first"] == 1)
        (c["shared_grads"],) = _branch("embed_backward", wanted, embed_backward, c["shared_grads"])

    def send(self, c: dict, row: dict, x: jax.Array, d_y: jax.Array):
        """Put what arrives at the end of the tick into the buffers where it waits."""
        arrivals = _exchange(self.table, x, d_y) | {"x_self": x, "g_self": d_y, "g_end": x}
        for name, value in arrivals.items():
            if self.table.arrives(name):
                buffer = c[name[0]]
                entry = jnp.where(row[name] < 0, buffer.shape[0] - 1, row[name])
                c[name[0]] = lax.dynamic_update_index_in_dim(buffer, value, entry, 0)


def _loop(name: str, start, stop, body: Callable, carry):
    """Run a `fori_loop` under the name that `trip_counts` has for it."""
    with jax.named_scope(SCOPE + name):
        return lax.fori_loop(start, stop, body, carry)


def _branch(name: str, wanted: jax.Array, fn: Callable, *carry) -> tuple:
    """Return fn(*carry) if wanted, else the carry, under the name that `trip_counts` has for it."""
    with jax.named_scope(SCOPE + name):
        return lax.cond(wanted, fn, lambda *carry: carry, *carry)


def _exchange(table: TickTable, x: jax.Array, d_y: jax.Array) -> dict[str, jax.Array]:
    """Return what the ranks before and after have sent, each in one message."""
    n_ranks, arrived = table.stages.n_ranks, {}
    shifts = {"down": 1, "up": -1}
    for direction, shift in shifts.items():
        names = [kind for kind in ("x", "g") if table.arrives(f"{kind}_{direction}")]
        pairs = [(r, r + shift) for r in range(n_ranks) if 0 <= r + shift < n_ranks]
        message = jnp.stack([x, d_y])  # of both, so that it leaves when all is done
        if names:
            message = lax.ppermute(message, "pp", pairs)
        arrived |= {f"{kind}_{direction}": message["xg".index(kind)] for kind in names}
    return arrived


def _shapes(fns: StageFns, weights, micro) -> dict:
    """Return the shapes of all that the loop carries, for one layer or micro-batch."""

    def trace(weights, micro):
        x = fns.embed(micro)
        y, residuals, aux = fns.forward(weights, x, micro)
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            raise TypeError(
                f"a layer must keep shape and type of its input: {x.shape} {x.dtype} became "
                f"{y.shape} {y.dtype}"
            )
        d_x, shared_grads, head_aux = fns.head_and_loss(y, micro)
        d_x, grads, operands = fns.backward(weights, residuals, d_x.astype(x.dtype))
        return {
            "x": x,
            "residuals": residuals,
            "operands": operands,
            "aux": aux,
            "head_aux": head_aux,
            "layer_grads": grads | fns.wgrad(operands),
            "shared_grads": fns.embed_backward(d_x, micro) | shared_grads,
        }

    return jax.eval_shape(trace, weights, micro)


def _zeros(shapes: dict, table: TickTable, n_layers: int, largest: int) -> dict:
    """Return the carry that the loop begins with.

    The buffers `x` and `g` have an entry more, for arrivals that nobody wants.
    """

    def zeros(tree, *lead, dtype=None):
        return jax.tree.map(lambda s: jnp.zeros((*lead, *s.shape), dtype or s.dtype), tree)

    carry = {
        "x": zeros(shapes["x"], table.n_x + 1),
        "g": zeros(shapes["x"], table.n_g + 1),
        "residuals": zeros(shapes["residuals"], table.n_residuals, largest),
        "aux": zeros(shapes["aux"], n_layers),
        "head_aux": zeros(shapes["head_aux"]),
        "layer_grads": zeros(shapes["layer_grads"], n_layers, dtype=jnp.float32),
        "shared_grads": zeros(shapes["shared_grads"], dtype=jnp.float32),
    }
    if table.n_operands:
        carry["operands"] = zeros(shapes["operands"], table.n_operands, largest)
    return carry


def _at(tree, *index):
    """Return the entries at these leading indices of all arrays."""

    def one(a: jax.Array) -> jax.Array:
        sizes = (1,) * len(index) + a.shape[len(index) :]
        start = (*index, *(0,) * (a.ndim - len(index)))
        return lax.dynamic_slice(a, start, sizes).reshape(a.shape[len(index) :])

    return jax.tree.map(one, tree)


def _put(tree, values, *index):
    """Return all arrays with these entries at these leading indices."""

    def one(a: jax.Array, value) -> jax.Array:
        value = jnp.asarray(value, a.dtype).reshape((1,) * len(index) + value.shape)
        return lax.dynamic_update_slice(a, value, (*index, *(0,) * (a.ndim - len(index))))

    return jax.tree.map(one, tree, values)


def _add(total: Gradients, grads: Gradients, *index) -> Gradients:
    """Add gradients in float32 to those of the same names, at these leading indices."""
    new = {}
    for name, grad in grads.items():
        grad = grad.astype(jnp.float32)
        old = _at(total[name], *index) if index else total[name]
        new[name] = _put(total[name], old + grad, *index) if index else old + grad
    return total | new
