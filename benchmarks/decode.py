"""Our cached decoding against transformers' on one CPU: tokens/s, their ratio, cache bytes.

    pip install -c constraints.txt -e '.[parity]'
    python benchmarks/decode.py

Both sides hold the same 8.8M-parameter model of `train_step.py` in float32 and continue the same
random prompts greedily; their ids must be equal. The time of a decode step is that of a generation
with many new tokens less that of one with a single new token; sides run in turn.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from train_step import CONFIG

from dsv3_jax import save_pretrained
from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.serving.generator import Generator
from dsv3_jax.serving.model_view import ModelView
from dsv3_jax.training.supervisor import use_huge_pages
from sharding.mesh import MeshSpec, make_mesh

Generate = Callable[[np.ndarray, int], np.ndarray]  # prompts [B T], n -> new tokens [B n]


def our_generate(model: DeepSeekV3) -> tuple[Generate, Callable[[int], int]]:
    """Return our side, and the bytes of its cache as a function of the batch's tokens."""
    generator = Generator(ModelView.take(model, make_mesh(MeshSpec(), jax.devices()[:1])))

    def run(prompts: np.ndarray, n: int) -> np.ndarray:
        return np.stack([step.tokens for step in generator(prompts.tolist(), n)], axis=1)

    attention = CONFIG.model.attention
    numbers = (attention.kv_rank + attention.rope_dim) * CONFIG.model.n_layers
    return run, lambda n_tokens: 4 * numbers * n_tokens


def transformers_generate(folder: Path) -> tuple[Generate, Callable[[int], int]]:
    """Return the same for transformers, loaded from our export."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def run(prompts: np.ndarray, n: int) -> np.ndarray:
        ids = torch.from_numpy(prompts.astype(np.int64))
        new = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **new)
        return out[:, prompts.shape[1] :].numpy()

    @torch.inference_mode()
    def cache_bytes(n_tokens: int) -> int:
        cache = model(torch.zeros((1, 2), dtype=torch.long), use_cache=True).past_key_values
        held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        return held // 2 * n_tokens

    return run, cache_bytes


def measure(
    sides: dict[str, Generate], prompts: np.ndarray, n: int, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds per decode step of each side; raise if the continuations differ."""
    seconds = {name: [] for name in sides}
    for turn in range(rounds + 1):  # the first turn compiles
        continuations = {}
        for name, run in sides.items():
            times = []
            for n_new in (1, n):
                start = time.perf_counter()
                continuations[name] = run(prompts, n_new)
                times.append(time.perf_counter() - start)
            if turn:
                seconds[name].append((times[1] - times[0]) / (n - 1))
        first, *others = continuations.values()
        for other in others:
            np.testing.assert_array_equal(other, first)
    return seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompts")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--ours", action="store_true", help="leave transformers out")
    arguments = parser.parse_args()
    model = DeepSeekV3(CONFIG.model, Policy(), rngs=nnx.Rngs(0))
    sides, cache_bytes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.ours:
            save_pretrained(model, Path(folder, "model"), dtype="float32")
            theirs = transformers_generate(Path(folder, "model"))
            sides["transformers"], cache_bytes["transformers"] = theirs
        sides["dsv3_jax"], cache_bytes["dsv3_jax"] = our_generate(model)
    table = Table(title=f"greedy decoding after {arguments.context} tokens")
    for column in ("batch", "", "ms per step", "tokens/s", "speed against ours", "cache"):
        table.add_column(column, justify="right")
    for batch in (1, 8):
        rng = np.random.default_rng(batch)
        shape = (batch, arguments.context)
        prompts = rng.integers(0, CONFIG.model.vocab_size, shape, dtype=np.int32)
        seconds = measure(sides, prompts, arguments.new, arguments.rounds)
        base = float(np.median(seconds["dsv3_jax"]))
        for name, values in seconds.items():
            median = float(np.median(values))
            held = cache_bytes[name](batch * (arguments.context + arguments.new))
            table.add_row(
                str(batch),
                name,
                f"{median * 1e3:.2f}",
                f"{batch / median:,.0f}",
                f"{base / median:.2f}",
                f"{held / 2**20:.1f} MiB",
            )
    Console().print(table)


if __name__ == "__main__":
    use_huge_pages()  # for both sides
    main()
