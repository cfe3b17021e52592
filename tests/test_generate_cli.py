"""`python -m dsv3_jax.generate`: what it prints, for every kind of folder, and its errors."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from reference.cases import CONFIG, build
from reference.train_command import ROOT, command

from dsv3_jax import generate, save_pretrained
from dsv3_jax.data.chat import Prompts
from dsv3_jax.data.tokenizer import Tokenizer, train_bpe
from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.serving.generator import Generator, Step
from dsv3_jax.serving.sampling import Sampling

PROMPTS = ["The list of", "A"]
N_NEW = 5
SMALL = {"n_layers": 1, "n_dense": 0, "mtp_depth": 0}


@functools.cache
def tokenizer() -> Tokenizer:
    """The bytes, end of text, and 12 merges."""
    texts = [path.read_text() for path in (ROOT / "dsv3_jax").glob("*.py")]
    made = train_bpe(texts, 256 + 1 + 12)
    assert made.vocab_size == 256 + 1 + 12
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random model with its tokenizer."""
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer().vocab_size, **SMALL)
    model, _ = build(lambda: DeepSeekV3(config, Policy(), rngs=nnx.Rngs(0)))
    path = tmp_path_factory.mktemp("weights") / "model"
    save_pretrained(model, path, "float32")
    tokenizer().save(path / "tokenizer.json")
    return path


def run(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    generate.main()


def asked(weights: Path, *more: str, prompts=PROMPTS) -> list[str]:
    return [f"--weights={weights}", *(f"--prompt={text}" for text in prompts), *more]


def test_prompts_and_their_continuations_in_order(folder, monkeypatch, capsys):
    seen = []

    class Spied(Generator):
        def __call__(self, prompts, *arguments):
            assert prompts == [tokenizer().encode(text) for text in PROMPTS]
            for step in super().__call__(prompts, *arguments):
                seen.append(step.tokens)
                yield step

    monkeypatch.setattr("dsv3_jax.serving.generator.Generator", Spied)
    run(monkeypatch, *asked(folder, f"--max-new={N_NEW}", "--ignore-eos"))
    rows = np.stack(seen, axis=1)
    assert rows.shape == (2, N_NEW) and (rows[0] != rows[1]).any()
    new = [tokenizer().decode(row.tolist()) for row in rows]
    assert all(new)
    assert capsys.readouterr().out == f"{PROMPTS[0]}{new[0]}\n\n{PROMPTS[1]}{new[1]}\n"


def test_chat(folder, tmp_path, monkeypatch, capsys):
    """The model reads what the template makes of it; the answer stands under the question."""
    weights, asked_for = copied(folder, tmp_path), []
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<answer>{% endfor %}"
    (weights / "chat_template.jinja").write_text(template)

    def answer(ids, *arguments):
        asked_for.append((ids, *arguments))
        yield Step(np.array([ids_of("x")[0], ids_of("y")[0]]), np.array([False, False]))

    monkeypatch.setattr("dsv3_jax.serving.generator.Generator", lambda view, fp8_cache: answer)
    run(monkeypatch, *asked(weights, "--max-new=7", "--chat", "--seed=3", "--temperature=2"))
    assert capsys.readouterr().out == f"{PROMPTS[0]}\nx\n\n{PROMPTS[1]}\ny\n"
    ids = [tokenizer().encode(f"<user>{text}<answer>") for text in PROMPTS]
    assert asked_for == [(ids, 7, Sampling(temperature=2.0), (0,), 3)]


def copied(folder: Path, tmp_path: Path, without: str = "") -> Path:
    """The folder once more, without one file."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != without:
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


# Printing, with tokens from a list instead of a model


def show(capsys, texts: list[str], rows: list[list[int]], stop_ids=(0,)) -> list[str]:
    """What `generate.show` has printed before each step, and after the last one."""
    prompts, seen, done = Prompts(tokenizer(), None, {}, False, stop_ids), [], False

    def steps():
        nonlocal done
        for i in range(len(rows[0])):
            seen.append(capsys.readouterr().out)
            ids = np.array([row[i] for row in rows])
            done = done | np.isin(ids, stop_ids)
            yield Step(ids, done)

    generate.show(texts, steps(), prompts, stop_ids)
    return [*seen, capsys.readouterr().out]


def ids_of(text: str) -> list[int]:
    """One id a byte: merges come later in the vocabulary."""
    single = {tokenizer().decode([i]): i for i in range(1, 257)}
    return [single[c] for c in text] if text.isascii() else tokenizer().encode(text)


def test_text_is_printed_before_the_next_token_is_asked_for(capsys):
    assert show(capsys, ["Q: "], [ids_of("abc")]) == ["", "Q: a", "b", "c\n"]


def test_the_first_unfinished_text_grows_and_others_wait(capsys):
    rows = [[*ids_of("ab"), 0, *ids_of("zz")], [0, *ids_of("zzzz")], ids_of("vwxyz")]
    printed = show(capsys, ["1", "2", "3"], rows)
    assert printed == ["", "1a", "b", "\n\n2\n\n3vwx", "y", "z\n"]


def test_what_comes_after_the_end_is_left_out(capsys):
    assert "".join(show(capsys, ["1"], [[*ids_of("a"), 0]])) == "1a\n"
    shown = "".join(show(capsys, ["1"], [[*ids_of("a"), 0]], stop_ids=()))
    assert shown == "1a<|endoftext|>\n"


def test_a_character_of_several_tokens(capsys):
    ids = ids_of("é")
    assert len(ids) == 2
    assert show(capsys, [""], [[*ids, *ids_of("a")]]) == ["", "", "é", "a\n"]


@pytest.mark.parametrize("last", [0, 100])
def test_a_broken_character_at_the_end_is_shown(capsys, last):
    """Whether the row ends there with a stop id or with the last step."""
    broken = ids_of("é")[:1]
    rows = [[*ids_of("a"), *broken, last][: 3 - (last != 0)]]
    assert "".join(show(capsys, ["1"], rows)) == "1a\N{REPLACEMENT CHARACTER}\n"


def test_a_broken_character_of_a_row_that_ended_early(capsys):
    rows = [[*ids_of("é")[:1], 0, 0], [*ids_of("abc")]]
    assert "".join(show(capsys, ["1", "2"], rows)) == "1\N{REPLACEMENT CHARACTER}\n\n2abc\n"


# Help and errors


def test_help_shows_how(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "--help")
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert out.count("python -m dsv3_jax.generate --weights") >= 2 and "--top-p" in out


@pytest.mark.parametrize(
    "missing, arguments, message",
    [
        ("config.json", [], "config.json does not exist; a folder with weights holds"),
        ("model.safetensors", [], "safetensors"),
        ("tokenizer.json", [], "tokenizer.json does not exist; copy the model's"),
        ("", ["--temperature=-1"], "temperature=-1.0 must be 0"),
        ("", ["--top-p=0"], "top_p=0.0 must be above 0"),
        ("", ["--max-new=0"], "max_new=0 must be at least 1"),
        ("", ["--prompt="], "every prompt needs at least one token"),
        ("", ["--chat"], "no (default) chat template"),
        ("", ["--mesh=dp4,xp8"], "'xp8' is not understood"),
    ],
)
def test_errors_come_in_one_line_and_before_the_weights_are_read(
    folder, tmp_path, monkeypatch, missing, arguments, message
):
    monkeypatch.setattr("dsv3_jax.weights.pretrained.load_model", None)
    weights = copied(folder, tmp_path, missing) if missing else folder
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *asked(weights, *arguments))
    assert exit.value.code.startswith("error: ") and message in exit.value.code
    assert "\n" not in exit.value.code


def test_tokenizer_of_another_model(folder, tmp_path, monkeypatch):
    weights = copied(folder, tmp_path, "tokenizer.json")
    other = train_bpe([Path(__file__).read_text()], 256 + 1 + 40)
    other.save(weights / "tokenizer.json")
    with pytest.raises(SystemExit, match="outside the vocabulary of 269: the tokenizer is not"):
        run(monkeypatch, *asked(weights, prompts=[other.decode([296])]))


def test_exit_code(tmp_path):
    module = [sys.executable, "-m", "dsv3_jax.generate"]
    done = subprocess.run(
        [*module, *asked(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_workdir_of_train(tmp_path, programs):
    """In fresh processes, the continuation on a mesh as well."""
    workdir = tmp_path / "run"
    subprocess.run(command(workdir, 2), check=True, capture_output=True)
    module = [sys.executable, "-m", "dsv3_jax.generate", "--max-new=6", "--temperature=0.5"]
    texts = []
    for mesh in ([], ["--mesh=dp2,ep2"]):
        run = [*module, *asked(workdir, *mesh)]
        out = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=True).stdout
        texts.append(out[out.index(PROMPTS[0]) :])
    first, second = texts[0].split(f"\n\n{PROMPTS[1]}")
    assert len(first) > len(PROMPTS[0]) and len(second) > 1 and second.endswith("\n")
    assert texts[1] == texts[0]
