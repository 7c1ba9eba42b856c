"""Subword tokenizer: byte-level BPE from the Hugging Face ``tokenizers`` library.

Its base alphabet is the 256 byte values, so a sentence of any language, or none, has an
encoding and decodes to itself; there is no unknown token. One vocabulary serves both
languages, as in section 5.1 of the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from .config import ConfigError

PAD, BOS, EOS = 0, 1, 2
_SPECIAL = ("<pad>", "<s>", "</s>")
# Three special tokens and 256 bytes.
SMALLEST_VOCABULARY = len(_SPECIAL) + 256


class Tokenizer:
    """Text to token ids and back. Ids carry no BOS or EOS; the batches add those."""

    def __init__(self, bpe: tokenizers.Tokenizer) -> None:
        for token, expected in zip(_SPECIAL, (PAD, BOS, EOS), strict=True):
            if bpe.token_to_id(token) != expected:
                raise ValueError(
                    f"not a tokenizer of rowmax.transformer: {token} has id "
                    f"{bpe.token_to_id(token)}, expected {expected}"
                )
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
        try:
            bpe = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer: {error}") from error
        return cls(bpe)

    def to_json(self) -> str:
        return self._bpe.to_str()

    @property
    def vocab_size(self) -> int:
        return self._bpe.get_vocab_size()

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of each sentence."""
        texts = [" " + sentence for sentence in sentences]
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts)]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each sequence, special tokens left out.

        Bytes that form no UTF-8, which only a badly trained model writes, become U+FFFD.
        """
        texts = self._bpe.decode_batch([list(sequence) for sequence in ids])
        return [text.removeprefix(" ") for text in texts]
