"""Measures of a model: perplexity of held-out text, and lm-eval's tasks.

    python -m dsv3_jax.evaluation --weights runs/tiny --data ~/texts/held-out
    python -m dsv3_jax.evaluation --weights runs/tiny --tasks mmlu_dev,wordnet
    python -m dsv3_jax.evaluation --weights ~/DeepSeek-V3 --mesh=ep8 --dtype=bfloat16 \\
        --include ~/tasks --tasks my_task --batch 64 --json

--data takes a file, a folder, a glob or JSON lines, and prints the model's nats per token
and bits per byte: compare models with different tokenizers by the latter. Every document
stands alone, after one bos (or end of text); long ones are read in windows of --max-length, and
each token counts once.

--tasks takes names of the package lm-eval (pip install 'dsv3_jax[eval]'). Two need no data sets:
mmlu_dev (281 questions of MMLU's dev split; no MMLU score) and wordnet (definition to category; see
--wordnet). With --include come yours: a folder with task files as lm-eval reads them. Its built-in
tasks fetch their data sets. Read a value against chance and its standard error. acc takes the
likeliest choice, acc_norm the likeliest per letter, acc_mutual_info the one that the question makes
likelier the most, which suits small models.

Contexts longer than --max-length lose their beginning.
"""

import argparse
import json
from pathlib import Path

from dsv3_jax.cli import add_model_options
from dsv3_jax.errors import errors_as_messages
from dsv3_jax.evaluation.local_tasks import WORDNET


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
        from dsv3_jax.evaluation.evaluate import evaluate, show  # JAX, which --help need not import

        report = evaluate(arguments)
    print(json.dumps(report, indent=1)) if arguments.json else show(report)


if __name__ == "__main__":
    main()
