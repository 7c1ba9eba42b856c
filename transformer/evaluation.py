"""Scores of translations against references: BLEU and chrF by sacrebleu, and exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..console import from_extra

# The tokenizations of sacrebleu's BLEU that need no further package or download.
TOKENIZATIONS = ("13a", "intl", "char", "zh", "none")


@dataclass(frozen=True)
class Scores:
    """Corpus scores from 0 to 100; the signatures say exactly how each was computed."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    exact_match: float
    sentences: int

    def __str__(self) -> str:
        return "\n".join(
            (
                f"BLEU         {self.bleu:6.2f}   {self.bleu_signature}",
                f"chrF         {self.chrf:6.2f}   {self.chrf_signature}",
                f"exact match  {self.exact_match:6.2f}   % of {self.sentences:,} sentences",
            )
        )


def require_sacrebleu() -> None:
    """MissingExtraError where sacrebleu is not installed: found out before translating."""
    with from_extra("transformer"):
        import sacrebleu  # noqa: F401


def score(translations: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> Scores:
    """Compare translations with one reference each.

    ``tokenize`` is sacrebleu's name for how BLEU cuts words: ``char`` suits targets that
    don't put spaces between words.
    """
    if len(translations) != len(references):
        raise ValueError(
            f"{len(translations):,} translations can't be compared with {len(references):,} "
            "references"
        )
    if not references:
        raise ValueError("no sentences to score")
    if tokenize not in TOKENIZATIONS:
        raise ValueError(f"tokenize: expected one of {', '.join(TOKENIZATIONS)}, got {tokenize!r}")
    with from_extra("transformer"):
        from sacrebleu.metrics import BLEU, CHRF
    bleu, chrf = BLEU(tokenize=tokenize), CHRF()
    bleu_score = bleu.corpus_score(list(translations), [list(references)])
    chrf_score = chrf.corpus_score(list(translations), [list(references)])
    equal = sum(a.strip() == b.strip() for a, b in zip(translations, references, strict=True))
    return Scores(
        bleu=bleu_score.score,
        bleu_signature=str(bleu.get_signature()),
        chrf=chrf_score.score,
        chrf_signature=str(chrf.get_signature()),
        exact_match=100 * equal / len(references),
        sentences=len(references),
    )
