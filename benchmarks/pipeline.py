"""The time of the five pipeline schedules on virtual devices, against its prediction.

    python -m benchmarks.pipeline                        4 ranks, 8 micro-batches
    python -m benchmarks.pipeline --p 8 --m 16 --unit 30

Every layer sleeps for the time that its work is taken to need, on its own device, so the measured
time is that of the loop over ticks: which rank works when, and who waits for whom at the end of a
tick. Forward, dgrad and wgrad of a P-th of the layers take one unit each. The expert all-to-all
takes no time in one half of the table, and in the other a unit in the forward and in the dgrad,
hidden where a forward and a backward run side by side. The prediction is the time of the ticks,
each of which a rank ends together with its neighbours.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from sharding import pipeline
from sharding.mesh import REPLICATED, make_mesh, manual_region, parse_mesh
from sharding.schedules import NAMES, Costs, make_schedule, nearest_n_micro
from sharding.ticks import make_tick_table, table_time
from tools.schedules import bubble, makespan


def program(table, costs: Costs, unit: float):
    """Return the pipeline of `table` with one layer per stage, which sleeps as `costs` says."""
    doing, plain_loop = [], pipeline._loop

    def loop(name, *rest):
        """Note the loop in which a layer is traced."""
        doing.append(name)
        try:
            return plain_loop(name, *rest)
        finally:
            doing.pop()

    def sleep(seconds: float, x: jax.Array) -> jax.Array:
        def callback(x):
            time.sleep(seconds)
            return np.asarray(x)

        return jax.pure_callback(callback, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def forward(w, x, micro):
        beside = doing and doing[-1] == "F_BW"
        return (x * w if beside else sleep(costs.f * unit, x * w)), (), ()

    def backward(w, residuals, d_y):
        beside = doing and doing[-1] == "F_BW"
        return sleep((costs.f_bw - costs.w if beside else costs.b) * unit, d_y * w), {}, (d_y,)

    def wgrad(operands):
        return {"w": sleep(costs.w * unit, operands[0]).sum()}

    stage_fns = pipeline.StageFns(
        embed=lambda micro: micro,
        forward=forward,
        head_and_loss=lambda x, micro: (x, {}, ()),
        backward=backward,
        wgrad=wgrad,
        embed_backward=lambda d_x, micro: {},
        add_aux=lambda total, new: total,
    )
    n_ranks, sizes = table.stages.n_ranks, [1] * table.stages.n_stages
    mesh = make_mesh(parse_mesh(f"pp{n_ranks}"), jax.devices()[:n_ranks])

    def shard(weights, micros):
        return pipeline.run_pipeline(table, sizes, stage_fns, weights, micros).layer_grads

    inputs = (jnp.ones(table.stages.n_chunks), jnp.ones((table.schedule.n_micro, 4)))
    pipeline._loop = loop
    try:
        lowered = jax.jit(manual_region(shard, mesh, (REPLICATED,) * 2, REPLICATED)).lower(*inputs)
    finally:
        pipeline._loop = plain_loop
    compiled = lowered.compile()
    return lambda: jax.block_until_ready(compiled(*inputs))


def measure(n_ranks: int, n_micro: int, unit: float, rounds: int):
    """Print a row for each schedule and cost, in units of time."""
    table = Table(title=f"{n_ranks} ranks, {n_micro} micro-batches, units of {1000 * unit:g} ms")
    for column in ("exchange", "schedule", "ideal", "bubble", "in ticks", "measured", "ratio"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    names = [name for name in NAMES if nearest_n_micro(name, n_ranks, n_micro) == n_micro]
    for exchange in (0.0, 1.0):
        runs = {}
        for name in names:
            half = 0.5 if name == "dualpipev" else 1.0
            alone = (1 + exchange) * half
            costs = Costs(alone, alone, half, 3 * half)
            ticks = make_tick_table(make_schedule(name, n_ranks, n_micro))
            runs[name] = (ticks, costs, program(ticks, costs, unit), [])
        for _ in range(rounds):
            for _, _, run, seconds in runs.values():
                begin = time.perf_counter()
                run()
                seconds.append((time.perf_counter() - begin) / unit)
        for name, (ticks, costs, _, seconds) in runs.items():
            wait, predicted = bubble(ticks.schedule, costs), table_time(ticks, costs)
            found = statistics.median(seconds)
            ideal = makespan(ticks.schedule, costs)[0]
            figures = (f"{x:.1f}" for x in (ideal, wait, predicted, found))
            table.add_row(f"{exchange:g}", name, *figures, f"{found / predicted:.3f}")
    Console().print(table)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--p", type=int, default=4, help="ranks (default: 4)")
    parser.add_argument("--m", type=int, default=8, help="micro-batches (default: 8)")
    parser.add_argument("--unit", type=float, default=40, help="milliseconds (default: 40)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.p)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    measure(arguments.p, arguments.m, arguments.unit / 1000, arguments.rounds)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
