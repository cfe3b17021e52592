"""The work of `python -m dsv3_jax.evaluation`: perplexities and tasks, and their tables."""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import rich.console
import rich.table

from dsv3_jax.cli import table
from dsv3_jax.data.chat import Prompts, load_prompts
from dsv3_jax.data.text import read_documents
from dsv3_jax.evaluation.local_tasks import write_local_tasks
from dsv3_jax.evaluation.perplexity import perplexity
from dsv3_jax.evaluation.scorer import Scorer
from dsv3_jax.progress import bar
from dsv3_jax.serving.generator import Generator
from dsv3_jax.serving.model_view import ModelView
from dsv3_jax.weights.pretrained import load_model, start_mesh
from dsv3_jax.weights.sources import open_weights

MULTIPLE = 128  # tokens that prompts of continuations are padded to


def evaluate(arguments: argparse.Namespace) -> dict:
    """Evaluate as the command line says; all that needs no model is read and checked first."""
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit={arguments.limit} must be at least 1")
    names = [name.strip() for name in arguments.tasks.split(",")] if arguments.tasks else []
    mesh = start_mesh(arguments.mesh)
    source = open_weights(arguments.weights)
    prompts = _with_bos(load_prompts(source.directory), arguments.bos)
    texts = {data: _texts(data, arguments) for data in arguments.data}
    with tempfile.TemporaryDirectory() as folder:
        run = _prepare_tasks(names, arguments, Path(folder)) if names else None
        model = load_model(source, arguments.dtype, mesh)
        generator = Generator(ModelView.take(model, mesh), multiple=MULTIPLE)
        given = arguments.max_length
        max_length = source.max_length if given is None else given
        settings = {"weights": str(arguments.weights), "max_length": max_length}
        scorer = Scorer(generator, max_length, arguments.batch)
        perplexities = {
            name: perplexity(scorer, documents, prompts, bar).as_dict()
            for name, documents in texts.items()
        }
        scores = run(scorer, prompts) if run else []
    return settings | {"perplexity": perplexities, "tasks": scores}


def _with_bos(prompts: Prompts, bos: str | None) -> Prompts:
    if bos is None:
        return prompts
    if bos == "yes" and "bos_token" not in prompts.special_tokens:
        raise ValueError("--bos=yes: tokenizer_config.json names no bos_token")
    return dataclasses.replace(prompts, add_bos=bos == "yes")


def _texts(data: str, arguments: argparse.Namespace) -> list[str]:
    documents = read_documents(data, arguments.text_field, "refuse")
    return [text for _, text in documents][: arguments.limit]


def _prepare_tasks(
    names: list[str], arguments: argparse.Namespace, folder: Path
) -> Callable[[Scorer, Prompts], list[dict]]:
    """Find the tasks, before any weight is read, and return the function that runs them."""
    # Imported only here, as lm-eval may be missing.
    from dsv3_jax.evaluation.harness import HarnessModel, find_tasks, run_tasks

    write_local_tasks(names, folder, arguments.wordnet)
    manager = find_tasks(names, [folder, *arguments.include])

    def run(scorer: Scorer, prompts: Prompts) -> list[dict]:
        model = HarnessModel(scorer, prompts, bar)
        scores = run_tasks(model, names, manager, arguments.limit, arguments.chat)
        return [dataclasses.asdict(score) for score in scores]

    return run


def show(report: dict):
    """Print the report of `evaluate` as tables."""
    console = rich.console.Console(highlight=False)
    if report["perplexity"]:
        console.print(_perplexity_table(report["perplexity"]))
    if report["tasks"]:
        console.print(_task_table(report["tasks"]))


def _perplexity_table(texts: dict[str, dict]) -> rich.table.Table:
    columns = ("nats_per_token", "perplexity", "bits_per_byte")
    rows = [
        [
            name,
            f"{found['documents']:,}",
            f"{found['tokens']:,}",
            *(f"{found[column]:.4f}" for column in columns),
        ]
        for name, found in texts.items()
    ]
    header = ["held-out text", "documents", "tokens", "nats per token"]
    return table("", [*header, "perplexity", "bits per byte"], rows)


def _task_table(scores: list[dict]) -> rich.table.Table:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.4f}"

    rows = [
        [
            score["task"],
            score["metric"],
            *(number(score[name]) for name in ("value", "stderr", "chance")),
            f"{score['questions']:,}",
        ]
        for score in scores
    ]
    header = ["task", "metric", "value", "± standard error", "chance", "questions"]
    return table("", header, rows, n_text=2)
