"""Train and held-out text: the pieces whose names hash lowest are held out."""

import hashlib
from collections.abc import Iterable, Iterator

PIECE = 1 << 16  # characters
LEAST_PIECES = 32


def split(documents: Iterable[tuple[str, str]], share: float) -> tuple[list[str], list[str]]:
    """The pieces of train text and of held-out text, each in the documents' order.

    Documents are cut at line ends into pieces of at most 65,536 characters and at most 1/32 of the
    text, so that a single file has two sides as well. Held out are the pieces of the lowest hashes
    until they make up `share` of the characters: the same pieces on every machine.

    Raises:
        ValueError: no text is left to train on.
    """
    documents = list(documents)
    total = sum(len(text) for _, text in documents)
    size = min(PIECE, -(-total // LEAST_PIECES))
    pieces = {
        f"{name}#{number}": piece
        for name, text in documents
        for number, piece in enumerate(cut(text, size))
    }
    held_out, n_held_out = set(), 0
    for name in sorted(pieces, key=_hash):
        if n_held_out >= share * total:
            break
        held_out.add(name)
        n_held_out += len(pieces[name])
    if len(held_out) == len(pieces):
        raise ValueError(
            f"data.held_out={share} holds out all {len(pieces)} pieces of the text ({total} "
            "characters) and leaves none to train on; give more text or a smaller data.held_out"
        )
    train = [text for name, text in pieces.items() if name not in held_out]
    return train, [text for name, text in pieces.items() if name in held_out]


def cut(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of at most `size` characters, each but the last up to a line's end."""
    start = 0
    while start < len(text):
        stop = start + size
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
