"""Needle in a haystack: does a model find one sentence in a long text (report sec. 4.3, figure 8)?

    python -m dsv3_jax.evaluation.needle --weights runs/tiny_long --lengths=128,256,512,1024
    python -m dsv3_jax.evaluation.needle --weights ~/DeepSeek-V3 --mesh=ep8 --dtype=bfloat16 \\
        --lengths=4096,32768,131072 --trials=4 --batch=1 --others=9

The text is filler with one fact at some depth, "Remember object 17.", and ends with the same
words again up to the value. A needle counts as found if the likeliest tokens are the value's, all
of them. Every cell of the heat map is the fraction found of `--trials` texts, which the seed
decides. `--out` is the picture; beside it lies a .json with these fractions and the mean
log-probabilities of the values. `--beside=EARLIER.json`, which may be repeated, draws earlier
results left of this one.
"""

import argparse
import functools
import json
import typing
from pathlib import Path

import numpy as np

from dsv3_jax.cli import add_model_options
from dsv3_jax.data.needles import FILLER_HELP, filler_lines
from dsv3_jax.errors import errors_as_messages

if typing.TYPE_CHECKING:
    from dsv3_jax.evaluation.haystack import Grid


def parse_numbers(kind: type, minimum: float, maximum: float, text: str) -> list:
    """Parse the numbers in a comma-separated text; argparse shows the error."""
    values = [kind(part) for part in text.split(",")]
    if not all(minimum <= number <= maximum for number in values):
        raise argparse.ArgumentTypeError(f"{text}: every number must lie in {minimum}..{maximum}")
    return values


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.evaluation.needle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add = parser.add_argument
    lengths = functools.partial(parse_numbers, int, 1, float("inf"))
    depths = functools.partial(parse_numbers, float, 0, 100)
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
        grid = measure_and_draw(arguments)
    print_table(grid)
    print(f"wrote {arguments.out} and {arguments.out.with_suffix('.json')}")


def measure_and_draw(arguments: argparse.Namespace) -> "Grid":
    """Measure the grid that the command line names, and write its picture and numbers."""
    # Imported here, as --help needs neither JAX nor matplotlib.
    from dsv3_jax.data.chat import load_prompts
    from dsv3_jax.evaluation.haystack import Grid, Haystacks, measure
    from dsv3_jax.evaluation.heat_map import draw
    from dsv3_jax.evaluation.scorer import Scorer
    from dsv3_jax.serving.generator import Generator
    from dsv3_jax.serving.model_view import ModelView
    from dsv3_jax.weights.pretrained import load_model, start_mesh
    from dsv3_jax.weights.sources import open_weights

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
    grid = measure(
        arguments.title or arguments.weights.resolve().name,
        Haystacks(prompts, lines, arguments.others, arguments.seed),
        scorer,
        arguments.lengths,
        [depth / 100 for depth in arguments.depths],
        arguments.trials,
    )
    draw([*earlier, grid], arguments.out)
    arguments.out.with_suffix(".json").write_text(json.dumps(grid._asdict(), indent=2) + "\n")
    return grid


def print_table(grid: "Grid"):
    """Print, per length, the fraction found over all depths and the mean log-probability."""
    for column, length in enumerate(grid.lengths):
        found = np.mean([row[column] for row in grid.found])
        log_prob = np.mean([row[column] for row in grid.log_prob])
        print(f"{length:>9,} tokens: found {found:.2f}, log-probability {log_prob:.2f}")
    print(f"{grid.title}: mean {grid.mean:.2f}")


if __name__ == "__main__":
    main()
