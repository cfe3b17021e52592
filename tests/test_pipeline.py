"""The pipeline's loop with a toy of layers: every schedule gives what the plain program gives.

Float32; gradients agree to 2e-6 of the largest number of each (sums in another order).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.aot import hlo, pipeline
from sharding.mesh import BATCH, REPLICATED, make_mesh, manual_region, parse_mesh
from sharding.pipeline import StageFns, run_pipeline
from sharding.schedules import NAMES, make_schedule
from sharding.ticks import layers_of_ranks, make_tick_table, trip_counts

OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
N_LAYERS, WIDTH, HIDDEN, VOCAB, ROWS, LENGTH = 9, 8, 12, 16, 4, 6


def numbers():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[-2])).astype(np.float32)

    layers = {
        "scale": 1 + 0.1 * normal(N_LAYERS, WIDTH),
        "up": normal(N_LAYERS, WIDTH, HIDDEN),
        "down": normal(N_LAYERS, HIDDEN, WIDTH),
    }
    return layers, {"table": normal(VOCAB, WIDTH)}


def shuffle(x, swap: bool):
    """Rows to the other ranks and back again: an exchange in the middle of a layer."""
    return lax.all_to_all(x, "rank", 0, 0, tiled=True) if swap else x


def layer(w, x, swap):
    """Returns y, and the mean of its hidden layer."""
    h = jnp.tanh((x * w["scale"][None, None]) @ w["up"])
    return x + shuffle(shuffle(h, swap) ** 2, swap) @ w["down"], {"mean": h.mean()}


def loss(table, x, labels):
    logits = jnp.einsum("btd,vd->btv", x, table)
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - picked).sum()


def stage_fns_of(shared, swap) -> StageFns:
    def forward(w, x, micro):
        h = jnp.tanh((x * w["scale"][None, None]) @ w["up"])
        y, aux = layer(w, x, swap)
        return y, (x, h), aux

    def backward(w, residuals, d_y):
        x, h = residuals
        squared = shuffle(h, swap) ** 2
        d_h = shuffle(shuffle(d_y @ w["down"].T, swap) * 2 * shuffle(h, swap), swap)
        d_h = d_h * (1 - h**2)
        d_scaled = d_h @ w["up"].T
        operands = (x * w["scale"][None, None], d_h, shuffle(squared, swap), d_y)
        return (
            d_y + d_scaled * w["scale"][None, None],
            {"scale": (d_scaled * x).sum((0, 1))},
            operands,
        )

    def wgrad(operands):
        scaled, d_h, squared, d_y = operands
        return {
            "up": jnp.einsum("btd,btf->df", scaled, d_h),
            "down": jnp.einsum("btf,btd->fd", squared, d_y),
        }

    def head_and_loss(x, micro):
        fn = jax.value_and_grad(loss, (0, 1))
        value, (d_table, d_x) = fn(shared["table"], x, micro[:, 1:])
        return d_x, {"table": d_table}, {"loss": value}

    def embed(micro):
        return shared["table"][micro[:, :-1]]

    def embed_backward(d_x, micro):
        return {"table": jnp.zeros((VOCAB, WIDTH)).at[micro[:, :-1]].add(d_x)}

    add = functools.partial(jax.tree.map, jnp.add)
    return StageFns(embed, forward, head_and_loss, backward, wgrad, embed_backward, add)


def sizes_of(n_stages: int) -> list[int]:
    """Uneven, with an empty stage at the end where there are many."""
    sizes = [N_LAYERS // n_stages] * n_stages
    for extra in range(N_LAYERS % n_stages):
        sizes[(extra * 2 + 1) % n_stages] += 1
    return sizes


@functools.cache
def program(name: str, n_ranks: int, n_micro: int, ep: int = 1):
    """The compiled step, of whole weights, and its table."""
    table = make_tick_table(make_schedule(name, n_ranks, n_micro))
    sizes = sizes_of(table.stages.n_stages)
    mesh = make_mesh(parse_mesh(f"pp{n_ranks},ep{ep}"), jax.devices()[: n_ranks * ep])
    return jax.jit(functools.partial(step, table, sizes, mesh)), table


def step(table, sizes, mesh, layers, shared, micros):
    where = layers_of_ranks(table, sizes).reshape(table.stages.n_ranks, -1)

    def shard(layers, shared, micros):
        mine = jnp.asarray(where)[lax.axis_index("pp")]
        weights = jax.tree.map(lambda a: a.at[mine].get(mode="fill", fill_value=jnp.nan), layers)
        result = run_pipeline(
            table, sizes, stage_fns_of(shared, mesh.shape["rank"] > 1), weights, micros
        )

        def home(a):
            return jnp.zeros((N_LAYERS, *a.shape[1:]), a.dtype).at[mine].add(a, mode="drop")

        whole = (jax.tree.map(home, result.layer_grads), result.shared_grads)
        return lax.psum((result.head_aux, jax.tree.map(home, result.aux), *whole), ("pp", "rank"))

    batch = PartitionSpec(None, *BATCH)
    specs = (PartitionSpec(), PartitionSpec(), batch)
    return manual_region(shard, mesh, specs, PartitionSpec())(layers, shared, micros)


def tokens(n_micro: int) -> np.ndarray:
    shape = (n_micro, ROWS, LENGTH + 1)
    return np.random.default_rng(n_micro).integers(0, VOCAB, shape).astype(np.int32)


@functools.cache
def plain(n_micro: int):
    """Loss, means, and gradients of one program without a pipeline."""

    def total(layers, shared):
        x, seen = shared["table"][tokens(n_micro)[:, :, :-1]], []
        for i in range(N_LAYERS):
            x, noticed = jax.vmap(lambda x, i=i: layer(jax.tree.map(lambda a: a[i], layers), x, 0))(
                x
            )
            seen.append(noticed["mean"].sum())
        value = jax.vmap(functools.partial(loss, shared["table"]))(x, tokens(n_micro)[:, :, 1:])
        return value.sum(), (value.sum(), jnp.stack(seen))

    grads, (value, means) = jax.jit(jax.grad(total, (0, 1), has_aux=True))(*numbers())
    return jax.tree.map(np.asarray, (value, means, *grads))


def assert_equals_plain(got, n_micro: int, ep: int):
    value, means, layers, shared = plain(n_micro)
    np.testing.assert_allclose(got[0]["loss"], value, rtol=2e-6)
    np.testing.assert_allclose(got[1]["mean"] / ep, means, rtol=0, atol=2e-6 * n_micro)
    for want, found in ((layers, got[2]), (shared, got[3])):
        for name, grad in want.items():
            error = np.abs(np.asarray(found[name]) - grad).max()
            assert error <= 2e-6 * np.abs(grad).max(), f"{name}: off by {error}"


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_plain_program(name):
    fn, _ = program(name, 4, 8, 2)
    assert_equals_plain(fn(*numbers(), tokens(8)), 8, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_ranks, n_micro, ep", [(2, 6, 1), (2, 4, 2), (4, 16, 1), (8, 16, 1)])
def test_equals_the_plain_program_in_more_shapes(name, n_ranks, n_micro, ep):
    fn, _ = program(name, n_ranks, n_micro, ep)
    assert_equals_plain(fn(*numbers(), tokens(n_micro)), n_micro, ep)


def test_deferring_no_wgrad_changes_nothing():
    table = make_tick_table(make_schedule("dualpipe", 4, 8, max_deferred_wgrads=0))
    mesh = make_mesh(parse_mesh("pp4"), jax.devices()[:4])
    found = jax.jit(functools.partial(step, table, sizes_of(4), mesh))(*numbers(), tokens(8))
    assert table.n_operands == 0
    assert_equals_plain(found, 8, 1)


def test_trip_counts_are_those_of_all_layers():
    """Every micro-batch passes every layer once each way, in whatever way."""
    for name in NAMES:
        table = make_tick_table(make_schedule(name, 2, 6))
        sizes = sizes_of(table.stages.n_stages)
        count = {part: n.sum() for part, n in trip_counts(table, sizes).items()}
        assert count["F_BW"] + count["F"] == 6 * N_LAYERS
        assert count["F_BW"] + count["BW"] + count["B"] == 6 * N_LAYERS
        assert count["W"] == count["B"]
        assert count["embed"] == count["head_and_loss"] == count["embed_backward"] == 6


def test_a_layer_must_keep_its_shape():
    stage_fns = stage_fns_of({"table": jnp.ones((VOCAB, WIDTH))}, False)
    wider = stage_fns._replace(forward=lambda w, x, micro: (jnp.concatenate([x, x]), (), {}))
    table, mesh = (
        make_tick_table(make_schedule("gpipe", 2, 2)),
        make_mesh(parse_mesh("pp2"), jax.devices()[:2]),
    )
    layers = jax.tree.map(lambda a: a[:5], numbers()[0])

    def shard(layers, micros):
        return run_pipeline(table, [5, 4], wider, layers, micros).head_aux

    with pytest.raises(TypeError, match="must keep shape and type"):
        jax.eval_shape(
            manual_region(shard, mesh, (REPLICATED, REPLICATED), REPLICATED), layers, tokens(2)
        )


@pytest.mark.parametrize("sizes", [[1, 1, 1, 6], [1, 1, 1, 1]])
@pytest.mark.parametrize("name", ["zb1p", "dualpipe"])
def test_idle_ranks_compute_nothing(name, sizes):
    """In the optimized program all products stand in loops and branches of their own."""
    table, mesh = (
        make_tick_table(make_schedule(name, 4, 8)),
        make_mesh(parse_mesh("pp4"), jax.devices()[:4]),
    )
    program = jax.jit(functools.partial(step, table, sizes, mesh))
    module = hlo.parse(program.lower(*numbers(), tokens(8)).compile(OPTIMIZED).as_text())
    parts = pipeline.tick_parts(module)
    assert set(parts) == {part for part, n in trip_counts(table, sizes).items() if n.any()}
    ends = ("embed", "head_and_loss", "embed_backward")
    for part, instruction in parts.items():
        assert instruction.opcode == ("conditional" if part in ends else "while"), part
    found = [*where_products_run(module, module.entry, ())]
    assert len(found) > 6
    assert all(any(pipeline.PART.search(name) for name in path) for path in found), found


def where_products_run(module, computation: str, path: tuple):
    """The op_names of all that encloses each product."""
    for instruction in module.computations[computation].instructions:
        if instruction.opcode == "dot":
            yield path
        inside = [*instruction.called]
        if instruction.opcode == "while":
            inside = [instruction.attribute("body").lstrip("%")]
        elif instruction.opcode in ("call", "fusion"):
            inside = [instruction.attribute("to_apply") or instruction.attribute("calls")]
        for inner in inside:
            yield from where_products_run(module, inner.lstrip("%"), (*path, instruction.op_name))
