"""Simulations of scheduled programs: collectives, what hides them, memory, a real TPU target."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from reference.hlo_text import compiled, module_of, nested, one, simulate

from dsv3_jax.aot import collectives, hlo, loops, memory, op_cost, simulator, timeline

# Collectives


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,2},{1,3}}, x", (0, 2)),
        ("{}, x", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("[2,4]<=[8], x", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("mesh['x'=2,'y'=4] {'y'}, x", (0, 1, 2, 3)),
        ("mesh['x'=2,'y'=4] {'x'}, x", (0, 4)),
        ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}, x", (0, 1, 4, 5)),
        ("mesh['y'=8] {'y':(2)2}, x", (0, 2)),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}, x", (0, 1, 2, 3)),
        ("mesh[x=2,y=2], device_ids=(0,2,1,3) {y}, x", (0, 2)),
    ],
)
def test_replica_groups_in_every_notation(groups, members):
    assert collectives.first_group(f", replica_groups={groups}", 8) == members


def test_mesh_axes_of_a_group():
    sizes = {"pp": 1, "dp": 2, "node": 2, "rank": 2}
    assert collectives.mesh_axes((0, 4), sizes) == ("dp",)
    assert collectives.mesh_axes((0, 1, 2, 3), sizes) == ("node", "rank")
    assert collectives.mesh_axes((3,), sizes) == ()


def test_compiled_collectives():
    mesh = jax.make_mesh((2, 4), ("dp", "ep"), axis_types=(AxisType.Auto,) * 2)

    def shard(x):  # [16 8] a device
        y = jax.lax.all_gather(x, "ep", axis=0, tiled=True)
        around = jax.lax.ppermute(x, "ep", [(i, (i + 1) % 4) for i in range(4)])
        back = jax.lax.psum_scatter(y, "ep", tiled=True)
        return (
            jax.lax.psum(y, "dp").sum()
            + around
            + back
            + jax.lax.all_to_all(x, "ep", 0, 0, tiled=True)
        )

    spec = P(("dp", "ep"))
    fn = jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    found = simulate(compiled(fn, jnp.ones((128, 8)))).collectives
    size, sizes = 16 * 8 * 4, {"dp": 2, "ep": 4}
    axes = {e.collective.kind: collectives.mesh_axes(e.collective.members, sizes) for e in found}
    assert axes.pop("all-reduce") == ("dp",) and set(axes.values()) == {("ep",)}
    assert {e.collective.kind: e.collective.payload for e in found} == {
        "all-gather": 3 * size,
        "reduce-scatter": 3 * size,
        "all-reduce": 4 * size,
        "all-to-all": 3 / 4 * size,
        "collective-permute": size,
    }
    assert not any(timed.asynchronous for timed in found)


STEP = """%{name} (g: f32[2]) -> {shape} {{
  %g = f32[2] parameter(0)
  %ag.{name} = f32[8] all-gather(%g), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}
  ROOT %out = {shape} {root}
}}
"""  # noqa: E501


def test_an_async_fusion_is_one_collective():
    call = 'custom-call(%ag.{0}), custom_call_target="AsyncCollective{1}"'
    others = STEP.format(name="one", shape="(f32[2], f32[8])", root=call.format("one", "Start"))
    others += STEP.format(name="two", shape="f32[8]", root="negate(%ag.two)")
    others += STEP.format(name="three", shape="f32[8]", root=call.format("three", "Done"))
    text = """%p = f32[2] parameter(0)
    %begin = (f32[2], f32[8]) fusion(%p), kind=kCustom, calls=%one
    %part = f32[2] get-tuple-element(%begin), index=0
    %step = f32[8] fusion(%part), kind=kOutput, calls=%two
    ROOT %end = f32[8] fusion(%step), kind=kCustom, calls=%three"""
    found = simulate(module_of(text, others)).collectives
    assert [(e.name, e.asynchronous, e.collective.payload) for e in found] == [
        ("begin", True, 8 * 4 * 3 / 4)
    ]


def test_a_sparse_core_call_starts_where_it_gets_operands():
    others = """%called (x: f32[8]) -> f32[2] {
  %x = f32[8] parameter(0)
  ROOT %rs = f32[2] reduce-scatter(%x), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}
%wrapped (y: f32[8]) -> f32[2] {
  %y = f32[8] parameter(0)
  ROOT %cc = f32[2] custom-call(%y), custom_call_target="TODO", called_computations={%called}
}, execution_thread="sparsecore"
"""
    text = """%p = f32[8] parameter(0)
    %load = ((), (), (s32[4])) async-start(), async_execution_thread="sparsecore", calls=%wrapped
    %busy = f32[8] negate(%p)
    %go = ((f32[8]), f32[2], (s32[4])) async-update(%load, %p)
    ROOT %end = f32[2] async-done(%go)"""
    simulation = simulate(module_of(text, others))
    (timed,) = simulation.collectives
    assert (timed.name, timed.collective.kind, timed.asynchronous) == (
        "go", "reduce-scatter", True,
    )  # fmt: skip
    assert simulation.makespan == 64 + timed.collective.payload  # none of it beside %busy


def test_a_ragged_all_to_all_sends_the_smaller_side_and_a_sliced_sum_is_a_scatter():
    module, computation, ragged = one("""%x = bf16[16,4] parameter(0)
    %out = bf16[64,4] parameter(1)
    %n = s32[4] parameter(2)
    ROOT %r = bf16[64,4] ragged-all-to-all(%x, %out, %n, %n, %n, %n), replica_groups={{0,1,2,3}}""")
    assert collectives.collective(module, computation, ragged).payload == 16 * 4 * 2 * 3 / 4
    others = """%all-reduce-scatter.1 (x: f32[8]) -> f32[2] {
  %x = f32[8] parameter(0)
  %ar = f32[8] all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %cut = f32[2] dynamic-slice(%ar, %i), dynamic_slice_sizes={2}
}"""
    text = """%p = f32[8] parameter(0)
    ROOT %f = f32[2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"""
    (timed,) = simulate(module_of(text, others)).collectives
    assert timed.collective.kind == "reduce-scatter" and not timed.asynchronous
    assert timed.collective.payload == 8 * 4 * 3 / 4


# Overlap: an array of 8 floats takes 64 s to negate and 24 s to gather from 4


@pytest.mark.parametrize(
    ("lines", "makespan", "exposed"),
    [
        ("start, negate, done", 64, 0),
        ("start, done, negate", 64 + 24, 24),
        ("sync, negate", 64 + 24, 24),
        ("start, start2, done, done2, negate", 64 + 48, 48),  # the link takes one at a time
        ("start, start2, done, negate, done2", 64 + 24, 24),
        ("start, sync, negate, done", 64 + 48, 48),  # the second waits for the first
    ],
)
def test_makespans(lines, makespan, exposed):
    groups = "replica_groups={{0,1,2,3}}, dimensions={0}"
    known = {
        "start": f"%s = (f32[2], f32[8]) all-gather-start(%p), {groups}",
        "done": "%d = f32[8] all-gather-done(%s)",
        "start2": f"%s2 = (f32[2], f32[8]) all-gather-start(%p), {groups}",
        "done2": "%d2 = f32[8] all-gather-done(%s2)",
        "sync": f"%g = f32[8] all-gather(%p), {groups}",
        "negate": "%n = f32[8] negate(%q)",
    }
    body = "\n".join(known[line] for line in lines.split(", "))
    simulation = simulate(module_of(f"%p = f32[2] parameter(0)\n%q = f32[8] parameter(1)\n{body}"))
    assert (simulation.makespan, simulation.compute) == (makespan, 64)
    assert simulation.exposed_share == exposed / simulation.communication
    assert simulation.covered_share == 1 - simulation.exposed_share
    kind = simulation.by_kind()["all-gather"]
    assert kind["count"] == lines.count("start") + lines.count("sync")
    assert kind["asynchronous"] == lines.count("start")


def test_peak_efficiency_and_fp8():
    machine = simulator.Machine(
        peak_flops=10.0,
        hbm_bandwidth=1.0,
        link_rate=lambda _: 1.0,
        efficiency=0.5,
        fp8_peak_flops=20.0,
    )
    assert machine.seconds(op_cost.OpCost(100.0, 40.0, 3.0)) == (6 + 2) / 0.5
    assert machine.seconds(op_cost.OpCost(1.0, 0.0, 3.0)) == 3


def test_copies_run_beside_compute_and_conditionals_take_the_slowest_branch():
    copy = "%c = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%q)"
    text = f"%q = f32[8]{{0}} parameter(0)\n{copy}\n%n = f32[8]{{0}} negate(%q)\n"
    done = "%d = f32[8]{0:S(1)} copy-done(%c)"
    assert simulate(module_of(text + done)).makespan == 64  # the copy takes 32 of it
    others = "".join(
        f"%b{n} (x: f32[{n}]) -> f32[{n}] {{\n  %x = f32[{n}] parameter(0)\n"
        f"  ROOT %y{n} = f32[{n}] negate(%x)\n}}\n"
        for n in (2, 4)
    )
    text = """%i = s32[] parameter(0)
    ROOT %r = f32[4] conditional(%i, %i, %i), branch_computations={%b2, %b4}"""
    assert simulate(module_of(text, others)).makespan == 32


def test_the_longest_layer_and_its_picture(tmp_path):
    module = compiled(jax.grad(lambda x, w: nested(x, w).sum()), jnp.ones((16, 24)), jnp.ones((5, 24, 24)))  # fmt: skip  # noqa: E501
    trips, _ = loops.trip_counts(module)
    machine = simulator.Machine(peak_flops=1e9, hbm_bandwidth=1e9, link_rate=lambda _: 1e9)
    simulated = simulator.Simulator(module, machine, trips)
    bodies = simulated.layer_bodies()
    assert set(bodies) == {"forward", "backward"}
    events = simulated.computation(bodies["backward"]).events
    assert any(event.kind == "loop" for event in events)
    assert all(a.end <= b.start + 1e-15 for a, b in zip(events, events[1:], strict=False))
    events = [*events, simulator.Event("in flight", 0.0, 1e-5, "s", "all-gather", "all_gather")]
    timeline.draw({"a layer": events, "nothing": []}, tmp_path / "layer.png")
    assert (tmp_path / "layer.png").stat().st_size > 5000


# Memory

LIVE = """HloLiveRange (max 12):
  BufferLiveRange:
    big{}:1-2
  Live ranges at 7 (peak):
    p{}: 32 bytes (cumulative: 32 bytes)
    pair{1}: 64 bytes (cumulative: 96 bytes)
    gone{}: 16 bytes (cumulative: 112 bytes)
  Stack trace breakdown for peak usage: 112 bytes
"""
USAGE = """Memory Space: default (color=0)
Total bytes: 4000000 (3.81MiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    1.00MiB( 50%);    1.00MiB;   4096;                1; f32[512,512]
    1.50MiB( 75%);  512.00KiB;      0;                2; 2×f32[256,512]

  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
  896.00MiB(100%);  896.00MiB;            0;                2; 2×f32[2,4,7168,4096]
"""
ASSIGNMENT = """BufferAssignment:
allocation 0: size 131072, page 0, thread-local:
 value: <3 x @0> (size=131072,offset=0): f32[32768]{0}
allocation 1: size 32, page 0, parameter 0, shape |f32[8]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 100, color 1, page 0, preallocated-temp:
allocation 3: size 96, page 0, preallocated-temp:
allocation 4: size 4, page 0, constant:
allocation 5: size 24, page 0, maybe-live-out:
"""


def test_memory_texts():
    module = module_of("""%p = f32[8]{0} parameter(0), metadata={op_name="state.params[\\'w\\']"}
    ROOT %pair = (f32[8]{0}, f32[16]{0}) fusion(%p), kind=kLoop, calls=%f, metadata={op_name="jit(f)/mul" source_file="a.py" source_line=3}""")  # noqa: E501
    pair, parameter, gone = memory.largest_buffers(module, LIVE, n=3)
    assert (pair.name, pair.n_bytes, pair.shape) == ("pair{1}", 64, "f32[16]")
    assert (pair.what, pair.source, pair.at_peak) == ("jit(f)/mul", "a.py:3", True)
    assert parameter.what == "state.params['w']" and gone.shape == "?"
    first, second = memory.largest_buffers(module, None, USAGE)
    assert (first.n_bytes, first.shape, first.at_peak) == (2**20, "f32[512,512]", False)
    assert second.n_bytes == 2**19
    assert memory.largest_buffers(module, None, None) == []
    assert memory.allocations(ASSIGNMENT) == memory.Allocations(32, 24, 96, 4)


def test_a_program_for_real_tpus(tmp_path, monkeypatch):
    """Compiled for 4 chips of v5p without one: the parsers agree with XLA's own figures."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    for name, value in [
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5p-8"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ]:
        monkeypatch.setenv(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    mesh = jax.sharding.Mesh(topology.devices, ("ep",))

    def shard(x, w):
        def layer(x, w):
            whole = jax.lax.all_gather(w, "ep", axis=0, tiled=True)
            return jax.lax.all_to_all((x @ whole).reshape(4, -1, 512), "ep", 0, 0).reshape(
                x.shape
            ), None

        return jax.lax.scan(layer, x, w)[0]

    specs = (P("ep"), P(None, "ep"))
    fn = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P("ep"), check_vma=False)
    shapes = [((4 * 256, 512), specs[0]), ((3, 512, 512), specs[1])]
    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, spec))
        for shape, spec in shapes
    ]
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    program = jax.jit(fn).lower(*args).compile(compiler_options=options)
    module = hlo.parse(
        memory.find_dump(tmp_path, "after_optimizations.txt", near="shard").read_text()
    )
    simulation = simulate(module)
    assert simulation.cost.flops == 3 * 2 * 256 * 512 * 512
    assert simulation.by_kind()["all-gather"]["bytes"] == 3 * 512 * 512 * 2 * 3 / 4
    assert simulation.by_kind()["all-to-all"]["count"] == 3
    found = memory.allocations(
        memory.find_dump(tmp_path, "buffer-assignment.txt", near="shard").read_text()
    )
    stated = program.memory_analysis()
    assert found.arguments == stated.argument_size_in_bytes
    assert found.temporaries == pytest.approx(stated.temp_size_in_bytes, rel=0.01)  # alignment
    live = memory.find_dump(tmp_path, "live-range.txt", near="shard").read_text()
    assert memory.largest_buffers(module, live)[0].at_peak
