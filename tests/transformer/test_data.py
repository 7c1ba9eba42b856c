"""Reading parallel text, and batches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from rowmax.transformer import Dataset, Tokenizer, corpus, read_parallel, read_tsv
from rowmax.transformer.config import ModelConfig
from rowmax.transformer.data import DataError, pad, read_lines
from rowmax.transformer.model import EncoderDecoder
from rowmax.transformer.tokenizer import BOS, EOS, PAD


def test_read_parallel(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    # A byte order mark, Windows line ends, no end of the last line, and a Unicode line
    # separator that is part of a sentence.
    source.write_bytes("\ufeff하나\r\n둘\u2028셋".encode())
    target.write_bytes(b"one\ntwo three\n")
    assert read_parallel(source, target) == [("하나", "one"), ("둘\u2028셋", "two three")]


def test_unequal_line_counts(tmp_path):
    (tmp_path / "a").write_text("1\n2\n3\n")
    (tmp_path / "b").write_text("1\n2\n")
    with pytest.raises(DataError, match=r"a has 3 lines but .*b has 2; line n of one"):
        read_parallel(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\t\n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match="a: the file is empty"):
        read_lines(tmp_path / "a")


def test_not_utf8(tmp_path):
    (tmp_path / "a").write_bytes("one\ntwo\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a: line 3 is not UTF-8 \(byte 0xe9 at offset 11\)"):
        read_lines(tmp_path / "a")


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="a: can't be read: No such file"):
        read_lines(tmp_path / "a")


def test_read_tsv(tmp_path):
    (tmp_path / "a").write_text("하나\tone\n둘\ttwo\n", "utf-8")
    assert read_tsv(tmp_path / "a") == [("하나", "one"), ("둘", "two")]


@pytest.mark.parametrize("line, columns", [("no tab", "1 column;"), ("a\tb\tc", "3 columns;")])
def test_tsv_with_wrong_columns(tmp_path, line, columns):
    (tmp_path / "a").write_text(f"x\ty\n{line}\n")
    with pytest.raises(DataError, match=f"line 2 has {columns} expected 2"):
        read_tsv(tmp_path / "a")


def test_pad():
    padded, lengths = pad([[5, 6, 7], [], [8]])
    assert padded.tolist() == [[5, 6, 7], [PAD, PAD, PAD], [8, PAD, PAD]]
    assert lengths.tolist() == [3, 0, 1]
    assert [each.shape for each in pad([])] == [(0, 0), (0,)]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    pairs = corpus.generate(700)
    return Dataset(pairs, Tokenizer.train((side for pair in pairs for side in pair), 500), 64)


def test_batch_content(dataset):
    batch = dataset.batch([3, 0, 9])
    for row, index in enumerate((3, 0, 9)):
        source, target = dataset.sources[index], dataset.targets[index]
        assert source[-1] == target[-1] == EOS
        assert batch.source[row, : batch.source_lengths[row]].tolist() == source
        assert batch.target_out[row, : batch.target_lengths[row]].tolist() == target
        assert batch.target_in[row, : batch.target_lengths[row]].tolist() == [BOS, *target[:-1]]
        assert (batch.target_in[row, batch.target_lengths[row] :] == PAD).all()
    assert batch.source.dtype == torch.int64
    assert batch.tokens == sum(len(dataset.sources[i]) + len(dataset.targets[i]) for i in (3, 0, 9))


@pytest.mark.parametrize("epoch", [None, 0, 1])
def test_a_plan_has_every_pair_once_within_the_limit(dataset, epoch):
    plan = dataset.plan(300, seed=4, epoch=epoch)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(dataset)))
    for indices in plan:
        batch = dataset.batch(indices)
        assert batch.source_lengths.sum() <= 300
        assert batch.target_tokens <= 300


@pytest.mark.parametrize("multiple", [8, 37])
def test_a_packed_batch_of_a_multiple_teaches_the_same(dataset, multiple):
    packed, filled = (dataset.packed_batch([3, 0, 9], each) for each in (1, multiple))
    assert filled.tokens == packed.tokens
    assert filled.target_tokens == packed.target_tokens
    for side in (filled.source, filled.target_in, filled.target_out):
        assert len(side) % multiple == 0
    torch.manual_seed(0)
    config = ModelConfig(600, 1, 1, d_model=16, heads=2, d_ff=32, dropout=0.0)
    model = EncoderDecoder(config).double()
    found = []
    for batch in (packed, filled):
        loss = model.loss(batch, 0.1)
        found.append((loss, *torch.autograd.grad(loss, tuple(model.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_packed_batch_has_the_same_tokens_without_padding(dataset):
    padded, packed = dataset.batch([3, 0, 9]), dataset.packed_batch([3, 0, 9])
    assert packed.tokens == padded.tokens
    assert packed.target_tokens == padded.target_tokens
    for lengths, packing, tensors in (
        (padded.source_lengths, packed.source_packing, ((padded.source, packed.source),)),
        (
            padded.target_lengths,
            packed.target_packing,
            ((padded.target_in, packed.target_in), (padded.target_out, packed.target_out)),
        ),
    ):
        real = torch.arange(padded.source.shape[1] + 99) < lengths[:, None]
        for one, other in tensors:
            assert torch.equal(one[real[:, : one.shape[1]]], other)
        assert packing.starts.tolist() == [0, *lengths.cumsum(0).tolist()]
        assert packing.longest == lengths.max()
        assert packing.positions.tolist() == [i for n in lengths.tolist() for i in range(n)]


def test_batches_have_little_padding(dataset):
    batches = [dataset.batch(indices) for indices in dataset.plan(1_000, seed=0, epoch=0)]
    places = sum(batch.source.numel() + batch.target_out.numel() for batch in batches)
    assert sum(batch.tokens for batch in batches) > 0.85 * places


def test_a_plan_follows_from_seed_and_epoch(dataset):
    def flat(seed, epoch):
        return [indices.tolist() for indices in dataset.plan(300, seed, epoch)]

    assert flat(4, 7) == flat(4, 7)
    assert len({str(flat(seed, epoch)) for seed in (4, 5) for epoch in (6, 7)}) == 4


def test_shuffled_batches_differ_in_company_and_come_in_no_order_of_length(dataset):
    first, second = dataset.plan(300, 0, 0), dataset.plan(300, 0, 1)
    assert {frozenset(batch.tolist()) for batch in first} != {
        frozenset(batch.tolist()) for batch in second
    }
    lengths = [dataset.batch(indices).source.shape[1] for indices in first]
    assert any(a > b for a, b in pairwise(lengths))
    assert any(a < b for a, b in pairwise(lengths))


def test_a_pair_longer_than_the_batch_is_a_batch_of_its_own(dataset):
    assert all(len(indices) == 1 for indices in dataset.plan(1))


def test_left_out_pairs_are_counted():
    tokenizer = Tokenizer.train(["a b c"], 300)
    pairs = [("a", "b"), ("", "b"), ("a", "  "), ("a", "b " * 40), ("c", "b")]
    dataset = Dataset(pairs, tokenizer, max_length=20)
    assert len(dataset) == 2
    assert dataset.left_out() == (
        "left out 2 with a blank side (the first is number 2) "
        "and 1 too long (the first is number 4)"
    )
    assert Dataset(pairs[:1], tokenizer, 20).left_out() == ""


def test_the_length_limit_counts_the_end_symbol():
    tokenizer = Tokenizer.train(["a"], 300)
    length = len(tokenizer.encode(["aaaa"])[0])
    assert len(Dataset([("aaaa", "a")], tokenizer, length + 1)) == 1
    with pytest.raises(DataError, match="none of 1 pairs can be used: 0 .* 1 are longer"):
        Dataset([("aaaa", "a")], tokenizer, length)


def test_fingerprint(dataset):
    tokenizer = Tokenizer.train(["a b c"], 300)
    prints = {
        Dataset(pairs, tokenizer, 20).fingerprint()
        for pairs in ([("a", "b")], [("b", "a")], [("a b", "c")], [("a", "b c")])
    }
    assert len(prints) == 4
    assert dataset.fingerprint() == dataset.fingerprint()
