"""Needle in a haystack: does a model find one sentence in a long text (report sec. 4.3, figure 8)?

    python -m dsv3_jax.evaluation.needle --weights runs/tiny_long --lengths=128,256,512,1024
    python -m dsv3_jax.evaluation.needle --weights ~/DeepSeek-V3 --mesh=ep8 --dtype=bfloat16 \\
        --lengths=4096,32768,131072 --trials=4 --batch=1 --others=9

The text is filler with one fact at some depth, "Remember object 17.", and ends with the same
words again up to the value. A needle counts as found if the likeliest tokens are the value's, all
of them. Every cell of the heat map is the share found of `--trials` texts, which the seed decides.
`--out` is the picture; beside it lies a .json with these shares and the mean log-probabilities of
the values. `--beside=EARLIER.json`, which may be repeated, draws earlier results left of this one.
"""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import numpy as np

from dsv3_jax.cli import add_model_options
from dsv3_jax.data.chat import Prompts, load_prompts
from dsv3_jax.data.needles import FILLER_HELP, NAMES, VALUES, fact, fact_prefix, filler_lines
from dsv3_jax.errors import errors_as_messages
from dsv3_jax.evaluation.scorer import Pair, Score, Scorer
from dsv3_jax.progress import bar
from dsv3_jax.serving.generator import Generator
from dsv3_jax.serving.model_view import ModelView
from dsv3_jax.weights.pretrained import load_model, start_mesh
from dsv3_jax.weights.sources import open_weights

LINES_PER_CALL = 32  # of the tokenizer
Scores = Callable[..., Sequence[Score]]  # of (pairs, advance): a `Scorer`, in tests a reader


class Haystacks:
    """Makes texts of an exact number of tokens with a needle in each.

    Args:
        lines: the filler.
        n_others: facts of other names, anywhere in the text; without any, a model may find the
            needle by its looks alone.
    """

    def __init__(self, prompts: Prompts, lines: Sequence[str], n_others: int, seed: int):
        self.lines, self.n_others, self.seed = lines, n_others, seed
        self.encode = prompts.tokenizer.encode_batch
        self.begin = prompts.encode("")  # bos, where the model expects it

    def pair(self, length: int, depth: float, trial: int) -> Pair:
        """A text up to the answer and the answer, `length` tokens together.

        Args:
            depth: share of the filler that stands before the needle, up to the end of a line.

        Raises:
            ValueError: the length has no room for the facts.
        """
        rng = np.random.default_rng([self.seed, length, round(depth * 1e6), trial])
        name, *others = rng.permutation(NAMES)[: 1 + self.n_others]
        value, *values = rng.permutation(VALUES)[: 1 + len(others)]
        facts = [fact(*pair) + "\n" for pair in zip(others, values, strict=True)]
        texts = [fact(name, value) + "\n", fact_prefix(name), f" {value}", *facts]
        needle, question, answer, *facts = self.encode(texts)
        fixed = sum(map(len, [self.begin, needle, question, answer, *facts]))
        if length < fixed:
            raise ValueError(
                f"--lengths: {length} tokens have no room for needle, question and --others="
                f"{self.n_others} facts, which take {fixed}"
            )
        hay = self._hay(rng, length - fixed)
        for other in facts:
            hay.insert(rng.integers(len(hay) + 1), other)
        ends = np.cumsum([0, *map(len, hay)])
        hay.insert(int(np.abs(ends - depth * ends[-1]).argmin()), needle)
        return Pair((*self.begin, *sum(hay, []), *question), tuple(answer))

    def _hay(self, rng: np.random.Generator, n_tokens: int) -> list[list[int]]:
        """Consecutive lines from anywhere, as tokens; of the first one only the end, to fit."""
        last, hay, missing = int(rng.integers(len(self.lines))), [], n_tokens
        while missing > 0:
            some = [self.lines[(last - i) % len(self.lines)] + "\n" for i in range(LINES_PER_CALL)]
            last -= len(some)
            for line in self.encode(some):
                hay.append(line[-missing:])
                missing -= len(hay[-1])
                if not missing:
                    break
        return hay[::-1]


class Grid(NamedTuple):
    """What was found at every depth (rows) and length (columns), means over the trials."""

    title: str
    lengths: list[int]  # tokens
    depths: list[float]  # shares
    found: list[list[float]]
    log_prob: list[list[float]]

    @property
    def mean(self) -> float:
        return float(np.mean(self.found))


def measure(
    title: str,
    haystacks: Haystacks,
    scores: Scores,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
) -> Grid:
    """The grid of all lengths and depths."""
    columns = []
    with bar("tokens", sum(lengths) * len(depths) * trials) as advance:
        for length in lengths:
            cells = [(length, depth, trial) for depth in depths for trial in range(trials)]
            pairs = [haystacks.pair(*cell) for cell in cells]
            got = scores(pairs, lambda n, length=length: advance(n * length))
            columns.append(np.reshape(got, (len(depths), trials, 2)).mean(1))
    log_prob, found = np.stack(columns, axis=1).transpose(2, 0, 1).tolist()
    return Grid(title, list(lengths), list(depths), found, log_prob)


def draw(grids: Sequence[Grid], path: Path):
    """Heat maps side by side: length by depth, colour and number are the share found."""
    widths = [len(grid.lengths) for grid in grids]
    size = (1.6 + 0.6 * sum(widths) + 0.8 * len(grids), 1.5 + 0.32 * len(grids[0].depths))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(grids), width_ratios=widths, squeeze=False)[0]
    for axes, grid in zip(panels, grids, strict=True):
        image = axes.imshow(grid.found, cmap="RdYlGn", vmin=0.0, vmax=1.0, aspect="auto")
        for (row, column), share in np.ndenumerate(grid.found):
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7)
        axes.set(title=f"{grid.title}\nmean {grid.mean:.2f}", xlabel="context (tokens)")
        axes.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths])
        axes.set_yticks(range(len(grid.depths)), [f"{depth:.0%}" for depth in grid.depths])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    panels[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels[-1], label="share found")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def numbers(kind: type, least: float, most: float, text: str) -> list:
    """The numbers in a comma-separated text; argparse shows the error."""
    found = [kind(part) for part in text.split(",")]
    if not all(least <= number <= most for number in found):
        raise argparse.ArgumentTypeError(f"{text}: every number must lie in {least}..{most}")
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.evaluation.needle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add = parser.add_argument
    lengths = functools.partial(numbers, int, 1, float("inf"))
    depths = functools.partial(numbers, float, 0, 100)
    add("--lengths", type=lengths, required=True, help="tokens of the texts, e.g. 128,256,512")
    add(
        "--depths",
        type=depths,
        default="0,10,20,30,40,50,60,70,80,90,100",
        help="percent of the text before the needle (default: %(default)s)",
    )
    add("--trials", type=int, default=16, help="texts of each cell (default: %(default)s)")
    add("--others", type=int, default=0, help="facts of other names (default: %(default)s)")
    add("--haystack", default="instant", help=f"{FILLER_HELP} (default: %(default)s)")
    add("--batch", type=int, default=8, help="texts at a time (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--title", help="over the picture (default: the folder's name)")
    add("--out", type=Path, default=Path("needle.png"), help="picture (default: %(default)s)")
    add("--beside", type=Path, action="append", default=[], help=".json of an earlier result")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    with errors_as_messages():
        for name in ("trials", "batch"):
            if getattr(arguments, name) < 1:
                raise ValueError(f"--{name}={getattr(arguments, name)} must be at least 1")
        earlier = [Grid(**json.loads(path.read_text())) for path in arguments.beside]
        mesh = start_mesh(arguments.mesh)
        model = load_model(open_weights(arguments.weights), arguments.dtype, mesh)
        generator = Generator(ModelView.take(model, mesh))
        scorer = Scorer(generator, max(arguments.lengths), arguments.batch)
        prompts = load_prompts(arguments.weights)
        lines = filler_lines(arguments.haystack)
        haystacks = Haystacks(prompts, lines, arguments.others, arguments.seed)
        grid = measure(
            arguments.title or arguments.weights.resolve().name,
            haystacks,
            scorer,
            arguments.lengths,
            [depth / 100 for depth in arguments.depths],
            arguments.trials,
        )
        draw([*earlier, grid], arguments.out)
        arguments.out.with_suffix(".json").write_text(json.dumps(grid._asdict(), indent=2) + "\n")
    print_table(grid)
    print(f"wrote {arguments.out} and {arguments.out.with_suffix('.json')}")


def print_table(grid: Grid):
    """Length by length, the share found over all depths and the mean log-probability."""
    for column, length in enumerate(grid.lengths):
        found = np.mean([row[column] for row in grid.found])
        log_prob = np.mean([row[column] for row in grid.log_prob])
        print(f"{length:>9,} tokens: found {found:.2f}, log-probability {log_prob:.2f}")
    print(f"{grid.title}: mean {grid.mean:.2f}")


if __name__ == "__main__":
    main()
