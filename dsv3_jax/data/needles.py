"""Text in which things have to be looked up: facts between lines of filler, said again later.

    python -m dsv3_jax.data.needles --out runs/needles
    python train.py --workdir=runs/needle_base --set data.source=runs/needles

A document gives a name a value, "Remember object 17.", and says so again later, near and far. The
values are drawn anew for every document, so from the second time on they are predicted by whoever
finds an earlier one. `dsv3_jax.evaluation.needle` asks in the same words. With more than one name a
reader must also tell facts apart, which tiny models learn only slowly; so they do with filler that
is hard to predict, which drowns the facts.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsv3_jax.data.text import documents
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
FILLER = 'text between the facts: a source, as data.source, or "plain" for six sentences'
LEAST_WORDS = 5  # in a line of filler
VALUES = tuple(str(number) for number in range(10, 30))


def begun(name: str) -> str:
    """A fact up to its value: the question."""
    return f"Remember {name}"


def fact(name: str, value: str) -> str:
    return f"{begun(name)} {value}."


def filler(source: str) -> list[str]:
    """Lines of a source that read like sentences; of "plain" six that soon surprise no model.

    Args:
        source: "plain", or what `data.source` takes.

    Raises:
        ValueError: there are none.
    """
    if source == "plain":
        return PLAIN
    texts = (text for _, text in documents(source, "text", "refuse"))
    lines = (line.strip() for text in texts for line in text.split("\n"))
    found = [line for line in lines if len(WORD.findall(line)) >= LEAST_WORDS]
    if not found:
        raise ValueError(
            f"--filler={source}: no line of {LEAST_WORDS} words or more in it; name a text in prose"
        )
    return found


def document(
    rng: np.random.Generator, lines: list[str], size: int, names: int, between: float
) -> str:
    """Facts and filler, about `size` characters of them.

    How many names there are, and how much filler, differs from document to document, both evenly in
    the logarithm, so that a fact is said again at all distances.

    Args:
        names: most names.
        between: most lines of filler between two facts, on average; a thousandth is the least.
    """
    n_names = int(log_uniform(rng, 1, names + 1))
    values = dict(zip(rng.permutation(NAMES)[:n_names], rng.choice(VALUES, n_names), strict=True))
    facts = [fact(*pair) for pair in values.items()]
    between = log_uniform(rng, between / 1000, between) if between else 0.0
    place, said, length = int(rng.integers(len(lines))), [], 0
    while length < size:
        if rng.random() * (1.0 + between) < 1.0:
            said.append(facts[rng.integers(n_names)])
        else:
            said.append(lines[place % len(lines)])
            place += 1
        length += len(said[-1]) + 1
    return "\n".join(said)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def generate(lines: list[str], n_documents: int, seed: int, **how) -> Iterator[str]:
    """The documents of a seed, one after the other; `how` goes to `document`."""
    for number in range(n_documents):
        yield document(np.random.default_rng([seed, number]), lines, **how)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.data.needles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for needles.jsonl")
    add("--filler", default="plain", help=f"{FILLER} (default: %(default)s)")
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
        lines = filler(arguments.filler)
        arguments.out.mkdir(parents=True, exist_ok=True)
        how = {name: getattr(arguments, name) for name in ("size", "names", "between")}
        texts = generate(lines, arguments.documents, arguments.seed, **how)
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
