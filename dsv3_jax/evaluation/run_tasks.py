"""lm-eval's tasks by name, run with our model: a row of numbers for every metric."""

import dataclasses
import logging
from pathlib import Path

import datasets
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from dsv3_jax.errors import did_you_mean
from dsv3_jax.evaluation.harness import HarnessModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    questions: int
    chance: float | None  # mean of 1 / choices, where the metric is a share of right choices


def find_tasks(names: list[str], include: list[Path]) -> TaskManager:
    """Where `names` are found: the folders first, lm-eval's own tasks if that is not enough.

    Raises:
        KeyError: there is no such task; gives the nearest name.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    folders = [str(path) for path in include]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if set(names) - set(manager.all_tasks):
        manager = TaskManager(include_path=folders, include_defaults=True)
    known = {*manager.all_tasks, "mmlu_dev", "wordnet"}
    for name in names:
        if name not in known:
            raise KeyError(f"there is no task {name!r}; {did_you_mean(name, known)}")
    return manager


def run_tasks(
    model: HarnessModel, names: list[str], manager: TaskManager, limit: int | None, chat: bool
) -> list[Row]:
    """Every metric of every task, and of the tasks of a group.

    Args:
        limit: most questions of a task.
        chat: put every question in the model's chat template.
    """
    found = simple_evaluate(
        model,
        tasks=names,
        task_manager=manager,
        limit=limit,
        apply_chat_template=chat,
        bootstrap_iters=1000,
    )
    results, samples = found["results"], found["samples"]
    return [row for name in results for row in _rows(name, results[name], samples.get(name, []))]


def _rows(task: str, numbers: dict, samples: list[dict]) -> list[Row]:
    """The metrics among `numbers`, which lm-eval names "metric,filter"."""
    rows = []
    for name, value in numbers.items():
        metric, _, rule = name.partition(",")
        if not rule or metric.endswith("_stderr"):
            continue
        stderr = numbers.get(f"{metric}_stderr,{rule}")
        rows.append(
            Row(
                task=task,
                metric=metric if rule == "none" else f"{metric}, {rule}",
                value=float(value),
                stderr=stderr if isinstance(stderr, float) else None,  # "N/A" where unknown
                questions=int(numbers.get("sample_len", len(samples))),
                chance=_chance(samples) if metric.startswith("acc") else None,
            )
        )
    return rows


def _chance(samples: list[dict]) -> float | None:
    """What guessing scores, None where the questions have no choices."""
    shares = []
    for sample in samples:
        asked = {argument[1] for argument in sample["arguments"] if isinstance(argument[1], str)}
        if len(asked) < 2:
            return None
        shares.append(1 / len(asked))
    return sum(shares) / len(shares) if shares else None
