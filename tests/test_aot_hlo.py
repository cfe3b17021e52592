"""The parser of scheduled HLO and the costs of its instructions: shapes, trips, FLOPs, bytes."""

import re

import jax
import jax.numpy as jnp
import pytest
from reference.hlo_text import compiled, module_of, nested, one, run_counts, simulate

from dsv3_jax.aot import hlo, loops, op_cost

# Shapes and lines


def test_shapes_know_tiles_and_memory_spaces():
    shape = hlo.parse_shape(
        "(bf16[8,112]{1,0:T(8,128)(2,1)}, (f32[3,200]{0,1:T(8,128)S(1)}, s32[]))"
    )
    rows, columns, scalar = hlo.leaves(shape)
    assert (rows.n_bytes, rows.stored_bytes) == (8 * 112 * 2, 8 * 128 * 2)
    assert columns.stored_bytes == 200 * 128 * 4  # 3 is the minor dim
    assert [leaf.in_hbm for leaf in (rows, columns, scalar)] == [True, False, True]
    assert scalar.n_bytes == 4 and str(columns) == "f32[3,200]"


@pytest.mark.parametrize(
    ("dtype", "n_bytes"), [("pred", 8), ("f8e4m3fn", 8), ("s4", 4), ("c64", 64)]
)
def test_bytes_of_dtypes(dtype, n_bytes):
    assert hlo.parse_shape(f"{dtype}[8]{{0}}").n_bytes == n_bytes


def test_a_kernel_call_may_span_lines_and_its_cost_estimate_does_not_count():
    text = """%p = f32[4,6]{1,0} parameter(0)
    ROOT %kernel.3 = f32[4,5]{1,0} custom-call(%p, %p), custom_call_target="tpu_custom_call",
    frontend_attributes={kernel_metadata={
      "note": "a ) and a {"
    }}, metadata={op_name="jit(f)/rows/pallas_call"},
    backend_config={"cost_estimate":{"flops":"99"}}"""
    module, computation, kernel = one(text)
    assert len(computation.instructions) == 2 and kernel.operands == ("p", "p")
    assert op_cost.unknown_kernels(module) == ["rows"]
    assert op_cost.op_cost(module, computation, kernel).flops == 0
    table = {"rows": lambda call, operands, results: 7.0}
    assert op_cost.op_cost(module, computation, kernel, table).flops == 7
    assert op_cost.unknown_kernels(module, table) == []


def test_a_gpu_library_call_counts_its_matmul():
    text = """%a = f8e4m3fn[3,4,6] parameter(0)
    %b = f8e4m3fn[3,6,5] parameter(1)
    ROOT %gemm = (bf16[3,4,5], s8[99]) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul$f8", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"]}}}"""  # noqa: E501
    assert op_cost.op_cost(*one(text))[:2] == (2 * 3 * 4 * 5 * 6,) * 2


# Trips and FLOPs


@pytest.mark.parametrize("stated", [True, False])
def test_nested_loops_multiply(stated):
    text = jax.jit(nested).lower(jnp.ones((16, 24)), jnp.ones((5, 24, 24))).compile().as_text()
    if not stated:
        text = re.sub(r'"known_\w+":\{[^}]*\},?', "", text)
    module = hlo.parse(text)
    known, unknown = loops.trip_counts(module)
    assert sorted(known.values()) == [3, 5] and not unknown
    assert max(run_counts(module, known).values()) == 15
    simulation = simulate(module)
    assert simulation.cost.flops == 15 * 2 * 16 * 24 * 24
    counted = op_cost.OpCost()
    for name, times in run_counts(module, known).items():
        computation = module.computations[name]
        for instruction in computation.instructions:
            counted += op_cost.op_cost(module, computation, instruction).times(times)
    assert counted == simulation.cost


def test_loops_over_data_are_reported_not_invented():
    def rows(x, n):
        return jax.lax.fori_loop(0, n, lambda i, y: y @ y, x)

    module = compiled(rows, jnp.ones((8, 8)), jnp.int32(4))
    known, unknown = loops.trip_counts(module)
    assert not known and "test_aot_hlo.py" in unknown[0].source
    with pytest.raises(KeyError, match=unknown[0].name):
        simulate(module)
    assert simulate(module, {unknown[0].name: 2.5}).cost.flops == 2.5 * 2 * 8**3


def test_a_limit_may_be_carried_by_the_loop():
    loop = "(s32[], s32[]) while(%t), condition=%c, body=%b"
    others = """%c (v: (s32[], s32[])) -> pred[] {
  %v = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%v), index=0
  %n = s32[] get-tuple-element(%v), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
%b (w: (s32[], s32[])) -> (s32[], s32[]) {
  %w = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%w), index=0
  %m = s32[] get-tuple-element(%w), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%j, %two)
  ROOT %r = (s32[], s32[]) tuple(%next, %m)
}"""
    entry = f"""%zero = s32[] constant(1)
    %ten = s32[] constant(10)
    %t = (s32[], s32[]) tuple(%zero, %ten)
    ROOT %loop = {loop}"""
    assert loops.trip_counts(module_of(entry, others)) == ({"loop": 5.0}, [])


@pytest.mark.parametrize(
    ("left", "right", "result", "labels", "window", "flops"),
    [
        ("f32[10,6]", "f32[6,7]", "f32[10,7]", "bf_io->bf", "", 2 * 10 * 6 * 7),
        # 4 is a batch dim, as TPUs write it: forwards and reversed
        ("bf16[4,5,6]", "bf16[4,6,7]", "f32[4,5,7]", "0bf_0io->0bf",
         "size=4 stride=3 lhs_dilate=4", 2 * 4 * 5 * 6 * 7),
        ("bf16[4,5,6]", "bf16[4,6,7]", "f32[4,7,5]", "0bf_0io->0fb",
         "size=4 stride=4 pad=3_3 lhs_dilate=3 rhs_reversal=1", 2 * 4 * 6 * 5 * 7),
        # a real convolution: of 3 x 10 pairs 2 fall on padding
        ("f32[2,10,6]", "f32[3,6,7]", "f32[2,10,7]", "b0f_0io->b0f",
         "size=3 pad=1_1", 2 * 2 * 28 * 6 * 7),
        ("f8e4m3fn[10,6]", "f8e4m3fn[6,7]", "f32[10,7]", "bf_io->bf", "", 2 * 10 * 6 * 7),
    ],
)  # fmt: skip
def test_convolution_flops_skip_padding_and_holes(left, right, result, labels, window, flops):
    text = f"""%l = {left} parameter(0)
    %r = {right} parameter(1)
    ROOT %c = {result} convolution(%l, %r), window={{{window}}}, dim_labels={labels}"""
    found = op_cost.op_cost(*one(text))
    assert (found.flops, found.fp8_flops) == (flops, flops if left.startswith("f8") else 0)


# Bytes


@pytest.mark.parametrize(
    ("line", "n_bytes"),
    [
        ("add(%a, %a)", 2 * 4 * 80),  # an operand counts once
        ("bitcast(%a)", 0),
        ("get-tuple-element(%t), index=0", 0),
        ("dynamic-update-slice(%a, %row, %i, %i)", 2 * 4 * 10),
        ("scatter(%a, %ids, %row), to_apply=%add", 4 + 3 * 4 * 10),
        ('custom-call(), custom_call_target="AllocateBuffer"', 0),
    ],
)
def test_bytes_of_instructions(line, n_bytes):
    text = f"""%a = f32[8,10]{{1,0}} parameter(0)
    %row = f32[1,10]{{1,0}} parameter(1)
    %ids = s32[1]{{0}} parameter(2)
    %i = s32[] parameter(3)
    %t = (f32[8,10]{{1,0}}) tuple(%a)
    ROOT %out = f32[8,10]{{1,0}} {line}"""
    assert op_cost.op_cost(*one(text)).hbm_bytes == n_bytes


def test_a_fusion_counts_slices_in_place_updates_and_nothing_in_vmem():
    others = """%inner (a: f32[8,10], u: f32[1,10], s: f32[5,10], i: s32[]) -> f32[8,10] {
  %a = f32[8,10]{1,0} parameter(0)
  %u = f32[1,10]{1,0:S(1)} parameter(1)
  %s = f32[5,10]{1,0} parameter(2)
  %i = s32[]{:S(6)} parameter(3)
  %cut = f32[1,10]{1,0} dynamic-slice(%s, %i, %i), dynamic_slice_sizes={1,10}
  %sum = f32[1,10]{1,0} add(%cut, %u)
  ROOT %update = f32[8,10]{1,0} dynamic-update-slice(%a, %sum, %i, %i)
}"""
    text = """%a = f32[8,10]{1,0} parameter(0)
    %u = f32[1,10]{1,0:S(1)} parameter(1)
    %s = f32[5,10]{1,0} parameter(2)
    %i = s32[]{:S(6)} parameter(3)
    ROOT %f = f32[8,10]{1,0} fusion(%a, %u, %s, %i), kind=kLoop, calls=%inner"""
    assert op_cost.op_cost(*one(text, others)).hbm_bytes == 2 * 4 * 10  # slice read, row written
