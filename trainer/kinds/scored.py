"""What an adapter makes of held-out examples, by the engine that devices run, and how near it is to what was trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer import likelihood
from trainer.core.crossed import Crossed, pair_up
from trainer.core.gate_text import Scores
from trainer.core.parity import ParityReport
from trainer.kinds.texts import Text
from trainer.releases import StoredRelease

LOSS_PARITY_EXAMPLES_MAX = 32  # the checkpoint computes in float32 and may be large
PARITY_TEXTS_MAX = 8  # with the tokens below: 1024 rows of logits, 820 MB of a vocabulary of 200 000
PARITY_TOKENS_MAX = 128  # of one text


@dataclass(frozen=True, slots=True)
class Side:
    """A model that is compared with another: what it makes of what is held out, of what must not be forgotten (None: not
    measured), and of exchanged answers (None: not measured, as of pairs, whose two answers are to one question)."""

    scores: Scores
    kept: Scores | None = None
    matching: Crossed | None = None


def score(scorer: likelihood.Scorer, held_out: Sequence[Text], release: str) -> Scores:
    """What a model makes of examples; raises EngineError."""
    wanted = scorer.score([each.said for each in held_out])
    margins: Iterable[float] = ()
    if held_out and held_out[0].other is not None:
        others = scorer.score([each.avoided for each in held_out])
        margins = (other - loss for (loss, _), (other, _) in zip(wanted, others, strict=True))
    return Scores(
        release,
        tuple(each.identity for each in held_out),
        tuple(tokens for _, tokens in wanted),
        tuple(loss for loss, _ in wanted),
        tuple(margins),
    )


def side(
    base: StoredRelease, adapter: Path | None, release: str, held_out: Sequence[Text], kept: Sequence[Text] = (), *,
    heeds: bool = True,
) -> Side:  # fmt: skip
    """Measure `base` with `adapter` on it (None: bare), as devices load them; `heeds`: whether to look at what it makes of
    exchanged answers. Raises EngineError."""
    with likelihood.shipped(base.folder, base.manifest, adapter) as scorer:
        return Side(
            score(scorer, held_out, release),
            score(scorer, kept, release) if kept else None,
            _matching(scorer, held_out) if heeds else None,
        )


def _matching(scorer: likelihood.Scorer, held_out: Sequence[Text]) -> Crossed:
    """How much likelier it finds the answers of two examples behind their own questions than behind each other's, of those
    that fit there."""

    def exchanged(asked: Text, answer: Text) -> likelihood.Said:
        return replace(asked.said, answer=answer.wanted)

    def loss(asked: Text, answer: Text) -> float:
        return scorer.one(exchanged(asked, answer))[0]

    found = [(held_out[first], held_out[second]) for first, second in pair_up([each.wanted for each in held_out])]
    pairs = [(a, b) for a, b in found if scorer.fits(exchanged(a, b)) and scorer.fits(exchanged(b, a))]
    leads = tuple(loss(a, b) + loss(b, a) - loss(a, a) - loss(b, b) for a, b in pairs)
    return Crossed(tuple((a.identity, b.identity) for a, b in pairs), leads)


def loss_parity(
    checkpoint: Path, adapter: Path, held_out: Sequence[Text], base: Scores, candidate: Scores
) -> dict[str, float]:
    """Losses a token of some examples: of the checkpoint without and with its PEFT adapter, and by the files that ship, that
    gave the scores `base` and `candidate`."""
    some = sorted(held_out, key=lambda each: each.identity)[:LOSS_PARITY_EXAMPLES_MAX]
    known = {each.identity for each in some}
    found = {}
    for name, peft in (("base", None), ("adapter", adapter)):
        with likelihood.checkpoint(checkpoint, peft) as scorer:
            found[f"checkpoint_{name}"] = score(scorer, some, "checkpoint").loss
    return found | {"shipped_base": _part(base, known), "shipped_adapter": _part(candidate, known)}


def logits_parity(checkpoint: Path, adapter: Path, file: Path, folder: Path, held_out: Sequence[Text]) -> ParityReport:
    """How far the logits of `file`, the adapter that ships, are off the PEFT adapter's on some held-out questions with their
    answers; the base as F16 is made below `folder` for that. Raises ExportError or ValueError."""
    from trainer.export.language import adapter_parity

    some = sorted(held_out, key=lambda each: each.identity)[:PARITY_TEXTS_MAX]
    texts = [f"{each.prompt}{each.wanted}" for each in some]
    return adapter_parity(adapter, checkpoint, file, folder, texts, tokens_max=PARITY_TOKENS_MAX)


def _part(scores: Scores, known: set[str]) -> float:
    """The loss a token on some of the examples."""
    chosen = [place for place, identity in enumerate(scores.examples) if identity in known]
    return sum(scores.losses[place] for place in chosen) / sum(scores.tokens[place] for place in chosen)
