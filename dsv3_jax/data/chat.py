"""Prompts as the model of a checkpoint folder was trained on: plain text and conversations."""

import dataclasses
import datetime
import functools
import json
from pathlib import Path

import jinja2
from jinja2 import ext, sandbox
from tokenizers import decoders

from dsv3_jax.data.tokenizer import EOS_NAMES, Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The tokenizer, chat template and special tokens of a checkpoint folder."""

    tokenizer: Tokenizer
    template: str | None  # jinja2
    special_tokens: dict[str, str]  # bos_token, eos_token, pad_token ... as text
    add_bos: bool  # plain prompts begin with bos
    stop_ids: tuple[int, ...]  # ids that end a continuation

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a plain prompt, with one bos in front where the model expects it."""
        ids = self.tokenizer.encode(prompt)
        bos = [_id_of("bos_token", self.special_tokens, self.tokenizer)] if self.add_bos else []
        return ids if ids[: len(bos)] == bos else bos + ids

    def encode_chat(self, messages: object, **variables: object) -> list[int]:
        """Return the ids of `render`'s text; special tokens are read in messages, too."""
        return self.tokenizer.encode(self.render(messages, **variables))

    def render(self, messages: object, **variables: object) -> str:
        """Render the conversation by the template, up to where the assistant answers.

        Args:
            messages: list of {"role", "content"} dicts as a request holds it; checked here.
            variables: more names for the template, e.g. `tools` or `add_generation_prompt`.

        Raises:
            ValueError: no conversation, no template, or the template fails on this conversation.
        """
        given = {"add_generation_prompt": True, "tools": None, "documents": None}
        given |= self.special_tokens | variables | {"messages": check_messages(messages)}
        compiled = self._compiled
        try:
            return compiled.render(given)
        except Exception as error:  # a template is a foreign program: it can raise anything
            unsafe = isinstance(error, sandbox.SecurityError)
            what = "tried what is not allowed" if unsafe else "cannot write this conversation"
            raise ValueError(f"the chat template {what}: {error}") from error

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        if self.template is None:
            raise ValueError("this folder has no (default) chat template; use a plain prompt")
        try:
            return _environment().from_string(self.template)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"broken chat template, line {error.lineno}: {error}") from error


class StreamingDecoder:
    """Decodes ids that come one by one; pushes and flush join to the text of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.stream = decoders.DecodeStream(skip_special_tokens=False)
        self.ids: list[int] = []
        self.n_sent = 0  # characters

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes, up to the last whole character."""
        self.ids.append(token_id)
        text = self.stream.step(self.tokenizer.backend, token_id) or ""
        self.n_sent += len(text)
        return text

    def flush(self) -> str:
        """Return what was held back, broken characters as U+FFFD; no push may follow."""
        return self.tokenizer.decode(self.ids)[self.n_sent :]


def load_prompts(directory: str | Path) -> Prompts:
    """Load the prompts of a checkpoint folder; of its files only tokenizer.json must be there.

    Plain prompts begin with bos if tokenizer_config.json says add_bos_token or, where that is
    silent, if tokenizer.json adds it. A continuation ends at any eos id of generation_config.json,
    config.json and tokenizer_config.json or, without any, at the tokenizer's end of document.

    Raises:
        FileNotFoundError: no tokenizer.json.
        ValueError: a broken file, or a token that the tokenizer does not have.
    """
    folder = Path(directory)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; copy the model's tokenizer.json there")
    tokenizer = load_tokenizer(str(path))
    config = _json_object(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(config)
    add_bos = _adds_bos(tokenizer, special_tokens, config.get("add_bos_token"))
    stop_ids = _stop_ids(folder, tokenizer, special_tokens)
    return Prompts(tokenizer, _template(folder, config), special_tokens, add_bos, stop_ids)


def check_messages(messages: object) -> list[dict]:
    """Return `messages`, or raise a ValueError if they are no list of {"role", "content"} dicts."""
    shape = '{"role": text, "content": text, list of parts or null}'
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages={messages!r:.40} must be a list of one or more {shape}")
    for n, message in enumerate(messages):
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content", 0)
        if not isinstance(role, str) or not isinstance(content, str | list | None):
            raise ValueError(f"messages[{n}]={message!r:.40} must be {shape}")
    return messages


def _json_object(path: Path) -> dict:
    """Read the object in a JSON file, empty if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:  # broken JSON, or no UTF-8
        raise ValueError(f"{path} is no JSON ({error}); take the model's own file") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, but must be a JSON object")
    return content


def _special_tokens(config: dict) -> dict[str, str]:
    """Return every *_token of tokenizer_config.json that is a text or an AddedToken."""
    named = ((name, value) for name, value in config.items() if name.endswith("_token"))
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in named}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _template(folder: Path, config: dict) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _adds_bos(tokenizer: Tokenizer, special_tokens: dict[str, str], flag: bool | None) -> bool:
    added = tokenizer.backend.encode("", add_special_tokens=True).tokens[:1]
    add_bos = added == [special_tokens.get("bos_token")] if flag is None else flag
    if add_bos:
        _id_of("bos_token", special_tokens, tokenizer)  # there, or an error now
    return add_bos


def _stop_ids(
    folder: Path, tokenizer: Tokenizer, special_tokens: dict[str, str]
) -> tuple[int, ...]:
    ids: list[int] = []
    for path in (folder / "generation_config.json", folder / "config.json"):
        value = _json_object(path).get("eos_token_id")
        ids += value if isinstance(value, list) else [value] if value is not None else []
        if any(type(i) is not int for i in ids):
            raise ValueError(f"{path}: eos_token_id={value!r} must be an id or a list of ids")
    if "eos_token" in special_tokens:
        ids.append(_id_of("eos_token", special_tokens, tokenizer))
    elif not ids:
        ends = [tokenizer.backend.token_to_id(name) for name in EOS_NAMES]
        ids = [i for i in ends if i is not None][:1]
    return tuple(dict.fromkeys(ids))


def _id_of(name: str, special_tokens: dict[str, str], tokenizer: Tokenizer) -> int:
    token_id = tokenizer.backend.token_to_id(special_tokens.get(name, ""))
    if token_id is None:
        raise ValueError(
            f"{name}={special_tokens.get(name)!r} of tokenizer_config.json is no token of "
            "tokenizer.json; take both from the same model"
        )
    return token_id


def _environment() -> sandbox.ImmutableSandboxedEnvironment:
    """Make the environment that chat templates are written for: that of transformers."""
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.add_extension(ext.loopcontrols)
    # Not jinja2's own tojson, which escapes for HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
