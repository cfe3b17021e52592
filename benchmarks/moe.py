"""The MoE layer, forward and backward, on one CPU: ours, transformers', ragged_dot, dense.

    pip install -c constraints.txt -e '.[parity]'
    python benchmarks/moe.py [--plot=moe.png]

All sides compute the same layer in float32: a router of 16 or 64 experts and the routed experts,
with gradients of the input and of all weights, on the same tokens, weights and routing, balanced or
as uneven as 1/rank (Zipf). The last side is no layer but a lower bound: one dense matmul with the
multiply-adds of the experts' matmuls, and its two gradients. Sides run in turn; medians are
compared. `--plot` sweeps tokens, experts and skew instead and draws our time over the bound.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from configs import load_preset
from dsv3_jax.config import MoEConfig
from dsv3_jax.model.moe import MoE
from dsv3_jax.numerics import matmul
from dsv3_jax.training.supervisor import use_huge_pages
from sharding.layout import Layout

TOP_K, WIDTH, HIDDEN = 4, 512, 512


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and its tokens; loads of experts fall as 1 / rank ** skew."""

    n_experts: int
    skew: float
    n_tokens: int = 4096


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of all sides."""

    h: np.ndarray  # [T D]
    d_y: np.ndarray  # [T D]
    router: np.ndarray  # [D E]
    bias: np.ndarray  # [E] selection bias that gives the loads of the case
    gate_up: np.ndarray  # [E D 2F]
    down: np.ndarray  # [E F D]


def inputs_of(case: Case) -> Inputs:
    rng = np.random.default_rng(0)

    def normal(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes, np.float32)

    h, router = normal(case.n_tokens, WIDTH), 0.05 * normal(WIDTH, case.n_experts)
    return Inputs(
        h=h,
        d_y=normal(case.n_tokens, WIDTH),
        router=router,
        bias=bias_for(1.0 / (1.0 + np.exp(-h @ router)), case, rng),
        gate_up=0.05 * normal(case.n_experts, WIDTH, 2 * HIDDEN),
        down=0.05 * normal(case.n_experts, HIDDEN, WIDTH),
    )


def bias_for(scores: np.ndarray, case: Case, rng) -> np.ndarray:
    """Return the bias under which loads are the case's, found as in training with smaller steps."""
    shares = rng.permutation(1.0 / np.arange(1, case.n_experts + 1) ** case.skew)
    target = np.minimum(shares / shares.sum() * TOP_K, 0.98) * case.n_tokens
    bias = np.zeros(case.n_experts, np.float32)
    for step in np.geomspace(0.1, 1e-3, 200):
        chosen = np.argpartition(-(scores + bias), TOP_K, axis=1)[:, :TOP_K]
        load = np.bincount(chosen.reshape(-1), minlength=case.n_experts)
        bias += (step * np.clip((target - load) / target, -1, 1)).astype(np.float32)
    return bias


def ours(inputs: Inputs, gmm: Callable = matmul.grouped_matmul) -> Callable:
    """Return a run of our layer and its gradients, with another grouped matmul if given."""
    n_experts = inputs.bias.size
    sizes = MoEConfig(n_experts=n_experts, n_shared=0, hidden=HIDDEN, top_k=TOP_K)
    config = dataclasses.replace(load_preset("tiny").model, width=WIDTH, moe=sizes)
    layer = MoE(config, rngs=nnx.Rngs(0))
    layer.router[...], layer.bias[...] = inputs.router, inputs.bias
    layer.gate_up[...], layer.down[...] = inputs.gate_up, inputs.down
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def both(params, h, d_y):
        def forward(params, h):
            return nnx.merge(graphdef, params, rest)(h[None], Layout())[0][0]

        y, pull = jax.vjp(forward, params, h)
        return y, pull(d_y)

    h, d_y = jnp.asarray(inputs.h), jnp.asarray(inputs.d_y)
    with mock.patch.object(matmul, "grouped_matmul", gmm):
        run = jax.jit(both).lower(params, h, d_y).compile()
    return lambda: np.asarray(jax.block_until_ready(run(params, h, d_y))[0])


def by_ragged_dot(inputs: Inputs) -> Callable:
    return ours(inputs, lambda rows, weights, sizes, _: jax.lax.ragged_dot(rows, weights, sizes))


def transformers_moe(inputs: Inputs, experts: str = "eager") -> Callable:
    """Return a run of router and experts of transformers' DeepseekV3MoE in one implementation."""
    import torch
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=inputs.bias.size,
        num_experts_per_tok=TOP_K,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
    )
    config._experts_implementation = experts
    net = DeepseekV3MoE(config)
    with torch.no_grad():
        net.gate.weight.copy_(torch.from_numpy(inputs.router.T))
        net.gate.e_score_correction_bias.copy_(torch.from_numpy(inputs.bias))
        net.experts.gate_up_proj.copy_(torch.from_numpy(inputs.gate_up.swapaxes(1, 2)))
        net.experts.down_proj.copy_(torch.from_numpy(inputs.down.swapaxes(1, 2)))
    h = torch.from_numpy(inputs.h).requires_grad_()
    d_y = torch.from_numpy(inputs.d_y)

    def run() -> np.ndarray:
        net.zero_grad()
        h.grad = None
        _, weights, ids = net.gate(h[None])
        y = net.experts(h, ids, weights)
        y.backward(d_y)
        return y.detach().numpy()

    return run


def dense(inputs: Inputs) -> Callable:
    """Return a run of [T*K D] by [D 3F] and both gradients: the experts' multiply-adds."""
    rng = np.random.default_rng(1)
    rows, width = inputs.h.shape[0] * TOP_K, 3 * HIDDEN
    sizes = ((rows, WIDTH), (WIDTH, width), (rows, width))
    arrays = [jnp.asarray(rng.standard_normal(size, np.float32)) for size in sizes]

    @jax.jit
    def run(x, w, d_y):
        y, pull = jax.vjp(lambda x, w: x @ w, x, w)
        return y, pull(d_y)

    run(*arrays)  # compiles
    return lambda: jax.block_until_ready(run(*arrays))


def seconds(sides: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Return median seconds of runs in turn; a side stops after 10 seconds in all."""
    taken = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            if sum(taken[name]) < 10.0:
                start = time.perf_counter()
                run()
                taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in taken.items()}


def compare(n_tokens: int, rounds: int):
    """Print a table for each number of experts and each routing."""
    for n_experts in (16, 64):
        for skew, routing in ((0.0, "balanced"), (1.0, "Zipf")):
            table = Table(title=f"{n_experts} experts, {routing}: {n_tokens:,} tokens, top-{TOP_K}")
            for column in ("", "seconds", "times ours", "times the dense matmul"):
                table.add_column(column, justify="right" if column else "left", min_width=10)
            inputs = inputs_of(Case(n_experts, skew, n_tokens))
            sides = {
                "dsv3_jax": ours(inputs),
                "transformers": transformers_moe(inputs),
                "transformers, grouped_mm": transformers_moe(inputs, "grouped_mm"),
                "lax.ragged_dot": by_ragged_dot(inputs),
                "dense matmul": dense(inputs),
            }
            want = sides["dsv3_jax"]()
            for name in list(sides)[1:4]:
                same = np.abs(sides[name]() - want).max(1) < 2e-3
                # Scores that differ in the last bit may choose another expert where two are equal.
                assert same.mean() > 0.999, f"{name} has other results for {(~same).sum()} tokens"
            found = seconds(sides, rounds)
            for name, value in found.items():
                ratios = (value / found["dsv3_jax"], value / found["dense matmul"])
                table.add_row(name, f"{value:.3f}", *(f"{r:.2f}" for r in ratios))
            Console().print(table)


def sweep(path: str, n_tokens: int, rounds: int):
    """Draw our time over the dense matmul's against tokens, experts and skew.

    The first of the rounds is slow, so medians need three.
    """
    tokens, experts = (256, 512, 1024, 2048, 4096, 8192), (8, 16, 32, 64, 128, 256)
    skews = (0.0, 0.5, 1.0, 1.5, 2.0)
    panels = (
        ("tokens", "16 experts", tokens, [Case(16, 0.0, n) for n in tokens]),
        ("experts", f"{n_tokens} tokens", experts, [Case(n, 0.0, n_tokens) for n in experts]),
        ("skew", "64 experts", skews, [Case(64, skew, n_tokens) for skew in skews]),
    )
    figure = matplotlib.figure.Figure(figsize=(12, 3.8), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        name, title, at, cases = panel
        ratios = []
        for case in track(cases, f"by {name}", transient=True):
            inputs = inputs_of(case)
            found = seconds({"ours": ours(inputs), "dense": dense(inputs)}, rounds)
            ratios.append(found["ours"] / found["dense"])
        axes.plot(at, ratios, "o-", color="#2563a8")
        axes.axhline(1.0, color="#666666", linestyle="--", linewidth=1)
        axes.set(title=title, xlabel=name, ylim=(0, None))
        axes.grid(alpha=0.3)
        if at is not skews:
            axes.set_xscale("log", base=2)
        print(name, dict(zip(at, np.round(ratios, 2).tolist(), strict=True)))
    figure.axes[0].set_ylabel("time / dense matmul of the same FLOPs")
    figure.savefig(path, dpi=150)
    print(f"picture in {path}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side that count")
    parser.add_argument("--plot", metavar="FILE", help="sweep, and write the picture here")
    arguments = parser.parse_args()
    if arguments.plot:
        sweep(arguments.plot, arguments.tokens, arguments.rounds)
    else:
        compare(arguments.tokens, arguments.rounds)


if __name__ == "__main__":
    use_huge_pages()  # for all sides
    main()
