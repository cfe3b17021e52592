"""How good a model is: perplexity of held-out text, and lm-eval's tasks.

    python -m dsv3_jax.evaluation --weights runs/tiny --data ~/texts/held-out
    python -m dsv3_jax.evaluation --weights runs/tiny --tasks mmlu_dev,wordnet
    python -m dsv3_jax.evaluation --weights ~/DeepSeek-V3 --mesh=ep8 --dtype=bfloat16 \\
        --include ~/tasks --tasks my_task --batch 64 --json

--data takes a file, a folder, a glob or JSON lines, and says how many nats a token costs the model,
and how many bits a byte: compare models with different tokenizers by the latter. Every document
stands alone, after one bos (or end of text); long ones are read in windows of --max-length, and
each token counts once.

--tasks takes names of the package lm-eval (pip install 'dsv3_jax[eval]'). Two need no data sets:
mmlu_dev (281 questions of MMLU's dev split; no MMLU score) and wordnet (definition to category; see
--wordnet). With --include come yours: a folder with task files as lm-eval reads them. Its built-in
tasks fetch their data sets. Read a value against chance and its standard error. acc takes the
likeliest choice, acc_norm the likeliest a letter, acc_mutual_info the one that the question makes
likelier the most, which suits small models.

Contexts longer than --max-length lose their beginning.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from dsv3_jax.cli import add_model_options
from dsv3_jax.data.chat import Prompts, load_prompts
from dsv3_jax.data.text import read_documents
from dsv3_jax.errors import errors_as_messages
from dsv3_jax.evaluation.local_tasks import WORDNET, write_own_tasks
from dsv3_jax.evaluation.perplexity import perplexity
from dsv3_jax.evaluation.report import show
from dsv3_jax.evaluation.scorer import Scorer
from dsv3_jax.progress import bar
from dsv3_jax.serving.generator import Generator
from dsv3_jax.serving.model_view import ModelView
from dsv3_jax.weights.pretrained import load_model, start_mesh
from dsv3_jax.weights.sources import open_weights

MULTIPLE = 128  # tokens that prompts of continuations are padded to


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--data", action="append", default=[], help="text for perplexity; may be repeated")
    add("--text-field", default="text", help="of JSON lines (default: %(default)s)")
    add("--tasks", help="names of tasks, with commas between")
    add("--include", type=Path, action="append", default=[], help="folder with task files")
    add("--wordnet", type=Path, default=WORDNET, help="folder of data.noun (default: %(default)s)")
    add("--limit", type=int, help="most documents of a text, most questions of a task")
    add("--batch", type=int, default=16, help="rows that run at once (default: %(default)s)")
    add("--max-length", type=int, help="most tokens to read (default: what it was trained for)")
    add("--bos", choices=("yes", "no"), help="begin prompts with bos (default: the folder's way)")
    add("--chat", action="store_true", help="put questions in the folder's chat template")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    if not arguments.data and not arguments.tasks:
        parser.error("nothing to do: give --data, --tasks or both")
    return arguments


def main():
    arguments = parse_arguments()
    with errors_as_messages():
        report = evaluate(arguments)
    print(json.dumps(report, indent=1)) if arguments.json else show(report)


def evaluate(arguments: argparse.Namespace) -> dict:
    """All that the command line asks for; what needs no model is read and checked first."""
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit={arguments.limit} must be at least 1")
    names = [name.strip() for name in arguments.tasks.split(",")] if arguments.tasks else []
    mesh = start_mesh(arguments.mesh)
    source = open_weights(arguments.weights)
    prompts = _with_bos(load_prompts(source.directory), arguments.bos)
    texts = {data: _texts(data, arguments) for data in arguments.data}
    with tempfile.TemporaryDirectory() as folder:
        run = _prepared(names, arguments, Path(folder)) if names else None
        model = load_model(source, arguments.dtype, mesh)
        generator = Generator(ModelView.take(model, mesh), multiple=MULTIPLE)
        given = arguments.max_length
        max_length = source.max_length if given is None else given
        settings = {"weights": str(arguments.weights), "max_length": max_length}
        scorer = Scorer(generator, max_length, arguments.batch)
        costs = _perplexities(texts, scorer, prompts)
        rows = run(scorer, prompts) if run else []
    return settings | {"perplexity": costs, "tasks": rows}


def _with_bos(prompts: Prompts, bos: str | None) -> Prompts:
    if bos is None:
        return prompts
    if bos == "yes" and "bos_token" not in prompts.special_tokens:
        raise ValueError("--bos=yes: tokenizer_config.json names no bos_token")
    return dataclasses.replace(prompts, add_bos=bos == "yes")


def _texts(data: str, arguments: argparse.Namespace) -> list[str]:
    return [text for _, text in read_documents(data, arguments.text_field, "refuse")][
        : arguments.limit
    ]


def _perplexities(texts: dict[str, list[str]], scorer: Scorer, prompts: Prompts) -> dict:
    return {name: perplexity(scorer, some, prompts, bar).as_dict() for name, some in texts.items()}


def _prepared(names: list[str], arguments: argparse.Namespace, folder: Path):
    """(scorer, prompts) -> rows, with the tasks found before any weight is read."""
    from dsv3_jax.evaluation.harness import HarnessModel  # only here, as lm-eval may be missing
    from dsv3_jax.evaluation.run_tasks import find_tasks, run_tasks

    write_own_tasks(names, folder, arguments.wordnet)
    manager = find_tasks(names, [folder, *arguments.include])

    def run(scorer: Scorer, prompts: Prompts) -> list[dict]:
        model = HarnessModel(scorer, prompts, bar)
        rows = run_tasks(model, names, manager, arguments.limit, arguments.chat)
        return [dataclasses.asdict(row) for row in rows]

    return run


if __name__ == "__main__":
    main()
