"""Linear layers of eight bits: nearly the same scores, from the command line too."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from rowmax.transformer import EncoderDecoder, ModelConfig, cli
from rowmax.transformer.quantization import quantize

from .commands import fails


@pytest.mark.parametrize("pre_norm", [False, True])
def test_scores_are_nearly_the_same(pre_norm):
    torch.manual_seed(0)
    config = ModelConfig(300, 2, 2, d_model=64, heads=4, d_ff=128, pre_norm=pre_norm)
    model = EncoderDecoder(config, "reference").eval()
    narrow = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(narrow)
    assert not [each for each in narrow.modules() if type(each) is nn.Linear]
    source, target = torch.randint(3, 300, (5, 9)), torch.randint(3, 300, (5, 7))
    with torch.inference_mode():
        expected, got = (each(source, torch.full((5,), 9), target) for each in (model, narrow))
    error = (got - expected).std() / expected.std()
    assert 0 < error < 0.05


def test_translate(trained, capsys):
    assert cli.main(["translate", "--model", str(trained), "--int8", "하나", "둘"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_on_the_cpu_alone(trained, capsys):
    arguments = ("translate", "--model", str(trained), "--int8", "--device", "meta", "하나")
    assert "--int8: on the CPU alone, got --device meta" in fails(capsys, *arguments)
