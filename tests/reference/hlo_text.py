"""Modules of HLO for tests, from a few lines or compiled, and a simulation of one."""

import jax
import jax.numpy as jnp

from dsv3_jax.aot import hlo, loops, simulator


def module_of(entry: str, others: str = "") -> hlo.Module:
    """Return a module of 8 partitions with these lines as its entry."""
    lines = "\n".join(f"  {line.strip()}" for line in entry.strip().splitlines())
    return hlo.parse(
        f"HloModule test, is_scheduled=true, num_partitions=8\n\n{others}\n\n"
        f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}\n}}\n"
    )


def one(entry: str, others: str = "") -> tuple[hlo.Module, hlo.Computation, hlo.Instruction]:
    """Return the last instruction of such a module, with its module and computation."""
    module = module_of(entry, others)
    computation = module.computations["main"]
    return module, computation, computation.instructions[-1]


def simulate(module: hlo.Module, trips=None, **machine) -> simulator.Simulation:
    """Simulate on a machine of 1 FLOP/s, 1 byte/s of HBM and 1 byte/s of link, unless given."""
    figures = dict(peak_flops=1.0, hbm_bandwidth=1.0, link_rate=lambda _: 1.0) | machine
    known, _ = loops.trip_counts(module)
    return simulator.Simulator(module, simulator.Machine(**figures), known | (trips or {})).step()


def compiled(fn, *args) -> hlo.Module:
    return hlo.parse(jax.jit(fn).lower(*args).compile().as_text())


def nested(x, w):
    """Return 5 layers of 3 matmuls of 16 x 24 by 24 x 24, for w of 5."""

    def layer(x, w):
        return jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ w), x), None

    return jax.lax.scan(layer, x, w)[0]


def run_counts(module: hlo.Module, trips: dict[str, float]) -> dict[str, float]:
    """Return how often each scheduled computation runs per step; every branch counts as run.

    Computations that are fused or called belong to their instruction and are left out.
    """
    counts: dict[str, float] = {}

    def visit(name: str, times: float):
        counts[name] = counts.get(name, 0.0) + times
        for instruction in module.computations[name].instructions:
            if instruction.opcode == "while":
                visit(module.body(instruction).name, times * trips[instruction.name])
            elif instruction.opcode == "conditional":
                for inner in instruction.called:
                    visit(inner, times)

    visit(module.entry, 1.0)
    return counts
