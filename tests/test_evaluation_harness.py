"""lm-eval's tasks and requests with our model: equal to its recorded runs, question by question.

Needs lm-eval; what lies below it is tested without in test_evaluation.py.
"""

import dataclasses
import functools
import json
import sys

import numpy as np
import pytest
from reference.evaluation import CHECKPOINT, GOLDENS, RUNS, golden, prompts, scorer

pytest.importorskip("lm_eval", reason="pip install 'dsv3_jax[eval]'")

import datasets  # noqa: E402
import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from dsv3_jax.evaluation import __main__ as command  # noqa: E402
from dsv3_jax.evaluation import evaluate  # noqa: E402
from dsv3_jax.evaluation.harness import HarnessModel, find_tasks, parse_settings, run_tasks  # noqa: E402
from dsv3_jax.evaluation.local_tasks import mmlu_questions, write_local_tasks  # noqa: E402
from dsv3_jax.evaluation.perplexity import windows  # noqa: E402

LOGLIK = 2e-3  # nats
TASKS = ["tiny_mc", "tiny_ppl", "tiny_gen"]


@pytest.fixture(autouse=True)
def _data_sets_leave_nothing(tmp_path, monkeypatch):
    """And the recorded tasks name their files from their folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(GOLDENS)


def model(run: str) -> HarnessModel:
    return HarnessModel(scorer(), dataclasses.replace(prompts(), add_bos=run == "bos_default"))


@functools.cache
def found(run: str) -> dict:
    manager = find_tasks(TASKS, [GOLDENS / "tasks"])
    return lm_eval.simple_evaluate(model(run), tasks=TASKS, task_manager=manager, bootstrap_iters=0)


def samples(run: str, task: str) -> list[dict]:
    return sorted(found(run)["samples"][task], key=lambda sample: sample["doc_id"])


def test_the_folder_says_whether_prompts_begin_with_bos():
    assert prompts().add_bos


@pytest.mark.parametrize("run", RUNS)
def test_every_question(run):
    for sample, wanted in zip(samples(run, "tiny_mc"), golden(run)["mc"], strict=True):
        answers = sample["filtered_resps"]
        np.testing.assert_allclose([x[0] for x in answers], wanted["loglik"], atol=LOGLIK)
        assert [x[1] for x in answers] == wanted["is_greedy"]
        for metric in ("acc", "acc_norm", "acc_bytes"):
            assert sample[metric] == wanted[metric]


@pytest.mark.parametrize("run", RUNS)
def test_every_text(run):
    for sample, wanted in zip(samples(run, "tiny_ppl"), golden(run)["ppl"], strict=True):
        loglik, words = sample["word_perplexity"]
        assert loglik == pytest.approx(wanted["loglik"], rel=1e-4) and words == wanted["words"]
        assert sample["byte_perplexity"][1] == wanted["bytes"]


@pytest.mark.parametrize("run", RUNS)
def test_every_continuation(run):
    wanted = [x["text"] for x in golden(run)["gen"]]
    assert [sample["filtered_resps"][0] for sample in samples(run, "tiny_gen")] == wanted


@pytest.mark.parametrize("run", RUNS)
def test_the_aggregates(run):
    for task, numbers in golden(run)["aggregate"].items():
        for metric, value in numbers.items():
            name = metric if metric == "sample_len" else f"{metric},none"
            assert found(run)["results"][task][name] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_what_is_special(run):
    """Texts are split into the recorded ids, and score as they did."""
    seen, extra, tested = [], golden(run)["extra_loglikelihood"], model(run)
    inner = tested._loglikelihood_tokens
    tested._loglikelihood_tokens = lambda asked, disable_tqdm: seen.extend(asked) or inner(asked)
    asked = [Instance("loglikelihood", {}, (x["context"], x["continuation"]), 0) for x in extra]
    scores = tested.loglikelihood(asked)
    assert [list(ids) for _, *ids in seen] == [
        [x["context_ids"], x["continuation_ids"]] for x in extra
    ]
    np.testing.assert_allclose([x[0] for x in scores], [x["loglik"] for x in extra], atol=LOGLIK)


@pytest.mark.parametrize("n, most", [(0, 4), (1, 1), (4, 4), (5, 4), (11, 4), (7, 1), (9, 3)])
def test_windows_are_theirs(n, most):
    ids = list(range(1, n + 1))
    theirs = map(make_disjoint_window, get_rolling_token_windows(ids, 0, most, 1))
    assert windows(ids, 0, most) == [(tuple(context), tuple(new)) for context, new in theirs]


def test_chat():
    """The template writes bos itself; none comes on top."""
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tested = model("bos_default")
    tested.prompts = dataclasses.replace(tested.prompts, template=template)
    text = tested.apply_chat_template([{"role": "user", "content": "x"}])
    assert text == "<｜begin▁of▁sentence｜><user>x" and tested.chat_template(True) == template
    ids = tested.tok_encode(text)
    assert ids == model("nobos").tok_encode(text) and ids[0] == 0 != ids[1]


def test_requests():
    stop_rule, sampling = parse_settings(
        {"until": "\n", "max_gen_toks": 5, "temperature": 0.7}, (1,)
    )
    assert (stop_rule.max_new, stop_rule.until, stop_rule.stop_ids) == (5, ("\n",), (1,))
    assert sampling.temperature == 0.7
    stop_rule, sampling = parse_settings({"do_sample": False, "temperature": 0.7}, ())
    assert (stop_rule.max_new, stop_rule.until, sampling.temperature) == (256, (), 0.0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 4}, "generation_kwargs num_beams cannot be followed"),
        ({"do_sample": True}, "needs a temperature above 0"),
        ({"max_gen_toks": 160}, "no room for a prompt in max_length=160"),
    ],
)
def test_bad_requests(settings, message):
    with pytest.raises(ValueError, match=message):
        model("nobos").completions([("x", settings)])


# Tasks that come along


def test_mmlu_questions():
    """281 of 57 subjects; the answer is one of four letters, and the text ends where it stands."""
    questions = list(mmlu_questions())
    subjects = {
        question["prompt"].partition(" about ")[2].partition(".")[0] for question in questions
    }
    assert len(questions) == 281 and len(subjects) == 57
    for question in questions:
        lines = question["prompt"].split("\n")
        assert [line[:3] for line in lines[-5:-1]] == ["A. ", "B. ", "C. ", "D. "]
        assert lines[-1] == "Answer:" and question["choices"] == list("ABCD")
    anatomy = next(q for q in questions if "contains the pituitary gland" in q["prompt"])
    assert anatomy["answer"] == 1 and "\nB. Cranial\n" in anatomy["prompt"]


def test_rows_of_mmlu(tmp_path):
    """Each metric with its number of questions, error, and what guessing would score."""
    write_local_tasks(["mmlu_dev"], tmp_path)
    manager = find_tasks(["mmlu_dev"], [tmp_path])
    rows = run_tasks(model("nobos"), ["mmlu_dev"], manager, limit=2, chat=False)
    assert [row.metric for row in rows] == ["acc", "acc_norm", "acc_mutual_info"]
    for row in rows:
        assert (row.task, row.questions, row.chance) == ("mmlu_dev", 2, 0.25)
        assert row.value in (0.0, 0.5, 1.0) and row.stderr is not None


@pytest.mark.slow  # lm-eval reads all of its own tasks
def test_unknown_task(monkeypatch):
    monkeypatch.setattr(
        "dsv3_jax.evaluation.evaluate.load_model", None
    )  # found out before weights are read
    arguments = ["evaluation", f"--weights={CHECKPOINT}", "--tasks=tiny_mcc", "--include=tasks"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit:
        command.main()
    assert exit.value.code == "error: there is no task 'tiny_mcc'; did you mean 'tiny_mc'?"


def test_the_command(monkeypatch, capsys):
    """All but the model, which is compiled already."""
    monkeypatch.setattr(evaluate, "load_model", lambda source, dtype, mesh: None)
    monkeypatch.setattr(evaluate.ModelView, "take", lambda model, mesh: None)
    monkeypatch.setattr(evaluate, "Generator", lambda view, multiple: None)
    monkeypatch.setattr(evaluate, "Scorer", lambda generator, max_length, batch: scorer())
    arguments = [
        "evaluation",
        f"--weights={CHECKPOINT}",
        "--data=tasks/ppl.jsonl",
        "--text-field=page",
        "--tasks=tiny_mc",
        "--include=tasks",
        "--batch=8",
        "--limit=4",
        "--bos=no",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    report = json.loads(capsys.readouterr().out)
    costs = report["perplexity"]["tasks/ppl.jsonl"]
    nats = -sum(text["loglik"] for text in golden("nobos")["ppl"][:4])
    assert costs["documents"] == 4 and costs["nats"] == pytest.approx(nats, rel=1e-4)
    rows = {row["metric"]: row for row in report["tasks"]}
    right = [question["acc"] for question in golden("nobos")["mc"][:4]]
    assert rows["acc"]["value"] == pytest.approx(np.mean(right)) and rows["acc"]["questions"] == 4
    assert rows["acc"]["chance"] == 0.25
