"""Stand-ins for `compile._compile` that play back what a real compiler left, and how it ended.

Tests put one in its place; it runs in the child process, as the real one does.
"""

import json
import os
import signal
import time

PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=4

FileNames
1 "/here/sharding/expert_parallel.py"
2 "/here/dsv3_jax/model/mla.py"
3 "/lib/site-packages/einops/einops.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=126 end_line=126 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}
3 {file_location_id=3 parent_frame_id=3}

%round.c (v: (s32[], s32[])) -> pred[] {
  %v = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%v), index=0
  %n = s32[] get-tuple-element(%v), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%round.b (w: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %w = (s32[], s32[]) parameter(0)
}

%layer.c (lv: (s32[], f32[512,512], f32[3,512,512])) -> pred[] {
  %lv = (s32[], f32[512,512], f32[3,512,512]) parameter(0)
  %li = s32[] get-tuple-element(%lv), index=0
  %three = s32[] constant(3)
  ROOT %lless = pred[] compare(%li, %three), direction=LT
}

%layer.b (lw: (s32[], f32[512,512], f32[3,512,512])) -> (s32[], f32[512,512], f32[3,512,512]) {
  %lw = (s32[], f32[512,512], f32[3,512,512]) parameter(0)
  %k = s32[] get-tuple-element(%lw), index=0
  %x = f32[512,512] get-tuple-element(%lw), index=1
  %all = f32[3,512,512] get-tuple-element(%lw), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%k, %one)
  %s = (f32[512,512], f32[512,512]) all-to-all-start(%x), replica_groups={{0,1},{2,3}}, dimensions={0}, metadata={op_name="jit(step)/jvp()/while/body/all_to_all"}
  %y = f32[512,512] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/jvp()/while/body/dot_general"}
  %d = f32[512,512] all-to-all-done(%s)
  %kept = f32[3,512,512] dynamic-update-slice(%all, %y, %k), metadata={op_name="jit(step)/jvp()/while/body/dynamic_update_slice" stack_frame_id=3}
  ROOT %out = (s32[], f32[512,512], f32[3,512,512]) tuple(%next, %d, %kept)
}

ENTRY %main (p: f32[512,512], n: s32[]) -> f32[512,512] {
  %p = f32[512,512] parameter(0), metadata={op_name="state.params['w']"}
  %rounds = s32[] parameter(1)
  %zero = s32[] constant(0)
  %more = (s32[], s32[]) tuple(%zero, %rounds)
  %further = (s32[], s32[]) while(%more), condition=%round.c, body=%round.b, metadata={op_name="jit(step)/jvp()/extra_rounds/while" stack_frame_id=1}
  %stack = f32[3,512,512] broadcast(%zero), dimensions={}
  %begin = (s32[], f32[512,512], f32[3,512,512]) tuple(%zero, %p, %stack)
  %layers = (s32[], f32[512,512], f32[3,512,512]) while(%begin), condition=%layer.c, body=%layer.b, metadata={op_name="jit(step)/jvp()/while" stack_frame_id=2}
  %last = f32[512,512] get-tuple-element(%layers), index=1
  ROOT %sum = f32[512,512] all-reduce(%last), replica_groups={{0,2},{1,3}}, to_apply=%add
}
"""  # noqa: E501

GIB = 2**30
ASSIGNMENT = """BufferAssignment:
allocation 0: size ARGUMENTS, page 0, parameter 0, shape |f32[8]| at ShapeIndex {}:
allocation 1: size TEMPORARIES, page 0, preallocated-temp:
"""

LIVE = """HloLiveRange (max 12):
  Live ranges at 7 (peak):
    layers{2}: 3145728 bytes (cumulative: 3145728 bytes)
    p{}: 1048576 bytes (cumulative: 4194304 bytes)
  Stack trace breakdown for peak usage: 4194304 bytes
"""

OUT_OF_MEMORY = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the \
total memory required for HLO temporaries (134.57G) exceeds available HBM (95.73G). HLO \
module: jit_step.
See https://openxla.org/xla/errors/error_1000 for more details."""


def _leave(folder, temporaries: int, **result):
    """Write the texts in the order of libtpu."""
    stem = folder / "module_0000.jit_step.cl_1.after_optimizations"
    positions = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]
    (folder / "result.json").write_text(json.dumps({"positions": positions} | result))
    notes = folder / "module_0000.jit_step.cl_1.debug_options"
    notes.write_text("first")
    sizes = ASSIGNMENT.replace("ARGUMENTS", str(13 * GIB)).replace("TEMPORARIES", str(temporaries))
    texts = {
        "-buffer-assignment.txt": sizes,
        "-live-range.txt": LIVE,
        "-memory-usage-report.txt": "",
        ".txt": PROGRAM,
    }
    for ending, text in texts.items():
        stem.with_name(stem.name + ending).write_text(text)
    time.sleep(0.05)
    notes.write_text("second")


def completes(config, target, folder, options):
    memory = {"argument": 2 * GIB, "output": GIB, "alias": GIB, "temp": 5 * GIB, "peak": 6 * GIB}
    _leave(folder, 5 * GIB, memory=memory)


def schedules(config, target, folder, options):
    """Leave the schedule, then generate code for longer than any test waits."""
    _leave(folder, 5 * GIB)
    time.sleep(600)


def exhausts(config, target, folder, options):
    _leave(folder, int(120.67 * GIB), out_of_memory=OUT_OF_MEMORY)


def dies(config, target, folder, options):
    (folder / "compiler.log").write_text("the last lines\n")
    os.kill(os.getpid(), signal.SIGKILL)
