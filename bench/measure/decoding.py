"""`python -m rowmax.bench decoding`: the reference Transformer beside CTranslate2 and Hugging Face.

The same random weights, exported, translate the same sentences into as many tokens each, for no
translation ends by itself: greedily and by beam search, in turns in one process. CTranslate2
computes in float32 and with int8 weights. Where transformers is there, `generate` of a Marian of
equal sizes is timed as well. Tokens of the best translations count, per second.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...console import from_extra
from ...memory import COMMAND_BLOCKS, keep_freed_memory
from ...transformer.config import ModelConfig
from ...transformer.decoding import beam_search, greedy
from ...transformer.export import export_ctranslate2
from ...transformer.interface import TranslationModel
from ...transformer.model import EncoderDecoder
from ...transformer.quantization import quantize
from ...transformer.tokenizer import BOS, EOS, PAD
from . import figures
from .training import SIZES

SOURCE = 20  # tokens of a sentence
_TOKENS = 24  # of a translation


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", choices=SIZES, default="base", help="default: base")
    command.add_argument("--sentences", type=int, default=32, help="default: 32")
    command.add_argument("--beam", type=int, default=4, help="beside greedy decoding; default: 4")
    figures.add_options(command, 30.0, on="each table")


def run(options: argparse.Namespace) -> int:
    with from_extra("ctranslate2"):
        import ctranslate2  # noqa: F401
    machine = figures.begin(options, "sentences", "beam")
    keep_freed_memory(COMMAND_BLOCKS)  # as the commands of rowmax.transformer do
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        every = decoders(SIZES[options.size], options.sentences, options.backend, Path(folder))
        for beam in dict.fromkeys((1, options.beam)):
            calls = {name: (lambda of=of, beam=beam: of(beam)) for name, of in every.items()}
            tokens = {name: sum(call()) for name, call in calls.items()}
            timings = figures.timed(options, calls, 3)
            what = "greedy" if beam == 1 else f"beam {beam}"
            print(
                f"\n{options.size}, {what}, {options.sentences} sentences of {SOURCE} tokens"
                f"\n{'':22} {'ms':>8} {'spread':>7} {'tokens/s':>9} {'rowmax / it':>11}"
            )
            rates = {name: tokens[name] / timing.median for name, timing in timings.items()}
            for name, timing in timings.items():
                print(
                    f"{name:22} {1e3 * timing.median:8.1f} {100 * timing.spread:6.0f}% "
                    f"{rates[name]:9.0f} {rates['rowmax'] / rates[name]:11.2f}"
                )
            found[what] = rates
    document = {"machine": machine, "size": options.size, "tokens_per_second": found}
    figures.write(options, document)
    return 0


def decoders(
    config: ModelConfig, sentences: int, backend: str, folder: Path
) -> dict[str, Callable[[int], list[int]]]:
    """Of a beam's width: the lengths of what each writes, EOS left out."""
    with from_extra("ctranslate2"):
        import ctranslate2
    torch.manual_seed(0)
    limited = ModelConfig(**{**vars(config), "max_length": _TOKENS})
    model = EncoderDecoder(limited, backend).eval()
    source = torch.randint(3, config.vocab_size, (sentences, SOURCE))
    lengths = torch.full((sentences,), SOURCE)
    source[:, -1] = EOS

    def rowmax(model: TranslationModel, beam: int) -> list[int]:
        if beam == 1:
            return list(map(len, greedy(model, source, lengths)))
        return list(map(len, beam_search(model, source, lengths, beam, alpha=0.0)))

    narrow = copy.deepcopy(model)
    quantize(narrow)
    found: dict[str, Callable[[int], list[int]]] = {
        "rowmax": partial(rowmax, model),
        "rowmax int8": partial(rowmax, narrow),
    }
    export_ctranslate2(model, _Names(config.vocab_size), folder / "model")
    named = [[f"t{token}" for token in row[:-1]] for row in source.tolist()]
    for kind in ("float32", "int8"):
        translator = ctranslate2.Translator(
            str(folder / "model"),
            compute_type=kind,
            intra_threads=torch.get_num_threads(),
            inter_threads=1,
        )

        def decode(beam: int, translator: Any = translator) -> list[int]:
            results = translator.translate_batch(
                named,
                beam_size=beam,
                length_penalty=0,
                max_decoding_length=_TOKENS,
                min_decoding_length=_TOKENS,
            )
            return [len(result.hypotheses[0]) for result in results]

        found[f"CTranslate2 {kind}"] = decode
    if importlib.util.find_spec("transformers") is not None:
        found["Hugging Face"] = _hugging_face(config, source)
    return found


def _hugging_face(config: ModelConfig, source: Tensor) -> Callable[[int], list[int]]:
    """A Marian of these sizes, with its own random weights."""
    from transformers import MarianConfig, MarianMTModel

    width, heads, inner = config.d_model, config.heads, config.d_ff
    marian = MarianMTModel(
        MarianConfig(
            vocab_size=config.vocab_size,
            d_model=width,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=inner,
            decoder_ffn_dim=inner,
            activation_function="relu",
            scale_embedding=True,
            max_position_embeddings=config.max_length,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            decoder_start_token_id=BOS,
            forced_eos_token_id=None,
        )
    ).eval()

    def decode(beam: int) -> list[int]:
        out = marian.generate(
            source,
            attention_mask=torch.ones_like(source),
            num_beams=beam,
            do_sample=False,
            min_new_tokens=_TOKENS,
            max_new_tokens=_TOKENS,
        )
        return [out.shape[1] - 1] * len(source)

    return decode


class _Names:
    """In place of a tokenizer: a text for each token."""

    def __init__(self, size: int) -> None:
        self._size = size

    def tokens(self) -> list[str]:
        return ["<pad>", "<s>", "</s>", *(f"t{token}" for token in range(3, self._size))]
