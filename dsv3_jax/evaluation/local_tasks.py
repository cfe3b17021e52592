"""Two tasks that need no download of a data set, written as files for lm-eval.

mmlu_dev   the questions of MMLU's dev split that the package lm-eval holds as worked examples: 281
           with four choices, of 57 subjects. Models may have seen them, and their number is small:
           a score here is no MMLU score.
wordnet    which of WordNet's 26 categories of nouns a definition belongs to, as many questions of
           each, so that a constant answer scores 1 of 26.
"""

import importlib.resources
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

WORDNET = Path("/usr/share/wordnet")  # where Debian's package wordnet-base puts it
PER_CATEGORY = 40  # questions; the smallest category has 42 definitions
CATEGORIES = (  # of data.noun's lexicographer files 03 to 28, in this order
    "concept act animal artifact attribute body cognition communication event feeling food group "
    "location motive object person phenomenon plant possession process quantity relation shape "
    "state substance time"
).split()
FIRST_FILE = 3
CHOICES = re.compile(r"(.*?)\s*\(A\)(.*?)\(B\)(.*?)\(C\)(.*?)\(D\)(.*)", re.DOTALL)


def write_local_tasks(names: list[str], folder: Path, wordnet: Path = WORDNET) -> list[str]:
    """Write the tasks of this module among `names` into `folder`, and return their names."""
    records = {"mmlu_dev": mmlu_questions, "wordnet": lambda: wordnet_questions(wordnet)}
    written = [name for name in dict.fromkeys(names) if name in records]
    for name in written:
        _write_task(folder, name, list(records[name]()))
    return written


def _write_task(folder: Path, name: str, records: list[dict]):
    """Write a multiple-choice task of {"prompt", "choices", "answer"}, and its data."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    metrics = ("acc", "acc_norm", "acc_mutual_info")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML, too


def mmlu_questions() -> Iterator[dict]:
    """Yield the worked examples with four choices, as MMLU asks them."""
    folder = importlib.resources.files("lm_eval") / "tasks/mmlu/flan_cot_fewshot"
    paths = (path for path in folder.iterdir() if re.fullmatch(r"mmlu_.*\.yaml", path.name))
    for path in sorted(paths, key=lambda path: path.name):
        subject = path.name.removeprefix("mmlu_").removesuffix(".yaml").replace("_", " ")
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        for example in task["fewshot_config"]["samples"]:
            parts = CHOICES.fullmatch(example["question"])
            answer = re.search(r"The answer is \(([ABCD])\)", example["target"])
            if parts is None or answer is None or "(E)" in example["question"]:
                continue  # one question has five choices
            question, *texts = (text.strip() for text in parts.groups())
            texts = (" ".join(text.split()) for text in texts)  # a line each
            choices = "".join(f"\n{a}. {text}" for a, text in zip("ABCD", texts, strict=True))
            start = f"The following is a multiple choice question (with answer) about {subject}."
            yield {
                "prompt": f"{start}\n\n{question}{choices}\nAnswer:",
                "choices": list("ABCD"),
                "answer": "ABCD".index(answer[1]),
            }


def wordnet_questions(folder: Path) -> Iterator[dict]:
    """Yield `PER_CATEGORY` definitions of each category, in turns: any number of them is balanced.

    Raises:
        FileNotFoundError: no data.noun there.
        ValueError: a category has too few definitions.
    """
    path = folder / "data.noun"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; the task wordnet needs WordNet's database: name its folder "
            "with --wordnet, or install Debian's package wordnet-base"
        )
    definitions: list[list[str]] = [[] for _ in CATEGORIES]
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):  # the licence stands in front, indented
            fields, _, gloss = line.partition(" | ")
            category = int(fields.split()[1]) - FIRST_FILE
            definitions[category].append(gloss.partition('; "')[0].strip())
    rng = random.Random(0)
    for name, found in zip(CATEGORIES, definitions, strict=True):
        if len(found) < PER_CATEGORY:
            raise ValueError(
                f"{path}: {len(found)} definitions of {name}, fewer than {PER_CATEGORY}; take the "
                "file as WordNet 3.0 has it"
            )
        rng.shuffle(found)
    for number in range(PER_CATEGORY):
        for category, found in enumerate(definitions):
            yield {
                "prompt": f"{found[number]}\nThis is a kind of",
                "choices": CATEGORIES,
                "answer": category,
            }
