"""The time of collectives: groups by position, as the planner lays them out, links by route."""

import dataclasses
import itertools

import pytest

from dsv3_jax import hardware
from dsv3_jax.aot.collectives import Collective, link_rates
from dsv3_jax.interconnect import HostGroup, HostMesh, Line, TorusGroup, TorusMesh, group_at
from sharding.mesh import MeshSpec

H100, V5P = hardware.H100, hardware.V5P
LINK = V5P.ici_bandwidth


def grid(*sizes: int) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, sizes)))


def rate(chip, shape, positions, kind: str, members) -> float:
    collective = Collective(kind, "", 1.0, tuple(members))
    return link_rates(chip, shape, positions)(collective)


def test_groups_on_a_torus():
    """A plane, a line across planes, and every fourth chip of a line."""
    plane = group_at(V5P, (8, 8, 16), [(x, y, 5) for x, y in grid(8, 8)])
    assert plane == TorusGroup(V5P, (Line(8, 1, 8), Line(8, 1, 8)))
    strided = group_at(V5P, (8, 8, 16), [(3, 3, z) for z in (2, 6, 10, 14)])
    assert strided.lines == (Line(4, 4, 16),)
    two_dims = group_at(hardware.V6E, (4, 4), [(x, 1, 0) for x in range(4)])
    assert two_dims.lines == (Line(4, 1, 4),)


@pytest.mark.parametrize(
    ("name", "box", "ep", "dp"),
    [("v5p", (8, 8, 1), 64, 16), ("v5p", (4, 4, 4), 64, 16), ("tpu7x", (8, 8, 1), 128, 8)],
)
def test_a_real_mesh_is_timed_as_the_planner_would(name, box, ep, dp):
    """Boxes side by side, their devices chip after chip: both find the same lines."""
    chip, shape = hardware.CHIPS[name], (8, 8, 16) if name == "v5p" else (8, 8, 8)
    corners = [range(0, size, side) for size, side in zip(shape, box, strict=True)]
    positions = [
        tuple(a + b for a, b in zip(corner, inside, strict=True))
        for corner in itertools.product(*corners)
        for inside in grid(*box)
        for _ in range(chip.devices_per_chip)
    ]
    torus = TorusMesh(chip, shape, box)
    experts, replicas = range(ep), range(0, dp * ep, ep)
    assert group_at(chip, shape, [positions[i] for i in experts]) == torus.group(("node", "rank"))
    assert group_at(chip, shape, [positions[i] for i in replicas]) == torus.group(("dp",))
    assert group_at(chip, shape, positions) == torus.group(("dp", "node", "rank"))


def test_rates_by_kind():
    positions = grid(8, 8, 16)
    plane = [i for i, at in enumerate(positions) if at[2] == 0]
    line = [i for i, at in enumerate(positions) if at[:2] == (0, 0)]

    def of(kind, members):
        return rate(V5P, (8, 8, 16), positions, kind, members)

    # 64 devices: 1/64 of what each sends stays; 8/8 of a link's rate, by the longest ring
    assert of("all-to-all", plane) == pytest.approx(LINK * 63 / 64)
    assert of("ragged-all-to-all", plane) == of("all-to-all", plane)
    assert of("all-gather", plane) == pytest.approx(4 * LINK)
    assert of("reduce-scatter", line) == of("all-reduce", line) == pytest.approx(2 * LINK)
    assert of("all-gather", range(1024)) == pytest.approx(6 * LINK)
    assert of("collective-permute", line) == LINK
    half = line[:8]  # of a ring of 16: open, so one way round
    assert of("all-gather", half) == pytest.approx(LINK)
    assert of("all-to-all", half) == pytest.approx(LINK / 2 * 7 / 8)
    assert of("all-gather", line[::2]) == pytest.approx(2 * LINK / 2)  # another group between


def test_devices_of_a_chip_share_its_links():
    positions = [at for at in grid(4, 4, 4) for _ in range(2)]
    one_each = range(0, 128, 2)
    whole = rate(hardware.TPU7X, (4, 4, 4), positions, "all-gather", range(128))
    assert whole == rate(hardware.TPU7X, (4, 4, 4), positions, "all-gather", one_each)
    assert whole == pytest.approx(6 * hardware.TPU7X.ici_bandwidth / 2)
    assert rate(hardware.TPU7X, (4, 4, 4), positions, "all-gather", (0, 1)) == float("inf")


def test_gpu_hosts():
    positions = [(host,) for host in range(4) for _ in range(8)]
    hosts = group_at(H100, (4, 8), positions[:16])
    assert hosts == HostGroup(H100, 16, 8)
    inside = rate(H100, (4, 8), positions, "all-to-all", range(8))
    assert inside == pytest.approx(H100.nvlink_bandwidth)
    across = rate(H100, (4, 8), positions, "all-to-all", range(0, 32, 8))
    assert across == pytest.approx(H100.network_bandwidth)
    assert rate(H100, (4, 8), positions, "collective-permute", (0, 1)) == pytest.approx(450e9)
    assert rate(H100, (4, 8), positions, "collective-permute", (0, 8)) == pytest.approx(50e9)
    both = rate(H100, (4, 8), positions, "all-gather", range(32))  # each byte to a host once
    assert both == pytest.approx(8 * 50e9)


def busiest_link(n: int, closes: bool) -> float:
    """Return the rows over the busiest link of an axis when each chip sends 1/n to every chip."""
    load = {}
    for a, b in itertools.product(range(n), repeat=2):
        ways = {1: (b - a) % n, -1: (a - b) % n} if closes else {1: b - a, -1: a - b}
        shortest = min(way for way in ways.values() if way >= 0)
        chosen = [step for step, way in ways.items() if way == shortest]
        for step in chosen:
            for hop in range(shortest):
                link = (a + step * hop) % n, step
                load[link] = load.get(link, 0) + 1 / n / len(chosen)
    return max(load.values())


@pytest.mark.parametrize("box, n, closes", [((8, 1, 1), 8, True), ((1, 1, 4), 4, False)])
def test_all_to_all_on_a_torus(box, n, closes):
    torus = TorusMesh(V5P, (8, 8, 16), box)
    seconds = torus.group(("node", "rank")).all_to_all_seconds(1e9)
    assert seconds == pytest.approx(busiest_link(n, closes) * 1e9 / V5P.ici_bandwidth)


def test_gathers_on_a_torus():
    """Rings run both ways on every axis; replicas 4 apart get a quarter of the links."""
    torus, link = TorusMesh(V5P, (8, 8, 16), (8, 8, 1)), V5P.ici_bandwidth
    assert torus.group(("dp", "node", "rank")).all_gather_seconds(1e9) == pytest.approx(
        1e9 / (6 * link)
    )
    assert torus.group(("node", "rank")).all_gather_seconds(1e9) == pytest.approx(1e9 / (4 * link))
    assert torus.group(("dp",)).all_gather_seconds(1e9) == pytest.approx(1e9 / (2 * link))
    apart = TorusMesh(V5P, (8, 8, 16), (8, 8, 4))
    assert apart.group(("dp",)).all_gather_seconds(1e9) == pytest.approx(4e9 / (2 * link))
    two = dataclasses.replace(torus, chip=hardware.TPU7X)  # devices that share a chip's links
    assert two.group(("rank",)).all_gather_seconds(1e9) == pytest.approx(
        2e9 / (4 * hardware.TPU7X.ici_bandwidth)
    )


def test_collectives_of_gpu_hosts():
    """Bytes between hosts use the network, the others NVLink, both at once."""
    hosts = HostMesh(hardware.H800, 8, MeshSpec(dp=4, ranks=16))
    assert hosts.group(("node", "rank")).all_to_all_seconds(16e9) == pytest.approx(8e9 / 50e9)
    assert hosts.group(("dp",)).all_gather_seconds(16e9) == pytest.approx(16e9 / 50e9)
    assert hosts.group(("dp", "node", "rank")).all_gather_seconds(16e9) == pytest.approx(
        16e9 / 160e9
    )
    inside = HostMesh(hardware.H800, 8, MeshSpec(dp=8, ranks=8))
    assert inside.group(("node", "rank")).all_to_all_seconds(8e9) == pytest.approx(7e9 / 160e9)
