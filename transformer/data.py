"""Parallel text: reading it, encoding it, and cutting it into batches.

The order of the batches is a pure function of (seed, epoch), so that training can go on from
any position without having seen the batches before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .packing import PackedBatch, pack
from .tokenizer import BOS, EOS, PAD, Tokenizer

SentencePair = tuple[str, str]
_BUCKET = 50


class DataError(ValueError):
    """Text files that can't be used, with the file and the line that are wrong."""


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without their ends."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x} at offset "
            f"{error.start}); convert the file to UTF-8 first"
        ) from error
    # Not splitlines(): a rarer separator within a sentence would put the two files out of step.
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if not any(line.strip() for line in lines):
        raise DataError(f"{path}: the file is empty")
    return [line.removesuffix("\r") for line in lines]


def read_parallel(source: Path, target: Path) -> list[SentencePair]:
    """Two files whose lines correspond."""
    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        raise DataError(
            f"{source} has {len(sources):,} lines but {target} has {len(targets):,}; "
            "line n of one must be the translation of line n of the other"
        )
    return list(zip(sources, targets, strict=True))


def read_tsv(path: Path) -> list[SentencePair]:
    """One file with a source sentence, a tab and its translation in each line.

    A blank line is a pair of two blank sides, so that pairs have the numbers of their lines.
    """
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        columns = line.split("\t") if line.strip() else ["", ""]
        if len(columns) != 2:
            raise DataError(
                f"{path}: line {number} has {len(columns)} column{'s' * (len(columns) != 1)}; "
                "expected 2, separated by one tab"
            )
        pairs.append((columns[0], columns[1]))
    return pairs


@dataclass(frozen=True)
class Batch:
    """Padded sentences as tensors of token ids (int64) and their lengths (int64).

    ``target_in`` starts with BOS and ``target_out`` ends with EOS, so that position i of the
    one is to predict position i of the other.
    """

    source: torch.Tensor  # (B, Ls)
    source_lengths: torch.Tensor  # (B,)
    target_in: torch.Tensor  # (B, Lt)
    target_out: torch.Tensor  # (B, Lt)
    target_lengths: torch.Tensor  # (B,)

    @property
    def target_tokens(self) -> int:
        return int(self.target_lengths.sum())

    @property
    def tokens(self) -> int:
        """Source and target tokens without padding."""
        return int(self.source_lengths.sum() + self.target_lengths.sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(*(each.to(device) for each in vars(self).values()))


def pad(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences as one tensor (B, L) filled up with PAD, and their lengths (B,)."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    padded = np.full((len(sequences), int(lengths.max(initial=0))), PAD, dtype=np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(padded), torch.from_numpy(lengths)


class Dataset:
    """Encoded sentence pairs, each side ending with EOS.

    Pairs that can teach nothing (one side blank) or don't fit the model's positions (more than
    ``max_length`` tokens) are left out; ``blank`` and ``too_long`` hold their 1-based numbers.
    """

    def __init__(self, pairs: Sequence[SentencePair], tokenizer: Tokenizer, max_length: int):
        self.blank: list[int] = []
        self.too_long: list[int] = []
        self.sources: list[list[int]] = []
        self.targets: list[list[int]] = []
        encoded_sources = tokenizer.encode([source for source, _ in pairs])
        encoded_targets = tokenizer.encode([target for _, target in pairs])
        for number, ((source, target), source_ids, target_ids) in enumerate(
            zip(pairs, encoded_sources, encoded_targets, strict=True), start=1
        ):
            if not source.strip() or not target.strip():
                self.blank.append(number)
            elif max(len(source_ids), len(target_ids)) >= max_length:  # EOS needs a place
                self.too_long.append(number)
            else:
                self.sources.append([*source_ids, EOS])
                self.targets.append([*target_ids, EOS])
        if not self.sources:
            raise DataError(
                f"none of {len(pairs):,} pairs can be used: {len(self.blank):,} have a blank side, "
                f"{len(self.too_long):,} are longer than the limit of {max_length} tokens"
            )
        self._source_lengths = np.array([len(ids) for ids in self.sources])
        self._target_lengths = np.array([len(ids) for ids in self.targets])

    def __len__(self) -> int:
        return len(self.sources)

    def left_out(self) -> str:
        """One line on the pairs that were left out, empty if there are none."""
        parts = [
            f"{len(numbers):,} {what} (the first is number {numbers[0]:,})"
            for numbers, what in ((self.blank, "with a blank side"), (self.too_long, "too long"))
            if numbers
        ]
        return f"left out {' and '.join(parts)}" if parts else ""

    def fingerprint(self) -> str:
        """SHA-256 of all token ids, which tells whether a resumed run has the same data."""
        digest = hashlib.sha256()
        for side, lengths in (
            (self.sources, self._source_lengths),
            (self.targets, self._target_lengths),
        ):
            digest.update(lengths.astype("<i8").tobytes())
            digest.update(np.concatenate(side).astype("<i8").tobytes())
        return digest.hexdigest()

    def tokens(self, indices: np.ndarray) -> np.ndarray:
        """Source and target tokens of each of these pairs."""
        return self._source_lengths[indices] + self._target_lengths[indices]

    def target_tokens(self, indices: np.ndarray) -> int:
        """Target tokens of these pairs together."""
        return int(self._target_lengths[indices].sum())

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The pairs of these indices, padded to the longest of them."""
        source, source_lengths = pad([self.sources[i] for i in indices])
        target_out, target_lengths = pad([self.targets[i] for i in indices])
        target_in, _ = pad([[BOS, *self.targets[i][:-1]] for i in indices])
        return Batch(source, source_lengths, target_in, target_out, target_lengths)

    def packed_batch(self, indices: Sequence[int] | np.ndarray, multiple: int = 1) -> PackedBatch:
        """The pairs of these indices, packed; PAD makes each side a multiple of so many tokens.

        A PAD token is a sentence of its own, so that no other token attends to it.
        """
        chosen = np.asarray(indices)
        lacking = [
            int(-lengths[chosen].sum() % multiple)
            for lengths in (self._source_lengths, self._target_lengths)
        ]
        of_source, of_target = ([[PAD]] * n + [[]] * (max(lacking) - n) for n in lacking)
        source, source_packing = pack([*(self.sources[i] for i in indices), *of_source])
        target_out, target_packing = pack([*(self.targets[i] for i in indices), *of_target])
        shifted = ([BOS, *self.targets[i][:-1]] for i in indices)
        target_in, _ = pack([*shifted, *of_target])
        return PackedBatch(source, source_packing, target_in, target_out, target_packing, *lacking)

    def plan(self, batch_tokens: int, seed: int = 0, epoch: int | None = None) -> list[np.ndarray]:
        """Indices of each batch of an epoch: every pair once, in an order that is nearly random.

        A batch has at most ``batch_tokens`` source tokens and as many target tokens, padding not
        counted (a single longer pair is a batch of its own). Of the shuffled pairs, those of
        `_BUCKET` batches at a time are sorted by length, so that padded batches have little
        padding; then the batches are shuffled. Without ``epoch`` all are sorted, none shuffled.
        """
        source, target = self._source_lengths, self._target_lengths
        longest = np.maximum(source, target)
        order = np.arange(len(self))
        bucket, rng = order * 0, None
        if epoch is not None:
            rng = np.random.default_rng([seed, epoch])
            order = rng.permutation(order)
            bucket = np.cumsum(longest[order]) // (_BUCKET * batch_tokens)
        order = order[np.lexsort((source[order], target[order], longest[order], bucket))]
        batches: list[np.ndarray] = []
        start, tokens = 0, np.zeros(2, dtype=np.int64)
        for position, lengths in enumerate(zip(source[order], target[order], strict=True)):
            if position > start and (tokens + lengths > batch_tokens).any():
                batches.append(order[start:position])
                start, tokens = position, tokens * 0
            tokens = tokens + lengths
        batches.append(order[start:])
        if rng is not None:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches
