"""Draw pipeline schedules, and compare their waiting time with the report's formulas.

    python -m tools.schedules --p 8 --m 20            a table and a picture of all five
    python -m tools.schedules --p 8 --m 20 --fused 2  F and BW side by side cost 2 instead of 3

Time is in units of a stage's F, which B and W take as well.
"""

import argparse
from collections.abc import Callable

from matplotlib.figure import Figure

from dsv3_jax.training import pipeline_plot
from sharding.schedules import NAMES, Costs, Schedule, make_schedule, nearest_n_micro
from sharding.ticks import make_tick_table, peak_residuals, table_time


def makespan(schedule: Schedule, costs: Costs) -> tuple[float, list[float]]:
    """Return the time until all work has ended if messages take none, and each rank's working time.

    Raises:
        ValueError: ranks wait for each other.
    """
    end: dict[tuple, float] = {}
    n_ranks = schedule.stages.n_ranks
    at, free, busy = [0] * n_ranks, [0.0] * n_ranks, [0.0] * n_ranks
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(schedule.programs):
            while at[rank] < len(program):
                work = program[at[rank]]
                needs = [need for op in work for need in schedule.needs(rank, op)]
                if any(need not in end for need in needs):
                    break
                cost = costs.of(work, rank, schedule.stages)
                free[rank] = max([free[rank], *(end[need] for need in needs)]) + cost
                busy[rank] += cost
                end |= {(op.phase, rank, op.chunk, op.micro): free[rank] for op in work}
                at[rank] += 1
                moved = True
    if any(at[rank] < len(program) for rank, program in enumerate(schedule.programs)):
        raise ValueError(f"{schedule.name}: ranks wait for each other at {at}")
    return max(free), busy


def bubble(schedule: Schedule, costs: Costs) -> float:
    """Return the waiting time of the rank that waits longest."""
    total, busy = makespan(schedule, costs)
    return total - min(busy)


def bubble_formula(name: str, n_ranks: int, costs: Costs) -> float:
    """Return the bubble of the report's table 2, and of GPipe as 1F1B.

    The report's B is our BW, its F&B our F beside BW. A V has 2P stages of half the size.
    """
    f, bw, w = costs.f, costs.b + costs.w, costs.w
    f_bw = f + bw if costs.f_bw is None else costs.f_bw
    formulas: dict[str, Callable[[], float]] = {
        "gpipe": lambda: (n_ranks - 1) * (f + bw),
        "1f1b": lambda: (n_ranks - 1) * (f + bw),
        "zb1p": lambda: (n_ranks - 1) * (f + bw - 2 * w),
        "dualpipe": lambda: (n_ranks / 2 - 1) * (f_bw + bw - 3 * w),
        "dualpipev": lambda: (n_ranks - 1) * (f_bw + bw - 3 * w),
    }
    return formulas[name]()


def unit_costs(name: str, fused: float | None) -> Costs:
    """Return F = B = W = 1 for a P-th of the layers: a stage of a V is half of that."""
    size = 0.5 if name == "dualpipev" else 1.0
    return Costs(size, size, size, None if fused is None else fused * size)


def report(n_ranks: int, n_micro: int, fused: float | None, path: str):
    """Print a line per schedule, and draw all of them into one picture."""
    names = [name for name in NAMES if nearest_n_micro(name, n_ranks, n_micro) == n_micro]
    print(f"{n_ranks} ranks, {n_micro} micro-batches; F = B = W = 1 for a P-th of the layers\n")
    print("schedule     time  bubble  formula  in ticks  kept for the backward, by rank")
    figure = Figure(figsize=(14, 1 + 0.28 * (n_ranks + 3) * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        schedule, costs = make_schedule(name, n_ranks, n_micro), unit_costs(name, fused)
        table = make_tick_table(schedule)
        time, waits = makespan(schedule, costs)[0], bubble(schedule, costs)
        formula, ticks = bubble_formula(name, n_ranks, costs), table_time(table, costs)
        kept = " ".join(map(str, peak_residuals(table)))
        print(f"{name:10s}{time:7.1f}{waits:8.1f}{formula:9.1f}{ticks:10.1f}  {kept}")
        pipeline_plot.draw(axes, table, costs)
        axes.set_title(f"{name}: {ticks:g} in ticks; {time:g}, bubble {waits:g}, in the ideal")
    pipeline_plot.legend(figure)
    figure.savefig(path, dpi=130)
    for name in NAMES:
        if name not in names:
            try:
                make_schedule(name, n_ranks, n_micro)
            except ValueError as error:
                print(f"left out: {error}")
    print(f"\npicture in {path}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--p", type=int, default=8, help="ranks of the pipeline (default: 8)")
    parser.add_argument("--m", type=int, default=20, help="micro-batches (default: 20)")
    parser.add_argument("--fused", type=float, help="time of F beside BW (default: 3)")
    parser.add_argument("--out", default="schedules.png", help="picture (default: schedules.png)")
    arguments = parser.parse_args()
    try:
        report(arguments.p, arguments.m, arguments.fused, arguments.out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
