"""Subword tokenizer: byte-level BPE from the Hugging Face ``tokenizers`` library.

Its base alphabet is the 256 byte values, so a sentence of any language, or none, has an
encoding and decodes to itself; there is no unknown token. One vocabulary serves both
languages, as in section 5.1 of the paper.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..console import from_extra
from .config import LARGEST_VOCABULARY, ConfigError

if TYPE_CHECKING:  # loaded where a tokenizer is made
    import tokenizers

PAD, BOS, EOS = 0, 1, 2
_SPECIAL = ("<pad>", "<s>", "</s>")
# What `train` makes: the kind of each part of a tokenizer's file, None where it has no such part.
_PARTS = {
    "normalizer": "NFC",
    "pre_tokenizer": "ByteLevel",
    "decoder": "ByteLevel",
    "model": "BPE",
    "truncation": None,
    "padding": None,
    "post_processor": None,
}
# Three special tokens and 256 bytes.
SMALLEST_VOCABULARY = len(_SPECIAL) + 256


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's letters: printable Latin-1 bytes stand for themselves, the others, in
    order, for the code points from 256 on (Radford et al., 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    return bytes(_BYTES[letter] for letter in token)


def _characters(text: bytes) -> list[tuple[int, bytes]]:
    """Each character's place and bytes; a byte that belongs to none stands for itself."""
    characters, start = [], 0
    while start < len(text):
        size = 1
        for length in (1, 2, 3, 4):
            with contextlib.suppress(UnicodeDecodeError):
                if len(text[start : start + length].decode()) == 1:
                    size = length
                    break
        characters.append((start, text[start : start + size]))
        start += size
    return characters


def _shown(character: bytes) -> str:
    try:
        text = character.decode()
    except UnicodeDecodeError:
        return f"<{character.hex()}>"
    return text if text.isprintable() else f"<{character.hex()}>"


def _checked(text: str) -> str:
    """The JSON of a tokenizer of these parts alone; ValueError for any other.

    Further parts, as padding, put ids into sentences that no vocabulary tells of, and some of their
    settings end the process within the library. What is read here is written anew, so that the
    library reads no more than was checked.
    """
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a tokenizer: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"not a tokenizer: expected a JSON object, got {type(content).__name__}")
    for name, expected in _PARTS.items():
        part = content.get(name)
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != expected or (expected is None and part is not None):
            raise ValueError(
                f"not a tokenizer of rowmax.transformer: its {name} is {_cut(kind or part)}, "
                f"expected {expected}"
            )
    for name, value in content["model"].items():
        if name not in ("type", "vocab", "merges") and value:
            raise ValueError(
                f"not a tokenizer of rowmax.transformer: its model has {_cut(name)} {_cut(value)}"
            )
    return json.dumps(content)


def _cut(value: object, most: int = 60) -> str:
    text = ascii(value)
    return text if len(text) <= most else f"{text[:most]}..."


class Tokenizer:
    """Text to token ids and back. Ids carry no BOS or EOS; the batches add those."""

    def __init__(self, bpe: tokenizers.Tokenizer) -> None:
        for token, expected in zip(_SPECIAL, (PAD, BOS, EOS), strict=True):
            if bpe.token_to_id(token) != expected:
                raise ValueError(
                    f"not a tokenizer of rowmax.transformer: {token} has id "
                    f"{bpe.token_to_id(token)}, expected {expected}"
                )
        vocabulary = bpe.get_vocab()
        for token, number in vocabulary.items():
            if number >= len(_SPECIAL) and not _BYTES.keys() >= set(token):
                raise ValueError(
                    f"not a tokenizer of rowmax.transformer: token {token!r} is not of bytes"
                )
        self.largest_id: int = max(vocabulary.values())
        # A text that happens to contain "</s>" is split into ordinary tokens.
        bpe.encode_special_tokens = True
        self._bpe = bpe

    @classmethod
    def train(cls, sentences: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from the sentences, both languages together.

        A corpus with too few distinct pairs of symbols gives a smaller vocabulary than asked.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"vocab_size must be at least {SMALLEST_VOCABULARY} (the special tokens and "
                f"256 bytes), got {vocab_size}"
            )
        if vocab_size > LARGEST_VOCABULARY:
            raise ConfigError(
                f"vocab_size must be at most {LARGEST_VOCABULARY:,}, got {vocab_size}"
            )
        with from_extra("transformer"):
            import tokenizers
            from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
        bpe = tokenizers.Tokenizer(models.BPE())
        # NFC: decomposed Hangul or accents, as some systems write them, become one code point.
        bpe.normalizer = normalizers.NFC()
        # `train` and `encode` put the leading space that makes a word the same token at the
        # start of a sentence as within it; here it would also come before every line's blank.
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(_SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator((" " + sentence for sentence in sentences), trainer)
        return cls(bpe)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that ``to_json`` wrote; ValueError where the text is not one."""
        with from_extra("transformer"):
            import tokenizers
        checked = _checked(text)
        try:
            bpe = tokenizers.Tokenizer.from_str(checked)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer: {error}") from error
        return cls(bpe)

    def to_json(self) -> str:
        return self._bpe.to_str()

    @property
    def vocab_size(self) -> int:
        return self._bpe.get_vocab_size()

    def tokens(self) -> list[str]:
        """Every token of the vocabulary, by its id, in byte-level BPE's letters."""
        return [str(self._bpe.id_to_token(index)) for index in range(self.vocab_size)]

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of each sentence."""
        texts = [" " + sentence for sentence in sentences]
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, to be read beside the others of its sentence.

        A token that goes on within a word starts with "·". Where a character is spread over
        several tokens, each shows it with its number: "값(1/2)", "값(2/2)". Bytes that form no
        UTF-8 are shown as "<ea>".
        """
        parts = [
            token.encode() if number < len(_SPECIAL) else _bytes_of(token)
            for number, token in ((number, self._bpe.id_to_token(number) or "") for number in ids)
        ]
        characters = _characters(b"".join(parts))
        tokens_of = [0] * len(characters)  # how many tokens each character is spread over
        spans, start = [], 0
        for part in parts:
            end = start + len(part)
            span = [
                i for i, (at, raw) in enumerate(characters) if at < end and at + len(raw) > start
            ]
            for i in span:
                tokens_of[i] += 1
            spans.append(span)
            start = end
        seen = [0] * len(characters)
        texts = []
        for number, span in zip(ids, spans, strict=True):
            text = ""
            for i in span:
                seen[i] += 1
                shown = _shown(characters[i][1])
                text += shown if tokens_of[i] == 1 else f"{shown}({seen[i]}/{tokens_of[i]})"
            if text.startswith(" ") and len(text) > 1:
                text = text[1:]
            elif number >= len(_SPECIAL):
                text = f"·{text}"
            texts.append(text.replace(" ", "␣"))
        return texts

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each sequence, special tokens left out.

        Bytes that form no UTF-8, which only a badly trained model writes, become U+FFFD.
        """
        texts = self._bpe.decode_batch([list(sequence) for sequence in ids])
        return [text.removeprefix(" ") for text in texts]
