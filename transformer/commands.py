"""The commands that draw: attend and positions."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..console import UsageError, check_outputs, check_text
from . import attention_page, pictures
from . import checkpoint as checkpoints
from .attend import KINDS, AttendError, Attention, look
from .interface import TranslationModel
from .tokenizer import Tokenizer

_PAGE = (".html",)
_MAX_PIXELS = 2**25  # of the positional encoding
# For the sentence's model: from the command line to a model and its tokenizer.
Loader = Callable[[argparse.Namespace], tuple[TranslationModel, Tokenizer]]


def add_attend(commands: Any, positive: Callable[[str], int]) -> argparse.ArgumentParser:
    """The `attend` command; who calls adds the options for the model and the machine."""
    command: argparse.ArgumentParser = commands.add_parser(
        "attend",
        help="draw where a model looks while it translates a sentence",
        description="Translate a sentence and draw the attention weights: heat maps with the "
        "tokens on both axes (PNG, SVG), or one self-contained page where pointing at a token "
        "shows where it looks (HTML).",
    )
    command.add_argument(
        "model", type=Path, metavar="MODEL", help="a training run's directory, or one checkpoint"
    )
    command.add_argument("sentence", metavar="SENTENCE")
    command.add_argument("--layer", type=positive, metavar="N", help="from 1; default: the last")
    heads = command.add_mutually_exclusive_group()
    heads.add_argument("--head", type=positive, metavar="N", help="this head alone, from 1")
    heads.add_argument(
        "--heads", choices=("all",), default="all", help="all heads side by side (the default)"
    )
    command.add_argument(
        "--kind",
        choices=KINDS,
        default="cross",
        help="encoder or decoder: attention of a side to itself; cross: of the target to the "
        "source (default; the only one that recurrent models have)",
    )
    _add_output(command, (*pictures.FORMATS, *_PAGE))
    command.add_argument(
        "--font", type=Path, metavar="FILE", help="draw text with this font (PNG and SVG)"
    )
    return command


def add_positions(commands: Any, positive: Callable[[str], int]) -> argparse.ArgumentParser:
    """The `positions` command."""
    command: argparse.ArgumentParser = commands.add_parser(
        "positions",
        help="draw the positional encoding",
        description="Draw the Transformer's sinusoidal positional encoding (PNG, SVG), positions "
        "by dimensions.",
    )
    command.add_argument(
        "--length", type=positive, default=100, help="positions (default: %(default)s)"
    )
    command.add_argument(
        "--d-model", type=positive, default=512, help="dimensions (default: %(default)s)"
    )
    _add_output(command, pictures.FORMATS)
    return command


def attend(args: argparse.Namespace, load: Loader) -> int:
    """What can be wrong is checked first, and the file appears whole or not at all."""
    suffix = _output(args.out, (*pictures.FORMATS, *_PAGE))
    read = {"MODEL": checkpoints.folders(args.model)}
    check_outputs({"--out": args.out}, {"--font": args.font}, read)
    check_text("the sentence", args.sentence)
    if not args.sentence.strip():
        raise AttendError("the sentence is empty")
    model, tokenizer = load(args)
    attention: Attention = look(model, tokenizer, args.sentence, args.beam, args.length_penalty)
    layer, head = attention.check(args.kind, args.layer, args.head)
    if suffix in _PAGE:
        content = attention_page.page(attention, args.kind, layer, head).encode()
    else:
        content = pictures.heat_maps(attention, args.kind, layer, head, suffix, args.font)
    _write(args.out, content)
    print(attention.translation)
    return 0


def positions(args: argparse.Namespace) -> int:
    suffix = _output(args.out, pictures.FORMATS)
    if args.d_model % 2:
        raise AttendError(
            f"--d-model: expected an even number (sine and cosine), got {args.d_model}"
        )
    if args.length * args.d_model > _MAX_PIXELS:
        raise AttendError(
            f"--length {args.length}, --d-model {args.d_model}: a picture has at most "
            f"{_MAX_PIXELS:,} numbers"
        )
    _write(args.out, pictures.positions(args.length, args.d_model, suffix))
    return 0


def _add_output(command: argparse.ArgumentParser, endings: tuple[str, ...]) -> None:
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"the ending says what is made: {', '.join(endings)}",
    )


def _output(path: Path, endings: tuple[str, ...]) -> str:
    """The file's ending; AttendError where it is unknown or can't be written or drawn."""
    suffix = path.suffix.lower()
    if suffix not in endings:
        raise AttendError(f"--out {path}: expected a name that ends in one of {', '.join(endings)}")
    if not path.parent.is_dir():
        raise AttendError(f"--out {path}: {path.parent} is no directory")
    if path.is_dir():
        raise AttendError(f"--out {path}: is a directory")
    try:
        with _beside(path):
            pass
    except OSError as error:
        raise UsageError(f"--out: can't write {path}: {error.strerror}") from error
    if suffix in pictures.FORMATS:
        pictures.require_matplotlib()
    return suffix


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A new file next to this one, where it is written until it is whole; removed at the end."""
    for number in itertools.count(1):
        temporary = path.with_name(f".{path.name}.incomplete-{number}")
        with contextlib.suppress(FileExistsError):
            temporary.touch(exist_ok=False)
            break
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    try:
        with _beside(path) as temporary:
            temporary.write_bytes(content)
            temporary.replace(path)
    except OSError as error:
        raise AttendError(f"--out {path}: can't be written: {error.strerror}") from error
