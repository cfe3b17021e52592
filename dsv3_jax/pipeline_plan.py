"""The pipeline of a run: its schedule, and the layers of its stages."""

import dataclasses
import functools

from dsv3_jax.config import Config
from dsv3_jax.flops import forward_flops
from dsv3_jax.mesh_checks import n_micro_batches, schedule_obstacle
from sharding.mesh import MeshSpec
from sharding.schedules import Costs, make_schedule
from sharding.ticks import TickTable, make_tick_table, table_time

# Time that the exchange with experts adds to a forward, and to a backward as often as it repeats
# the way there, where nothing runs beside it: estimated by simulating the compiled 671B step.
EXPOSED = 0.3


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A schedule's table and the layers of its stages."""

    table: TickTable
    sizes: list[int]  # MoE layers of every stage
    costs: Costs  # estimated; 1 is the forward of a MoE layer

    def __str__(self) -> str:
        schedule = self.table.schedule
        return (
            f"{schedule.name}, {len(self.sizes)} stages of {' '.join(map(str, self.sizes))} layers "
            f"with experts, {schedule.n_micro} micro-batches"
        )


def make_pipeline(config: Config, mesh: MeshSpec) -> Pipeline:
    """Return the pipeline that a config asks for, on a mesh that `check_mesh` has passed.

    "auto" takes the faster of dualpipe and dualpipev, if the config allows any of the two, else
    zb1p.
    """
    if config.pipeline.schedule != "auto":
        return _pipeline(config.pipeline.schedule, config, mesh)
    both = [
        name for name in ("dualpipe", "dualpipev") if schedule_obstacle(name, config, mesh) is None
    ]
    found = [_pipeline(name, config, mesh) for name in both or ["zb1p"]]
    return min(found, key=lambda pipeline: table_time(pipeline.table, pipeline.costs))


@functools.cache
def _pipeline(name: str, config: Config, mesh: MeshSpec) -> Pipeline:
    model = config.model
    schedule = make_schedule(
        name, mesh.pp, n_micro_batches(config, mesh), config.pipeline.max_deferred_wgrads
    )
    table = make_tick_table(schedule)
    flops = forward_flops(model, config.train.seq_len)
    embed = model.n_dense * flops["dense"] / flops["moe"]
    depth = model.mtp_depth
    head = ((1 + depth) * flops["head"] + depth * flops["mtp"]) / flops["moe"]
    sizes = stage_sizes(model.n_layers - model.n_dense, table.stages.n_stages, embed, head)
    recomputed = 0.0 if config.parallel.remat == "none" else 1.0
    f, b, w = 1.0, 1.0 + recomputed, 1.0
    costs = Costs(
        f=f + EXPOSED,
        b=b + (1 + recomputed) * EXPOSED,
        w=w,
        f_bw=f + b + w,
        sizes=sizes,
        embed=embed * f,
        embed_backward=embed * (f + b + w),  # no residuals: its forward runs again
        head=head * (f + b + w),
    )
    return Pipeline(table, sizes, costs)


def stage_sizes(n_layers: int, n_stages: int, embed: float, head: float) -> list[int]:
    """Return the layers of every stage, each layer given to the least loaded stage so far.

    Args:
        embed, head: further load of the first and the last stage, in layers.
    """
    loads, sizes = [0.0] * n_stages, [0] * n_stages
    loads[0] += embed
    loads[-1] += head
    for _ in range(n_layers):
        least = min(range(n_stages), key=lambda stage: (loads[stage], abs(2 * stage - n_stages)))
        sizes[least] += 1
        loads[least] += 1
    return sizes
