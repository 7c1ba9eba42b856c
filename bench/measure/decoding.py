"""`python -m rowmax.bench decoding`: the reference Transformer beside CTranslate2 and Hugging Face.

The same random weights, exported, translate the same sentences into as many tokens each, for no
translation ends by itself: greedily and by beam search, in turns. CTranslate2 computes in float32
and with int8 weights. Where transformers is there, `generate` of a Marian of equal sizes is timed
as well. Tokens of the best translations count, per second.

Each engine has a process of its own, and one works at a time: in one process OpenMP takes two
engines' threads for more than there are CPUs, and from then on lets all of them sleep at every
barrier, which costs a small model up to two thirds more time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...console import from_extra
from ...memory import COMMAND_BLOCKS, keep_freed_memory
from ...transformer.config import ModelConfig
from ...transformer.decoding import beam_search, greedy
from ...transformer.export import export_ctranslate2
from ...transformer.model import EncoderDecoder
from ...transformer.quantization import quantize
from ...transformer.tokenizer import BOS, EOS, PAD
from . import figures
from .training import SIZES

SOURCE = 20  # tokens of a sentence
_TOKENS = 24  # of a translation

# Of a beam's width: the lengths of what is written, EOS left out.
Decoder = Callable[[int], list[int]]


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", choices=SIZES, default="base", help="default: base")
    command.add_argument("--sentences", type=int, default=32, help="default: 32")
    command.add_argument("--beam", type=int, default=4, help="beside greedy decoding; default: 4")
    figures.add_options(command, 30.0, on="each table")


def run(options: argparse.Namespace) -> int:
    with from_extra("ctranslate2"):
        import ctranslate2  # noqa: F401
    machine = figures.begin(options, "sentences", "beam")
    found: dict[str, Any] = {}
    given = Work(SIZES[options.size], options.sentences, options.backend, torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder, processes(given, Path(folder)) as every:
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


class Work(NamedTuple):
    """What every engine translates, and with what."""

    config: ModelConfig
    sentences: int
    backend: str
    threads: int

    def model(self) -> EncoderDecoder:
        torch.manual_seed(0)
        limited = dataclasses.replace(self.config, max_length=_TOKENS)
        return EncoderDecoder(limited, self.backend).eval()

    def export(self, folder: Path) -> None:
        """For CTranslate2, whose own process is to start none of torch's threads."""
        export_ctranslate2(self.model(), _Names(self.config.vocab_size), folder / "model")

    def source(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = self.sentences, SOURCE
        source = torch.randint(3, self.config.vocab_size, shape, generator=generator)
        source[:, -1] = EOS
        return source


@contextlib.contextmanager
def processes(given: Work, folder: Path) -> Iterator[dict[str, Decoder]]:
    """The engines, each in a process of its own."""
    given.export(folder)
    there = importlib.util.find_spec("transformers") is not None
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:

        def started(name: str) -> Decoder:
            pool = ProcessPoolExecutor(1, context, _begin, (name, given, folder))
            stack.enter_context(pool)
            return lambda beam: pool.submit(_decode, beam).result()

        yield {name: started(name) for name in ENGINES if name != HUGGING_FACE or there}


_engine: Decoder | Exception  # of this process, or why there is none


def _begin(name: str, given: Work, folder: Path) -> None:
    global _engine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is told to all, and the parent's to end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(given.threads)
    keep_freed_memory(COMMAND_BLOCKS)  # as the commands of rowmax.transformer do
    try:
        _engine = ENGINES[name](given, folder)
    except Exception as error:
        _engine = error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _decode(beam: int) -> list[int]:
    if isinstance(_engine, Exception):
        raise _engine
    return _engine(beam)


def _rowmax(given: Work, _: Path, *, int8: bool = False) -> Decoder:
    model, source = given.model(), given.source()
    lengths = torch.full((given.sentences,), SOURCE)
    if int8:
        quantize(model)

    def decode(beam: int) -> list[int]:
        if beam == 1:
            return list(map(len, greedy(model, source, lengths)))
        return list(map(len, beam_search(model, source, lengths, beam, alpha=0.0)))

    return decode


def _ctranslate2(given: Work, folder: Path, *, kind: str) -> Decoder:
    import ctranslate2

    named = [[f"t{token}" for token in row[:-1]] for row in given.source().tolist()]
    translator = ctranslate2.Translator(
        str(folder / "model"), compute_type=kind, intra_threads=given.threads, inter_threads=1
    )

    def decode(beam: int) -> list[int]:
        results = translator.translate_batch(
            named,
            beam_size=beam,
            length_penalty=0,
            max_decoding_length=_TOKENS,
            min_decoding_length=_TOKENS,
        )
        return [len(result.hypotheses[0]) for result in results]

    return decode


def _hugging_face(given: Work, _: Path) -> Decoder:
    """A Marian of these sizes, with its own random weights."""
    from transformers import MarianConfig, MarianMTModel

    config, source = given.config, given.source()
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


HUGGING_FACE = "Hugging Face"
ENGINES: dict[str, Callable[[Work, Path], Decoder]] = {
    "rowmax": _rowmax,
    "rowmax int8": partial(_rowmax, int8=True),
    "CTranslate2 float32": partial(_ctranslate2, kind="float32"),
    "CTranslate2 int8": partial(_ctranslate2, kind="int8"),
    HUGGING_FACE: _hugging_face,
}


class _Names:
    """In place of a tokenizer: a text for each token."""

    def __init__(self, size: int) -> None:
        self._size = size

    def tokens(self) -> list[str]:
        return ["<pad>", "<s>", "</s>", *(f"t{token}" for token in range(3, self._size))]
