"""Text in which things have to be looked up: facts between lines of filler, repeated later.

    python -m dsv3_jax.data.needles --out runs/needles
    python train.py --workdir=runs/needle_base --set data.source=runs/needles

A document gives a name a value, "Remember object 17.", and repeats that later, near and far. The
values are drawn anew for every document, so from the second time on a model can predict them only
by finding an earlier one. `dsv3_jax.evaluation.needle` asks in the same words. With more than one
name a reader must also tell facts apart, which tiny models learn only slowly; so they do with
filler that is hard to predict, which drowns the facts.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsv3_jax.data.text import read_documents
from dsv3_jax.errors import errors_as_messages
from dsv3_jax.progress import bar

# One token each in a vocabulary that was learned from such text, and so are the values.
NAMES = """
    object string class function module value type name
    file argument attribute exception instance sequence expression dictionary
    pattern block number namespace key definition result keyword
    item section base assignment context implementation case target
""".split()
PLAIN = """
Rain fell on the roof all night.
The boat is tied to the pier.
A dog sleeps beside the door.
Nobody has opened the window today.
The road goes over the hill.
Bread is cooling on the table.
""".strip().split("\n")
WORD = re.compile(r"(?<!\S)[^\W\d_]+[.,:;]?(?!\S)")  # between blanks
FILLER_HELP = 'text between the facts: a source, as data.source, or "plain" for six sentences'
MIN_WORDS = 5  # in a line of filler
VALUES = tuple(str(number) for number in range(10, 30))


def fact(name: str, value: str) -> str:
    """Return the sentence that gives a name its value."""
    return f"{fact_prefix(name)} {value}."


def fact_prefix(name: str) -> str:
    """Return the sentence up to the value, with which a question ends."""
    return f"Remember {name}"


def filler_lines(source: str) -> list[str]:
    """Return the lines of a source that read like sentences.

    Args:
        source: what `data.source` takes, or "plain" for six lines that a model soon predicts.

    Raises:
        ValueError: there are none.
    """
    if source == "plain":
        return PLAIN
    texts = (text for _, text in read_documents(source, "text", "refuse"))
    lines = (line.strip() for text in texts for line in text.split("\n"))
    found = [line for line in lines if len(WORD.findall(line)) >= MIN_WORDS]
    if not found:
        raise ValueError(
            f"--filler={source}: no line of {MIN_WORDS} words or more in it; name a text in prose"
        )
    return found


def generate_documents(
    lines: list[str], n_documents: int, seed: int, *, size: int, max_names: int, max_gap: float
) -> Iterator[str]:
    """Yield the documents of a seed; the arguments are those of `make_document`."""
    for number in range(n_documents):
        yield make_document(np.random.default_rng([seed, number]), lines, size, max_names, max_gap)


def make_document(
    rng: np.random.Generator, lines: list[str], size: int, max_names: int, max_gap: float
) -> str:
    """Make a document of facts and filler.

    The number of names and the amount of filler differ from document to document, both evenly in
    the logarithm, so that facts are repeated at all distances.

    Args:
        lines: the filler, which comes in order from anywhere.
        size: characters, exceeded by less than a line.
        max_gap: most lines of filler between two facts, on average; a thousandth is the least.
    """
    n_names = int(log_uniform(rng, 1, max_names + 1))
    values = dict(zip(rng.permutation(NAMES)[:n_names], rng.choice(VALUES, n_names), strict=True))
    facts = [fact(*pair) for pair in values.items()]
    gap = log_uniform(rng, max_gap / 1000, max_gap) if max_gap else 0.0
    next_line, document, length = int(rng.integers(len(lines))), [], 0
    while length < size:
        if rng.random() * (1.0 + gap) < 1.0:
            document.append(facts[rng.integers(n_names)])
        else:
            document.append(lines[next_line % len(lines)])
            next_line += 1
        length += len(document[-1]) + 1
    return "\n".join(document)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.data.needles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for needles.jsonl")
    add("--filler", default="plain", help=f"{FILLER_HELP} (default: %(default)s)")
    add("--documents", type=int, default=600, help="how many (default: %(default)s)")
    add("--size", type=int, default=60_000, help="characters of each (default: %(default)s)")
    add("--names", type=int, default=1, help="most in a document (default: %(default)s)")
    add(
        "--between",
        type=float,
        default=500.0,
        help="most lines of filler between two facts, on average (default: %(default)s)",
    )
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    with errors_as_messages():
        texts = generate_documents(
            filler_lines(arguments.filler),
            arguments.documents,
            arguments.seed,
            size=arguments.size,
            max_names=arguments.names,
            max_gap=arguments.between,
        )
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / "needles.jsonl"
        with (
            path.open("w", encoding="utf-8") as file,
            bar("writing", arguments.documents) as advance,
        ):
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
                advance(1)
        print(f"wrote {path}: {arguments.documents:,} documents")


if __name__ == "__main__":
    main()
