"""Which layers make a pipeline stage, and which schedule runs them."""

import dataclasses
import functools

from dsv3_jax.config import Config
from dsv3_jax.flops import forward_flops
from dsv3_jax.mesh_checks import n_micro_batches, schedule_obstacle
from sharding.mesh import MeshSpec
from sharding.schedules import Costs, make
from sharding.ticks import Table, lockstep, table_of

# Time that the exchange with experts adds to a forward, and to a backward as often as it repeats
# the way there, where nothing runs beside it: estimated by simulating the compiled 671B step.
EXPOSED = 0.3


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A schedule's table and the layers of its stages."""

    table: Table
    sizes: list[int]  # MoE layers of every stage
    costs: Costs  # on paper; 1 is the forward of a MoE layer

    def __str__(self) -> str:
        schedule = self.table.schedule
        return (
            f"{schedule.name}, {len(self.sizes)} stages of {' '.join(map(str, self.sizes))} layers "
            f"with experts, {schedule.n_micro} micro-batches"
        )


def pipeline_of(config: Config, mesh: MeshSpec) -> Pipeline:
    """The pipeline that a config asks for on a mesh that `check_mesh` has passed.

    "auto" takes dualpipe or dualpipev, whichever takes less time, if the config allows any of the
    two, else zb1p.
    """
    if config.pipeline.schedule != "auto":
        return _pipeline(config.pipeline.schedule, config, mesh)
    both = [
        name for name in ("dualpipe", "dualpipev") if schedule_obstacle(name, config, mesh) is None
    ]
    found = [_pipeline(name, config, mesh) for name in both or ["zb1p"]]
    return min(found, key=lambda pipeline: lockstep(pipeline.table, pipeline.costs))


@functools.cache
def _pipeline(name: str, config: Config, mesh: MeshSpec) -> Pipeline:
    model = config.model
    n_micro, late = n_micro_batches(config, mesh), config.pipeline.max_deferred_wgrads
    table = table_of(make(name, mesh.pp, n_micro, late))
    flops = forward_flops(model, config.train.seq_len)
    begin = model.n_dense * flops["dense"] / flops["moe"]
    depth = model.mtp_depth
    end = ((1 + depth) * flops["head"] + depth * flops["mtp"]) / flops["moe"]
    sizes = stage_sizes(model.n_layers - model.n_dense, table.stages.n_stages, begin, end)
    again = 0.0 if config.parallel.remat == "none" else 1.0
    f, x, w = 1.0, 1.0 + again, 1.0
    costs = Costs(
        f=f + EXPOSED,
        x=x + (1 + again) * EXPOSED,
        w=w,
        fb=f + x + w,
        sizes=sizes,
        begin=begin * f,
        begin_back=begin * (f + x + w),  # nothing is kept of it
        end=end * (f + x + w),
    )
    return Pipeline(table, sizes, costs)


def stage_sizes(n_layers: int, n_stages: int, begin: float, end: float) -> list[int]:
    """Layers of every stage, so that the most loaded has little: each goes where least is so far.

    Args:
        begin, end: what the first and the last stage have besides, in layers.
    """
    loads, sizes = [0.0] * n_stages, [0] * n_stages
    loads[0] += begin
    loads[-1] += end
    for _ in range(n_layers):
        least = min(range(n_stages), key=lambda stage: (loads[stage], abs(2 * stage - n_stages)))
        sizes[least] += 1
        loads[least] += 1
    return sizes
