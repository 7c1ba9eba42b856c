"""A model exported to CTranslate2 translates as it does here, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rowmax.transformer import (
    EncoderDecoder,
    ModelConfig,
    Tokenizer,
    beam_search,
    cli,
    corpus,
    greedy,
    translate,
)
from rowmax.transformer import checkpoint as checkpoints
from rowmax.transformer.data import pad
from rowmax.transformer.export import export_ctranslate2
from rowmax.transformer.tokenizer import EOS

from .commands import fails

ctranslate2: Any = pytest.importorskip("ctranslate2")

PAIRS = corpus.generate(300)
TOKENIZER = Tokenizer.train((side for pair in PAIRS for side in pair), 400)
LONGEST = 40


def random_model(pre_norm: bool) -> EncoderDecoder:
    torch.manual_seed(3)
    config = ModelConfig(
        *(TOKENIZER.vocab_size, 2, 3),
        d_model=32,
        heads=4,
        d_ff=48,
        max_length=LONGEST,
        pre_norm=pre_norm,
    )
    model = EncoderDecoder(config, "reference").eval()
    with torch.no_grad():  # norms and biases that do something, and answers that differ
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.decoder[-1].add_norm_3.weight.normal_(std=2)
    return model


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_same_tokens(pre_norm: bool, tmp_path: Path) -> None:
    model = random_model(pre_norm)
    export_ctranslate2(model, TOKENIZER, tmp_path / "model")
    translator = ctranslate2.Translator(str(tmp_path / "model"), intra_threads=1)
    encoded = [[*ids, EOS] for ids in TOKENIZER.encode([pair.korean for pair in PAIRS[:40]])]
    names = TOKENIZER.tokens()
    sources = [[names[token] for token in ids[:-1]] for ids in encoded if len(ids) <= LONGEST]
    source, lengths = pad([ids for ids in encoded if len(ids) <= LONGEST])
    most = 25
    for beam in (1, 3):
        found = translator.translate_batch(
            sources, beam_size=beam, max_decoding_length=most, length_penalty=0
        )
        theirs = [[names.index(token) for token in one.hypotheses[0]] for one in found]
        if beam == 1:
            ours = greedy(model, source, lengths)
        else:
            ours = beam_search(model, source, lengths, beam, alpha=0.0)
        # what is cut by the one limit or the other is compared as far as both went
        same = [a[:most] == b[: len(a[:most])] for a, b in zip(ours, theirs, strict=True)]
        if beam == 1:
            assert all(same), same
        ended = [len(a) < most for a in ours]
        assert all(one for one, end in zip(same, ended, strict=True) if end)
    assert len({tuple(tokens) for tokens in theirs}) > 5


def test_the_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ct2"
    assert cli.main(["export", "--model", str(trained), "--output", str(out)]) == 0
    saved = checkpoints.load(checkpoints.newest(trained))
    model = checkpoints.build_model(saved, "reference")
    names = saved.tokenizer.tokens()
    source = [names[token] for token in saved.tokenizer.encode(["구 오"])[0]]
    found = ctranslate2.Translator(str(out)).translate_batch(
        [source], beam_size=1, max_decoding_length=20
    )
    tokens = [names.index(token) for token in found[0].hypotheses[0]]
    whole = translate(model, saved.tokenizer, ["구 오"])[0]
    assert whole.startswith(saved.tokenizer.decode([tokens])[0].rstrip("\ufffd"))
    options = ["export", "--model", str(trained), "--output"]
    assert "is there already" in fails(capsys, *options, str(out))
    wrong = [str(tmp_path / "other"), "--quantization", "int3"]
    with pytest.raises(SystemExit):
        cli.main([*options, *wrong])
    assert not (tmp_path / "other").exists()


def test_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization: expected one of int8"):
        export_ctranslate2(random_model(False), TOKENIZER, tmp_path / "a", "int3")
    with pytest.raises(FileExistsError, match="is there already"):
        export_ctranslate2(random_model(False), TOKENIZER, tmp_path)


def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(ctranslate2.specs.TransformerSpec, "save", fail)
    with pytest.raises(OSError, match="no space"):
        export_ctranslate2(random_model(False), TOKENIZER, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
