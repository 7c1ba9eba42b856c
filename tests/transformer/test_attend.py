"""Pictures of attention: what is drawn is what the model computed, and bad input is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from rowmax.transformer import (
    ModelConfig,
    RecurrentConfig,
    Tokenizer,
    checkpoint,
    cli,
    corpus,
    new_model,
    translate,
)
from rowmax.transformer.attend import AttendError, look
from rowmax.transformer.attention_page import page
from rowmax.transformer.tokenizer import BOS, EOS

SENTENCE = "지영은 값 싼 책을 읽어요."
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train((side for pair in corpus.generate(500) for side in pair), 500)


def model_of(arch: str, vocab_size: int, backend: str = "reference"):
    torch.manual_seed(3)
    if arch == "transformer":
        config = ModelConfig(vocab_size, 2, 3, d_model=16, heads=8, d_ff=32, max_length=80)
        return new_model(config, backend)
    return new_model(RecurrentConfig(arch, vocab_size, d_model=16, max_length=80), backend)


@pytest.fixture(scope="module", params=["transformer", "lstm"])
def saved(request, tokenizer, tmp_path_factory) -> tuple[str, Path]:
    """An architecture, and the checkpoint of an untrained model of it."""
    model = model_of(request.param, tokenizer.vocab_size)
    run = tmp_path_factory.mktemp(request.param)
    return request.param, checkpoint.save(run, 1, model, tokenizer, {}, {})


def attend(model: Path, *options: str, sentence: str = SENTENCE) -> int:
    return cli.main(["attend", str(model), sentence, "--backend", "reference", *options])


def embedded(html: str) -> dict[str, Any]:
    return json.loads(re.findall(r'id="data">(.*?)</script>', html, re.S)[0])


@pytest.mark.parametrize("arch", ["transformer", "rnn", "gru"])
def test_rows_sum_to_one(arch, tokenizer):
    """Each kind, layer and head; shapes; nothing above the diagonal of the decoder's own."""
    model = model_of(arch, tokenizer.vocab_size)
    seen = look(model, tokenizer, SENTENCE)
    assert seen.translation == translate(model, tokenizer, [SENTENCE])[0]
    Ls, Lt = len(seen.source), len(seen.target)
    expected = {"cross": (1, 1, Lt, Ls)}
    if arch == "transformer":
        expected = {"encoder": (2, 8, Ls, Ls), "decoder": (3, 8, Lt, Lt), "cross": (3, 8, Lt, Ls)}
    assert {kind: (len(w), *w[0].shape) for kind, w in seen.weights.items()} == expected
    for layers in seen.weights.values():
        for weights in layers:
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    for weights in seen.weights.get("decoder", ()):
        assert (weights.triu(1) == 0).all()
        assert (weights.tril() > 0).sum() == weights.shape[0] * Lt * (Lt + 1) // 2


def test_weights_are_softmax_of_scores(tokenizer):
    """The first encoder layer's, by the formula from the model's own matrices."""
    model = model_of("transformer", tokenizer.vocab_size).double()
    seen = look(model, tokenizer, SENTENCE)
    source = torch.tensor([[*tokenizer.encode([SENTENCE])[0], EOS]])
    with torch.inference_mode():
        x = model.eval().embedding(source)
        layer = model.encoder[0].self_attention
        q, k = layer.split_heads(layer.w_q(x)), layer.split_heads(layer.w_k(x))
        expected = (q @ k.transpose(-1, -2) / 2**0.5).softmax(-1)[0]
    torch.testing.assert_close(seen.weights["encoder"][0], expected, rtol=0, atol=1e-13)


def test_pieces(tokenizer):
    """Words start as they are, parts go on with a dot, spread characters count their parts."""
    ids = tokenizer.encode([SENTENCE])[0]
    pieces = tokenizer.pieces([BOS, *ids, EOS])
    assert (pieces[0], pieces[-1]) == ("<s>", "</s>")
    joined = "".join(p[1:] if p.startswith("·") else f" {p}" for p in pieces[1:-1])
    whole = re.sub(r"(.)\((\d)/(\d)\)", lambda m: m[1] if m[2] == m[3] else "", joined)
    assert whole == f" {SENTENCE}"
    raw = Tokenizer.train(["ab"], 259)
    assert raw.pieces(raw.encode(["값"])[0]) == ["·␣", "·값(1/3)", "·값(2/3)", "·값(3/3)"]
    assert raw.pieces(raw.encode(["값"])[0][1:3]) == ["·<ea>", "·<b0>"]


def test_html_holds_the_weights(saved, tmp_path, tokenizer, capsys):
    arch, path = saved
    out = tmp_path / "page.html"
    assert attend(path, "--out", str(out), "--head", "1") == 0
    seen = look(model_of(arch, tokenizer.vocab_size), tokenizer, SENTENCE)
    assert capsys.readouterr().out == f"{seen.translation}\n"
    html = out.read_text("utf-8")
    data = embedded(html)
    assert (data["kind"], data["head"]) == ("cross", 1)
    for kind, layers in seen.weights.items():
        assert (data["kinds"][kind]["queries"], data["kinds"][kind]["keys"]) == seen.tokens(kind)
        for weights, written in zip(layers, data["kinds"][kind]["layers"], strict=True):
            torch.testing.assert_close(torch.tensor(written), weights, rtol=0, atol=5.1e-5)
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)


def test_a_sentence_can_not_end_the_script(tokenizer):
    seen = look(model_of("gru", tokenizer.vocab_size), tokenizer, "</script><b>")
    html = page(seen, "cross", 1, None)
    assert html.count("</script>") == 2
    assert embedded(html)["sentence"] == "</script><b>"


@pytest.mark.parametrize("suffix,start", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_pictures(saved, tmp_path, suffix, start, capsys):
    pytest.importorskip("matplotlib")
    arch, path = saved
    latin = "a cheap book $5$"  # which no formula may be made of, and any font draws
    kinds = ["cross"] if arch == "lstm" else ["encoder", "decoder", "cross"]
    for kind in kinds:
        out = tmp_path / f"{kind}{suffix}"
        code = attend(path, "--kind", kind, "--out", str(out), sentence=latin)
        if code == 2:  # what an untrained model writes may be Korean
            assert "no font found here draws" in capsys.readouterr().err
            assert not out.exists()
        else:
            assert out.read_bytes().startswith(start)
    assert cli.main(["positions", "--out", str(tmp_path / f"p{suffix}")]) == 0
    assert (tmp_path / f"p{suffix}").read_bytes().startswith(start)
    assert not list(tmp_path.glob(".*"))


def test_masked_half_is_empty(tokenizer, monkeypatch):
    """NaN, so not coloured; a weight of zero below the diagonal is coloured."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    from rowmax.transformer import pictures

    drawn = []
    plain = Axes.imshow

    def imshow(self, shown, **options):
        drawn.append(shown)
        return plain(self, shown, **options)

    monkeypatch.setattr(Axes, "imshow", imshow)
    monkeypatch.setattr(pictures, "_families", lambda text, font: ["DejaVu Sans"])
    seen = look(model_of("transformer", tokenizer.vocab_size), tokenizer, "a b c")
    pictures.heat_maps(seen, "decoder", 1, None, ".svg", None)
    assert len(drawn) == 8
    for shown in drawn:
        forbidden = torch.ones(shown.shape).triu(1).bool()
        assert torch.equal(torch.tensor(shown).isnan(), forbidden)


def test_fonts(monkeypatch, tmp_path):
    """The found font is added; with none that draws a character, the message says which."""
    pytest.importorskip("matplotlib")
    from rowmax.transformer import pictures

    assert pictures._families("abc", None) == ["DejaVu Sans"]
    monkeypatch.setattr("matplotlib.font_manager.fontManager.ttflist", [])
    with pytest.raises(AttendError, match="no font found here draws 값: install one"):
        pictures._families("a값", None)
    damaged = tmp_path / "font.ttf"
    damaged.write_bytes(b"no font")
    with pytest.raises(AttendError, match="font.ttf: can't be used"):
        pictures._families("a", damaged)


def test_bad_input(saved, tmp_path, capsys):
    """A clear message, status 2, and no file."""
    arch, path = saved
    folder = tmp_path / "out"
    folder.mkdir()
    out = str(folder / "x.html")
    cross = "encoder-decoder attention"
    layers = "1 to 3" if arch == "transformer" else "only 1"
    heads = "1 to 8" if arch == "transformer" else "only 1"
    for options, message, sentence in (
        (
            ("--out", out, "--layer", "9"),
            f"--layer 9: the {cross} has {layers}",
            "a",
        ),
        (
            ("--out", out, "--head", "9"),
            f"--head 9: the {cross} has {heads}",
            "a",
        ),
        (("--out", out), "the sentence is empty", " "),
        (("--out", out), "sentence 1 has ", "구 " * 200),
        (("--out", str(folder / "x.gif")), "ends in one of .png, .svg, .html", "a"),
        (("--out", str(folder / "none" / "x.png")), "is no directory", "a"),
    ):
        assert attend(path, *options, sentence=sentence) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
    if arch == "lstm":
        assert attend(path, "--out", out, "--kind", "encoder") == 2
        assert (
            "this lstm model has no encoder self-attention, only cross" in capsys.readouterr().err
        )
    assert attend(tmp_path / "none", "--out", out) == 2
    assert cli.main(["positions", "--out", out]) == 2
    assert cli.main(["positions", "--out", out[:-4] + "svg", "--d-model", "7"]) == 2
    assert not list(folder.iterdir())


def test_a_failed_write_leaves_nothing(saved, tmp_path, monkeypatch, capsys):
    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert attend(saved[1], "--out", str(tmp_path / "x.html")) == 2
    assert "x.html: can't be written: No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_page_in_a_browser(tokenizer, tmp_path):
    """The page opens at the token that its address names, and draws its lines."""
    seen = look(model_of("transformer", tokenizer.vocab_size), tokenizer, SENTENCE)
    path = tmp_path / "page.html"
    path.write_text(page(seen, "cross", 3, None), "utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    address = f"{path.as_uri()}#kind=encoder&layer=1&token=2"
    shown = subprocess.run([*command, address], capture_output=True, text=True, timeout=300)
    body = shown.stdout.split('<script type="application/json"')[0]
    assert re.findall(r'class="token on">([^<]*)<', body) == [seen.source[1]]
    rows = seen.weights["encoder"][0][:, 1]
    assert body.count("<line ") == int((rows >= 0.02).sum())
    shares = [float(text) for text in re.findall(r'class="share">([\d.]+)<', body)]
    expected = [value for value in rows.mean(0).tolist() if value >= 0.005]
    assert shares == pytest.approx(expected, abs=0.006)


def test_a_file_of_somebody_else_beside_the_picture_stays(tmp_path):
    """The name that a picture has until it is whole may be taken."""
    for number in ("", "-1"):
        (tmp_path / f".a.svg.incomplete{number}").write_text("precious")
    command = ["positions", "--length", "4", "--d-model", "4", "--out", str(tmp_path / "a.svg")]
    assert cli.main(command) == 0
    names = [".a.svg.incomplete", ".a.svg.incomplete-1", "a.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert {(tmp_path / name).read_text() for name in names[:2]} == {"precious"}
