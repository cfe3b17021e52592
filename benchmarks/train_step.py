"""Our training step against transformers' on one CPU: tokens/s, their ratio, share of peak.

    pip install -c constraints.txt -e '.[parity]'
    python benchmarks/train_step.py

Both sides train the same 8.8M-parameter DeepSeek-V3 (4 layers, 1 dense; 16 experts, top-4; no MTP)
on the same tokens in float32, with clipping and AdamW, a few steps of one side, then of the other.
The medians of their steps are compared. `--ours` leaves transformers out.
"""

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from dsv3_jax.config import (
    AttentionConfig,
    Config,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainConfig,
)
from dsv3_jax.flops import training_flops_per_token
from dsv3_jax.losses import Batch, next_token_loss
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer
from dsv3_jax.training.reporting import matmul_peak
from dsv3_jax.training.state import abstract_state, init_sharded_state, make_layout
from dsv3_jax.training.step import make_step
from dsv3_jax.training.supervisor import use_huge_pages
from sharding.mesh import MeshSpec, make_mesh

CONFIG = Config(
    name="benchmark",
    model=ModelConfig(
        vocab_size=4096,
        width=256,
        n_layers=4,
        n_dense=1,
        dense_hidden=512,
        attention=AttentionConfig(
            n_heads=4, q_rank=96, kv_rank=64, nope_dim=128, rope_dim=64, value_dim=128
        ),
        moe=MoEConfig(n_experts=16, n_shared=1, hidden=128, top_k=4, n_groups=4, topk_groups=2),
        mtp_depth=0,
        init_std=0.02,
    ),
    train=TrainConfig(batch=4, seq_len=256, steps=1000),
    optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=10),
    losses=LossConfig(balance_weight=0.0, bias_update_speed=0.0),
    precision=PrecisionConfig(compute="float32", moments="float32"),
    parallel=ParallelConfig(remat="none", unroll=3),
)


def our_step() -> Callable[[np.ndarray], float]:
    """Return a function that trains one step on tokens [B T+1] and returns the loss."""
    spec = MeshSpec()
    mesh, layout = make_mesh(spec, jax.devices()[:1]), make_layout(CONFIG, spec)
    optimizer = make_optimizer(CONFIG.optimizer, Policy.of(CONFIG.precision))
    state = init_sharded_state(CONFIG, optimizer, abstract_state(CONFIG, optimizer, mesh, layout))
    loss_fn = next_token_loss(CONFIG.losses, CONFIG.model.mtp_depth)
    step = make_step(CONFIG, optimizer, mesh, layout, loss_fn)

    def run(tokens: np.ndarray) -> float:
        nonlocal state
        state, metrics = step(state, Batch(tokens, np.ones(tokens.shape, bool)))
        return float(metrics.losses.total)

    return run


def transformers_step() -> Callable[[np.ndarray], float]:
    """Return the same for transformers' DeepseekV3ForCausalLM and torch's fused AdamW."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model, moe, attention = CONFIG.model, CONFIG.model.moe, CONFIG.model.attention
    config = DeepseekV3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.dense_hidden,
        moe_intermediate_size=moe.hidden,
        num_hidden_layers=model.n_layers,
        num_attention_heads=attention.n_heads,
        num_key_value_heads=attention.n_heads,
        n_shared_experts=moe.n_shared,
        n_routed_experts=moe.n_experts,
        routed_scaling_factor=moe.scale,
        kv_lora_rank=attention.kv_rank,
        q_lora_rank=attention.q_rank,
        qk_rope_head_dim=attention.rope_dim,
        v_head_dim=attention.value_dim,
        qk_nope_head_dim=attention.nope_dim,
        n_group=moe.n_groups,
        topk_group=moe.topk_groups,
        num_experts_per_tok=moe.top_k,
        first_k_dense_replace=model.n_dense,
        norm_topk_prob=moe.normalize,
    )
    torch.manual_seed(0)
    net = DeepseekV3ForCausalLM(config).train()
    o = CONFIG.optimizer
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=o.peak_lr, betas=(o.b1, o.b2), weight_decay=o.weight_decay, fused=True
    )

    def run(tokens: np.ndarray) -> float:
        rows = torch.from_numpy(tokens[:, :-1].astype(np.int64))
        labels = torch.from_numpy(tokens[:, 1:].astype(np.int64))
        logits = net(rows, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), o.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def measure(sides: dict[str, Callable], rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds of steps; sides run `steps` in turn, of which the first does not count."""
    rng = np.random.default_rng(0)
    shape = (CONFIG.train.batch, CONFIG.train.seq_len + 1)
    seconds = {name: [] for name in sides}
    for turn in range(rounds + 1):  # the first turn compiles
        for name, run in sides.items():
            for i in range(steps):
                tokens = rng.integers(0, CONFIG.model.vocab_size, shape, dtype=np.int32)
                start = time.perf_counter()
                run(tokens)
                if turn and i:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6, help="turns of each side (default: 6)")
    parser.add_argument("--steps", type=int, default=6, help="steps per turn (default: 6)")
    parser.add_argument("--ours", action="store_true", help="leave transformers out")
    arguments = parser.parse_args()
    sides = {"dsv3_jax": our_step()}
    if not arguments.ours:
        sides["transformers"] = transformers_step()
    seconds = measure(sides, arguments.rounds, arguments.steps)
    peak = matmul_peak("float32")
    tokens = CONFIG.train.batch * CONFIG.train.seq_len
    flops = training_flops_per_token(CONFIG.model, CONFIG.train.seq_len) * tokens
    base = np.median(seconds["dsv3_jax"])
    table = Table(title=f"{flops / 1e9:.1f} GFLOP per step; measured peak {peak / 1e9:.0f} GFLOP/s")
    for column in ("", "seconds per step", "tokens/s", "share of peak", "times slower than ours"):
        table.add_column(column, justify="right")
    for name, values in seconds.items():
        median = float(np.median(values))
        table.add_row(
            name,
            f"{median:.3f}",
            f"{tokens / median:,.0f}",
            f"{flops / median / peak:.0%}",
            f"{median / base:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    use_huge_pages()  # for both sides
    main()
