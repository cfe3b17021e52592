"""Schedules: their bubbles against the report's formulas, and tables that must not be wrong."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from reference.tick_replay import check

from sharding.schedules import NAMES, Costs, Op, make_schedule, nearest_n_micro
from sharding.ticks import FIELDS, lockstep_time, make_tick_table, peak_residuals, table_time
from tools.schedules import bubble, bubble_formula, makespan, unit_costs

SMALL, LARGE = [(2, 4), (4, 9), (5, 13), (4, 10)], [(8, 16), (8, 20), (16, 32)]


def cases(sizes):
    return [
        (name, n_ranks, n_micro)
        for name in NAMES
        for n_ranks, n_micro in sizes
        if nearest_n_micro(name, n_ranks, n_micro) == n_micro
    ]


@pytest.mark.parametrize("name, n_ranks, n_micro", cases(SMALL))
def test_bubble_is_that_of_the_report(name, n_ranks, n_micro):
    """Table 2 of the report, with and without a gain from running F and BW side by side."""
    for fused in (None, 2.25):
        check_bubble(name, n_ranks, n_micro, fused)


@pytest.mark.slow
@pytest.mark.parametrize("name, n_ranks, n_micro", cases(LARGE))
def test_bubble_of_long_pipelines(name, n_ranks, n_micro):
    for fused in (None, 2.25):
        check_bubble(name, n_ranks, n_micro, fused)


def check_bubble(name, n_ranks, n_micro, fused):
    costs = unit_costs(name, fused)
    found = bubble(make_schedule(name, n_ranks, n_micro), costs)
    assert found == pytest.approx(bubble_formula(name, n_ranks, costs), abs=1e-9)


def test_formulas():
    """By hand from table 2, for F = 1, BW = 3, W = 1.5, F beside BW = 3.5 on 8 ranks."""
    costs = Costs(1.0, 1.5, 1.5, 3.5)
    wanted = {"gpipe": 28, "1f1b": 28, "zb1p": 7, "dualpipe": 6, "dualpipev": 14}
    assert {name: bubble_formula(name, 8, costs) for name in NAMES} == wanted


@pytest.mark.parametrize("name, n_ranks, n_micro", cases(SMALL[:2]))
def test_activations_in_memory(name, n_ranks, n_micro):
    """Table 2: P for 1F1B and ZB1P, P + 1 for DualPipe; a V has 2P + 1 of half the size."""
    table = make_tick_table(make_schedule(name, n_ranks, n_micro))
    check(table)
    most = max(peak_residuals(table))
    wanted = {"gpipe": n_micro, "dualpipe": n_ranks + 1, "dualpipev": 2 * n_ranks + 1}
    assert most == table.n_residuals == wanted.get(name, min(n_ranks, n_micro))


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_tables_are_valid(name, n_ranks):
    """A replay finds no fault; few and many micro-batches, all or little W put off."""
    for n_micro in (1, 3, 8):
        if nearest_n_micro(name, n_ranks, n_micro) == n_micro:
            for limit in (None, 0, 1):
                table = make_tick_table(make_schedule(name, n_ranks, n_micro, limit))
                check(table)
                assert limit is None or table.n_operands <= limit
                assert table_time(table, Costs()) >= makespan(table.schedule, Costs())[0] - 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_a_corrupted_table_is_refused(name):
    """Whatever number that anything depends on is changed, wherever it stands."""
    table = make_tick_table(make_schedule(name, 2, 6))
    rng, refused = np.random.default_rng(0), 0
    guards = {"f": "f_on", "b": "b_on", "w": "w_on"}
    for field in FIELDS:
        column = FIELDS.index(field)
        guard = guards.get(field[0]) if field != "fused" else None
        for _ in range(3):
            used = table.field(guard) if guard else np.ones(table.rows.shape[:2], int)
            if field in ("f_in", "f_micro"):  # what enters first comes from nowhere
                used = used * (1 - table.field("f_first") if field == "f_in" else 1)
            if field == "b_operands":
                used = table.field("b_defers")
            if field == "fused" or not used.any():
                break  # how they run, not what: engines give the same either way
            places = np.argwhere(used)
            tick, rank = places[rng.integers(len(places))]
            rows = table.rows.copy()
            old = rows[tick, rank, column]
            rows[tick, rank, column] = old ^ 1 if old >= 0 else 0
            with pytest.raises(ValueError, match=name):
                check(dataclasses.replace(table, rows=rows))
            refused += 1
    assert refused > 40


def test_a_lost_tick_is_refused():
    table = make_tick_table(make_schedule("dualpipe", 2, 4))
    for tick in range(0, len(table.rows)):
        with pytest.raises(ValueError):
            check(dataclasses.replace(table, rows=np.delete(table.rows, tick, 0)))


def test_programs_that_wait_for_each_other_are_refused():
    schedule = make_schedule("1f1b", 2, 4)
    turned = dataclasses.replace(schedule, programs=schedule.programs[::-1])
    for run in (make_tick_table, lambda schedule: makespan(schedule, Costs())):
        with pytest.raises(ValueError, match="wait for each other"):
            run(turned)


def test_joined():
    """Each tick begins when a rank and its neighbours have ended the one before."""
    assert lockstep_time([[1, 5, 1], [1, 1, 1]]) == 6
    assert lockstep_time([[1, 1, 5], [1, 1, 1], [1, 1, 1]]) == 7
    assert lockstep_time([[1, 1, 5], [1, 1, 1]]) == 6


def test_costs_of_the_ends_and_of_uneven_stages():
    stages = make_schedule("dualpipe", 2, 4).stages
    costs = Costs(1, 2, 1, 3, [2, 5], embed=10, embed_backward=20, head=40)
    f, b = Op("F", 0, 0), Op("BW", 1, 2)  # on rank 0 of stage 0, and of stage 1, the last
    assert costs.of((f,), 0, stages) == 2 * 1 + 10
    assert costs.of((b,), 0, stages) == 5 * 3 + 40
    assert costs.of((f, b), 0, stages) == 2 * 3 + 3 * 3 + 10 + 40  # 2 layers side by side
    assert costs.of((f, b), 1, stages) == 2 * 3 + 3 * 1 + 20  # the other way round
    assert costs.of((Op("B", 0, 0),), 0, stages) == 2 * 2 + 20
    assert costs.of((Op("W", 0, 0),), 0, stages) == 2


@pytest.mark.parametrize(
    "name, n_ranks, n_micro, message",
    [
        ("dualpip", 4, 8, "must be one of"),
        ("dualpipe", 4, 6, "the nearest number that works is 8"),
        ("dualpipe", 4, 9, "the nearest number that works is 10"),
        ("dualpipe", 3, 8, "even number of stages"),
        ("dualpipev", 3, 5, "the nearest number that works is 6"),
        ("1f1b", 4, 0, "the nearest number that works is 1"),
    ],
)
def test_errors(name, n_ranks, n_micro, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, n_ranks, n_micro)


def test_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tools.schedules",
        "--p=2",
        "--m=4",
        f"--out={tmp_path}/x.png",
    ]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "dualpipe     12.0     0.0      0.0      12.0  3 3" in out
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    done = subprocess.run([*command, "--m=0"], capture_output=True, text=True)
    assert done.returncode == 1 or "left out" in done.stdout
