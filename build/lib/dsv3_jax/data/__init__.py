"""Text to batches of tokens, with nothing but files of this machine."""

from dsv3_jax.data.chat import Prompts, TextStream, load_prompts
from dsv3_jax.data.corpus import Corpus, load
from dsv3_jax.data.loader import Loader, eval_batches
from dsv3_jax.data.packing import PackedRows, unigram_entropy
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "Corpus",
    "Loader",
    "PackedRows",
    "Prompts",
    "TextStream",
    "Tokenizer",
    "eval_batches",
    "load",
    "load_prompts",
    "load_tokenizer",
    "train_bpe",
    "unigram_entropy",
]
