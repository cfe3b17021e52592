"""Text in which things have to be looked up: facts between lines of filler, said again later.

    python -m dsv3_jax.data.needles --out runs/needles
    python train.py --set data.source=runs/needles --workdir=runs/needle_base --set ...

A document gives every name that occurs in it a value, "Remember list 47.", and says so again
later, near and far. Values are drawn anew for every document, so the second time one is predicted
by whoever finds the first. `dsv3_jax.evaluation.needle` asks in the same words, for names that no
document gives a value to.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from dsv3_jax.data.source import documents

# Words of the instant corpus. Of every five the first has no fact in any document.
WORDS = """
    list object string class function method module value type name
    line file argument attribute exception statement instance sequence expression dictionary
    version pattern block number namespace example key definition result keyword
    character item section base assignment tuple context implementation case target
    variable syntax order identifier form operation comparison length mapping point
    reference integer parameter descriptor range operator frame interpreter access scope
    index slice body match element buffer path error thing message
    thread process socket queue event server client option parser header
""".split()
ASKED = tuple(WORDS[::5])
TOLD = tuple(word for word in WORDS if word not in ASKED)
WORD = re.compile(r"(?<!\S)[^\W\d_]+[.,:;]?(?!\S)")  # between blanks
LEAST_WORDS = 5  # in a line of filler
VALUES = tuple(str(number) for number in range(10, 100))


def begun(name: str) -> str:
    """A fact up to its value: the question."""
    return f"Remember {name}"


def fact(name: str, value: str) -> str:
    return f"{begun(name)} {value}."


def filler(source: str) -> list[str]:
    """Lines of a source that read like sentences; the source is named as in `data.source`.

    Raises:
        ValueError: there are none.
    """
    texts = (text for _, text in documents(source, "text"))
    lines = (line.strip() for text in texts for line in text.split("\n"))
    found = [line for line in lines if len(WORD.findall(line)) >= LEAST_WORDS]
    if not found:
        raise ValueError(
            f"--filler={source}: no line of {LEAST_WORDS} words or more in it; name a text in prose"
        )
    return found


def document(rng: np.random.Generator, lines: list[str], size: int) -> str:
    """Facts and filler, about `size` characters of them.

    How many names there are, and how much filler, differs from document to document, both evenly in
    the logarithm: so a fact is said again at all distances.
    """
    n_names = int(log_uniform(rng, 2, 33))
    values = dict(zip(rng.permutation(TOLD)[:n_names], rng.choice(VALUES, n_names), strict=True))
    facts = [fact(*pair) for pair in values.items()]
    between, place = log_uniform(rng, 0.02, 5.0), int(rng.integers(len(lines)))
    said, length = [], 0
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


def generate(lines: list[str], n_documents: int, size: int, seed: int) -> Iterator[str]:
    """The documents of a seed, one after the other."""
    for number in range(n_documents):
        yield document(np.random.default_rng([seed, number]), lines, size)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.data.needles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for needles.jsonl")
    add("--filler", default="instant", help="text between the facts: as data.source (default: it)")
    add("--documents", type=int, default=1500, help="how many (default: %(default)s)")
    add("--size", type=int, default=20_000, help="characters of each (default: %(default)s)")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    try:
        lines = filler(arguments.filler)
        arguments.out.mkdir(parents=True, exist_ok=True)
        texts = generate(lines, arguments.documents, arguments.size, arguments.seed)
        quiet = not Console().is_terminal
        with (arguments.out / "needles.jsonl").open("w", encoding="utf-8") as file:
            for text in track(texts, "writing", total=arguments.documents, disable=quiet):
                file.write(json.dumps({"text": text}) + "\n")
        print(f"wrote {arguments.out / 'needles.jsonl'}: {arguments.documents:,} documents")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
