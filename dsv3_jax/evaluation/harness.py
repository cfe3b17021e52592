"""Our model behind lm-eval's interface, and lm-eval's tasks run with it.

`python -m dsv3_jax.evaluation --tasks` is the command line.

Source: the package lm-eval, `pip install dsv3_jax[eval]`, whose numbers for the same weights by
transformers are the goldens of tests/test_evaluation.py.
"""

import dataclasses
import json
import logging
from pathlib import Path

from dsv3_jax.data.chat import Prompts
from dsv3_jax.errors import did_you_mean
from dsv3_jax.evaluation.completions import Completion, StopRule, generate_completions
from dsv3_jax.evaluation.perplexity import prefix_id, windows
from dsv3_jax.evaluation.scorer import Score, Scorer, ScoreRequest
from dsv3_jax.progress import Bar, no_bar
from dsv3_jax.serving.sampling import Sampling

try:
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"tasks need the package lm-eval ({error}); pip install 'dsv3_jax[eval]'"
    ) from error

MAX_NEW = 256  # tokens, where a task does not say
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(TemplateLM):
    """A model that answers lm-eval's three kinds of request.

    Args:
        prompts: tokenizer, chat template, and whether a plain prompt begins with bos.
        bar: shows progress.
    """

    def __init__(self, scorer: Scorer, prompts: Prompts, bar: Bar = no_bar):
        super().__init__()
        self.scorer, self.prompts, self.bar = scorer, prompts, bar

    @property
    def eot_token_id(self) -> int:
        return self.prompts.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return prefix_id(self.prompts)

    @property
    def tokenizer_name(self) -> str:
        """The name by which lm-eval's caches tell tokenizers apart."""
        return self.prompts.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        plain = add_special_tokens is False
        return self.prompts.tokenizer.encode(string) if plain else self.prompts.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.prompts.template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.prompts.render(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return (log-probability, is greedy) per (context, continuation), cut as by lm-eval."""
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-probability, is greedy) per (texts, context ids, continuation ids)."""
        ids = [ScoreRequest(tuple(context), tuple(new)) for _, context, new in requests]
        return [tuple(score) for score in self._score(ids)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each whole text.

        As lm-eval has it, the text stands after the prefix token and is encoded as a prompt: where
        prompts begin with bos, a second bos is scored.
        """
        texts = [
            windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.scorer.max_length)
            for request in requests
        ]
        scores = iter(self._score([window for text in texts for window in text]))
        return [sum(next(scores).log_prob for _ in text) for text in texts]

    def _score(self, requests: list[ScoreRequest]) -> list[Score]:
        with self.bar("log-probabilities", len(requests)) as advance:
            return self.scorer(requests, advance)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [completion.text for completion in self.completions([r.args for r in requests])]

    def completions(self, requests: list[tuple[str, dict]]) -> list[Completion]:
        """Return a continuation per (prompt, settings of a task's generation_kwargs)."""
        groups: dict[str, list[int]] = {}
        for index, (_, settings) in enumerate(requests):
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append(index)
        found: dict[int, Completion] = {}
        with self.bar("continuations", len(requests)) as advance:
            for settings, indices in groups.items():
                stop_rule, sampling = parse_settings(json.loads(settings), self.prompts.stop_ids)
                max_prompt = self._max_prompt(stop_rule.max_new)
                completions = generate_completions(
                    self.scorer.generator,
                    self.prompts.tokenizer,
                    [self.tok_encode(requests[index][0])[-max_prompt:] for index in indices],
                    stop_rule,
                    self.scorer.batch,
                    sampling,
                    advance,
                )
                found.update(zip(indices, completions, strict=True))
        return [found[index] for index in range(len(requests))]

    def _max_prompt(self, max_new: int) -> int:
        """Return how many tokens of a prompt leave room for the new ones."""
        max_prompt = self.scorer.max_length - max_new
        if max_prompt < 1:
            raise ValueError(
                f"a task asks for {max_new} new tokens, which leaves no room for a prompt in "
                f"max_length={self.scorer.max_length}; lower the task's max_gen_toks"
            )
        return max_prompt


def parse_settings(settings: dict, stop_ids: tuple[int, ...]) -> tuple[StopRule, Sampling]:
    """Translate a task's generation_kwargs.

    Raises:
        ValueError: a setting without a counterpart here.
    """
    settings = dict(settings)
    lengths = [settings.pop(name, None) for name in LENGTH_NAMES]
    until = settings.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    temperature = float(settings.pop("temperature", None) or 0.0)
    draws = settings.pop("do_sample", None)
    top_p = float(settings.pop("top_p", 1.0))
    if settings:
        raise ValueError(
            f"generation_kwargs {', '.join(settings)} cannot be followed; there are until, "
            "max_gen_toks, do_sample, temperature and top_p"
        )
    if draws and not temperature:
        raise ValueError("do_sample=true needs a temperature above 0 in generation_kwargs")
    stop_rule = StopRule(
        max_new=next((int(n) for n in lengths if n is not None), MAX_NEW),
        until=tuple(stop for stop in until if stop),
        stop_ids=stop_ids,
    )
    return stop_rule, Sampling(temperature=0.0 if draws is False else temperature, top_p=top_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    questions: int
    chance: float | None  # mean of 1 / choices, where the metric is a share of right choices


def find_tasks(names: list[str], include: list[Path]) -> TaskManager:
    """Return a manager that knows `names`: from the folders or, if need be, lm-eval's own tasks.

    Raises:
        KeyError: there is no such task; the message gives the nearest name.
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
) -> list[TaskScore]:
    """Return every metric of every task, and of the tasks of a group.

    Args:
        limit: most questions of a task.
        chat: put every question in the model's chat template.
    """
    report = simple_evaluate(
        model,
        tasks=names,
        task_manager=manager,
        limit=limit,
        apply_chat_template=chat,
        bootstrap_iters=1000,
    )
    results, samples = report["results"], report["samples"]
    return [
        row for name in results for row in _task_scores(name, results[name], samples.get(name, []))
    ]


def _task_scores(task: str, numbers: dict, samples: list[dict]) -> list[TaskScore]:
    """Return the metrics among `numbers`, which lm-eval names "metric,filter"."""
    rows = []
    for name, value in numbers.items():
        metric, _, filter_name = name.partition(",")
        if not filter_name or metric.endswith("_stderr"):
            continue
        stderr = numbers.get(f"{metric}_stderr,{filter_name}")
        rows.append(
            TaskScore(
                task=task,
                metric=metric if filter_name == "none" else f"{metric}, {filter_name}",
                value=float(value),
                stderr=stderr if isinstance(stderr, float) else None,  # "N/A" where unknown
                questions=int(numbers.get("sample_len", len(samples))),
                chance=_chance(samples) if metric.startswith("acc") else None,
            )
        )
    return rows


def _chance(samples: list[dict]) -> float | None:
    """Return the mean score of guessing, None where the questions have no choices."""
    chances = []
    for sample in samples:
        choices = {argument[1] for argument in sample["arguments"] if isinstance(argument[1], str)}
        if len(choices) < 2:
            return None
        chances.append(1 / len(choices))
    return sum(chances) / len(chances) if chances else None
