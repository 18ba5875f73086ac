"""The sets of a language model that no training may touch: frozen before the first training, and from then on only ever
longer.

    DATA_DIR/holdouts/MODEL.SET.texts.jsonl    the ledger, an example a line, with who answered and when it was frozen
    DATA_DIR/trained/MODEL/texts.npz           the runs (core.near_texts) of everything that MODEL was ever trained on

Unlike pictures, texts are small: the ledger holds them whole, each line with the hash of the one before (trainer.chain), and
a set goes on judging when the data set that it came from is gone. `holdout` is the set of a configured file, which must
go on holding all that was once frozen from it; `base` is what must not be forgotten, with a file or without.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from trainer.chain import START, locked, read_chain, seal
from trainer.config import TrainerConfig
from trainer.config_text import TextModel, own_names
from trainer.core.near_texts import RESEMBLANCE, Known, Sketch
from trainer.core.provenance import taken_at
from trainer.core.split import Times
from trainer.core.text_split import Seen
from trainer.datasets import DatasetError
from trainer.files import write_whole
from trainer.holdout import HoldoutError, Taken
from trainer.kinds.texts import Text, may_not_judge, provenance, read
from trainer.releases import StoredRelease
from trainer.trained import ledger_of

SETS = ("gate", "calibration", "test", "holdout", "base")
SET_MAX = 20_000  # examples of one set
TRAINED_MAX = 200_000  # of the newest
NAMED_MAX = 5  # examples named in one message


@dataclass(frozen=True, slots=True)
class Entry:
    """One frozen example; `frozen`: seconds since the epoch; `batch`: which freezing."""

    number: int
    batch: int
    prompt: str
    messages: list[list[str]]
    wanted: str
    other: str | None
    provenance: dict[str, Any]
    frozen: float
    previous: str
    hash: str = field(default="")

    def sealed(self) -> str:
        """The hash of everything else in the entry, the hash before it too."""
        return seal(asdict(self))

    @property
    def text(self) -> Text:
        """The example; it trains nothing, so it has nothing for a tuner."""
        turns = tuple((role, content) for role, content in self.messages)
        return Text(None, self.prompt, self.wanted, self.other, turns, self.provenance)


def ledger_path(config: TrainerConfig, model: str, name: str) -> Path:
    """Where the ledger of a set lies."""
    return config.holdouts / f"{model}.{name}.texts.jsonl"


def trained_path(config: TrainerConfig, model: str) -> Path:
    """Where the record of all texts that were trained on lies: in the model's ledger (`trainer.trained`)."""
    return ledger_of(config, model) / "texts.npz"


def read_sets(config: TrainerConfig, model: str) -> dict[str, list[Text]]:
    """What is frozen, by set; raises HoldoutError naming the entry that was changed."""
    return {name: [entry.text for entry in _read(ledger_path(config, model, name))] for name in SETS}


def freeze(config: TrainerConfig, model: str, new: Mapping[str, Sequence[Text]], now: float) -> dict[str, Any]:
    """Add examples to sets, before the training; what each set is from now on: {"entries", "hash"}. What is in a set is not
    added again. Raises HoldoutError, OSError."""
    told: dict[str, Any] = {}
    with locked(config.holdouts):
        for name in SETS:
            entries = _append(config, model, name, new.get(name, ()), now)
            if entries:
                told[name] = {"entries": len(entries), "hash": entries[-1].hash}
    return told


def _append(config: TrainerConfig, model: str, name: str, texts: Sequence[Text], now: float) -> list[Entry]:
    path = ledger_path(config, model, name)
    entries = _extended(_read(path), texts, now)
    if len(entries) > SET_MAX:
        raise HoldoutError(
            f"{path}: {len(entries)} examples, at most {SET_MAX}: lower models.{model}.{name}_share, or move the "
            "ledger away to begin a new series of comparisons"
        )
    if texts:
        lines = (json.dumps(asdict(entry), sort_keys=True) for entry in entries)
        write_whole(path, "".join(f"{line}\n" for line in lines).encode())
    return entries


def set_of(settings: TextModel, name: str) -> str:
    """The ledger that a set of the command line means: `target` is the one that judges. Raises HoldoutError."""
    known = {"target": "gate" if settings.holdout is None else "holdout", "base": "base", "test": "test",
             "calibration": "calibration"}  # fmt: skip
    if name not in known:
        raise HoldoutError(f"holdout {name!r}: of texts there is {', '.join(known)}")
    return known[name]


def take(
    config: TrainerConfig, model: str, name: str, offered: Sequence[Text] | None, now: float, *, first: bool
) -> Taken:
    """Freeze a set for the first time, or extend it: what its configured file adds, or, where it has none, what of `offered`
    may be in it. Raises HoldoutError, DatasetError, OSError; what was refused is named by reason."""
    settings = config.text(model)
    ledger = set_of(settings, name)
    key, path = {"holdout": ("holdout", settings.holdout), "base": ("holdout_base", settings.holdout_base)}.get(
        ledger, ("holdout", None)
    )
    if path is not None and offered is not None:
        raise HoldoutError(f"models.{model}.{key} = {path}: that file is the set; add the lines to it, without --from")
    if path is None and offered is None:
        raise HoldoutError(f"holdout {model}/{name}: --from FILE is missing: no file is configured for this set")
    with locked(config.holdouts):
        sets, trained, names = read_sets(config, model), read_trained(config, model), own_names(model, settings)
        held = sets.pop(ledger)
        if first and held:
            raise HoldoutError(f"holdout {model}/{name} is frozen since its first entry: use `trainer holdout extend`")
        if not first and not held:
            raise HoldoutError(f"holdout {model}/{name} is not frozen yet: use `trainer holdout freeze`")
        # The sets that judge and the base set are one side, as those of images.
        side = ("gate", "holdout", "base")
        others = [each for other, rows in sets.items() if other not in side or ledger not in side for each in rows]
        refused: dict[str, list[str]] = {}
        if path is not None:
            given = read_file(path, "lora" if ledger == "base" else settings.strategy)
            fresh = check_file(
                path, given, held, trained, names, settings.label_confidence_min, others, settings.resemblance
            )
        else:
            fresh = _admitted(settings, names, offered or (), held, trained, others, refused)
        entries = _append(config, model, ledger, fresh, now)
        return Taken(len(fresh), refused, len(entries), entries[-1].hash if entries else "")


def _admitted(
    settings: TextModel, names: Sequence[str], offered: Sequence[Text], held: Sequence[Text], trained: Sequence[Seen],
    others: Sequence[Text], refused: dict[str, list[str]],
) -> list[Text]:  # fmt: skip
    """What may be in a set of all that is offered; the identities of the others are added to `refused`."""
    learned, apart = _likenesses(trained, others, settings.resemblance)
    times = Times((each.device, each.captured) for each in trained)
    there = {each.identity for each in held}
    fresh: list[Text] = []
    for each in offered:
        reason = "duplicate" if each.identity in there else may_not_judge(each, names, settings.label_confidence_min)
        reason = reason or _too_near(each, learned, apart)
        reason = reason or (
            "beside_training" if times.beside(*taken_at(each.provenance), settings.split_guard_s) else ""
        )
        if reason:
            refused.setdefault(reason, []).append(each.identity)
        else:
            there.add(each.identity)
            fresh.append(each)
    return fresh


def _likenesses(trained: Sequence[Seen], others: Sequence[Text], resemblance: float) -> tuple[Known, Known]:
    return Known((each.sketch for each in trained), resemblance), Known((each.sketch for each in others), resemblance)


def _too_near(text: Text, learned: Known, apart: Known) -> str:
    if learned.near(text.sketch) >= 0:
        return "near_training"
    return "near_other_set" if apart.near(text.sketch) >= 0 else ""


def read_file(path: Path, strategy: str) -> list[Text]:
    """The examples of a configured set; raises DatasetError where there is none, or a line is none."""
    found, broken, _ = read(path, strategy)
    if broken or not found:
        what = f"{broken[0]}: every line of a holdout must count" if broken else "no example is in it"
        raise DatasetError(f"{path}: {what}; correct it")
    return found


def check_file(
    path: Path, texts: Sequence[Text], frozen: Sequence[Text], trained: Sequence[Seen], names: Sequence[str],
    confidence_min: float, others: Sequence[Text], resemblance: float = RESEMBLANCE,
) -> list[Text]:  # fmt: skip
    """What a configured holdout adds to its set. `frozen`: the set; `others`: what calibrates or is kept for the test.

    Raises HoldoutError when it lacks what was frozen, or has an example that may not judge."""
    there = {each.identity for each in texts}
    gone = [each for each in frozen if (each.other is None) == (texts[0].other is None) and each.identity not in there]
    if gone:
        raise HoldoutError(
            f"{path} has changed since it was first used: {len(gone)} examples are gone or say something else "
            f"({_named(gone)}): a gate that moves judges nothing; put them back"
        )
    known = {each.identity for each in frozen}
    fresh = [each for each in {each.identity: each for each in texts}.values() if each.identity not in known]
    learned, apart = _likenesses(trained, others, resemblance)
    wrong: dict[str, list[Text]] = {}
    for each in fresh:
        reason = may_not_judge(each, names, confidence_min) or _too_near(each, learned, apart)
        if reason:
            wrong.setdefault(reason, []).append(each)
    if wrong:
        told = "; ".join(f"{len(rows)} {reason}, {_FIXES[reason]} ({_named(rows)})" for reason, rows in wrong.items())
        raise HoldoutError(f"{path}: examples that may not judge: {told}. Correct them, or take them out of the file")
    return fresh


_FIXES = {
    "no_provenance": "say who answered: a person, or a model with its release, as an `escalate` step",
    "own_prediction": "it is the model's own answer: have a person or another model answer",
    "below_label_confidence": "its label is below label_confidence_min: have a person look at it",
    "near_training": "the model has learned from it, or from nearly the same question",
    "near_other_set": "nearly the same question calibrates, or is in another set",
}


def check_releases(config: TrainerConfig, model: str, releases: Sequence[StoredRelease]) -> list[str]:
    """The releases that say that they were judged on a set which the ledger has never been: it was replaced."""
    heads: dict[str, list[str]] = {}
    wrong = []
    for stored in releases:
        for name, told in (stored.manifest.evaluation.get("holdout_sets") or {}).items():
            if name not in heads:
                heads[name] = [entry.hash for entry in _read(ledger_path(config, model, name))]
            count = int(told["entries"])
            if heads[name][count - 1 : count] != [told["hash"]]:
                wrong.append(stored.ref.release)
                break
    return wrong


def described(config: TrainerConfig, model: str) -> dict[str, dict[str, Any]]:
    """Each set in numbers; raises HoldoutError naming the entry that was changed."""
    found: dict[str, dict[str, Any]] = {}
    for name in SETS:
        entries = _read(ledger_path(config, model, name))
        found[name] = {"examples": len(entries)}
        if entries:
            found[name] |= {
                "pairs": sum(entry.other is not None for entry in entries),
                "labelled_by": provenance([entry.text for entry in entries]),
                "devices": dict(Counter(str(each) for entry in entries if (each := entry.provenance.get("device")))),
                "frozen_first": entries[0].frozen,
                "frozen_last": entries[-1].frozen,
                "identity": entries[-1].hash,
            }
    return found


def read_trained(config: TrainerConfig, model: str) -> list[Seen]:
    """What any training of the model has had; raises HoldoutError when the record cannot be read."""
    path = trained_path(config, model)
    if not path.is_file():
        return []
    try:
        with np.load(path, allow_pickle=False) as held:
            runs = np.split(held["runs"].astype(np.uint32), np.cumsum(held["counts"])[:-1])
            rows = zip(
                runs, held["numbers"].tolist(), held["devices"].tolist(), held["captured"].tolist(),
                held["identities"].tolist(), strict=True,
            )  # fmt: skip
            return [Seen(Sketch(each, number), device, at or None, name) for each, number, device, at, name in rows]
    except Exception as error:  # zip, zlib, numpy and key errors: all say that the file is damaged
        raise HoldoutError(
            f"{path}: {error}; it says what was trained on: restore it, or remove it and the model's ledgers to begin anew"
        ) from None


def remember(config: TrainerConfig, model: str, texts: Sequence[Text]) -> int:
    """Note that the model is trained on these; how many were new. Raises HoldoutError, OSError."""
    with locked(config.holdouts):
        before = read_trained(config, model)
        known = {each.identity for each in before}
        fresh = [each.seen for each in {each.identity: each for each in texts}.values() if each.identity not in known]
        if not fresh:
            return 0
        rows = [*before, *fresh][-TRAINED_MAX:]
        out = BytesIO()
        np.savez_compressed(
            out,
            runs=np.concatenate([each.sketch.runs for each in rows]),
            counts=np.array([len(each.sketch.runs) for each in rows], np.int64),
            numbers=np.array([each.sketch.numbers for each in rows], np.int64),
            devices=np.array([each.device for each in rows], dtype=str),
            captured=np.array([each.captured or 0.0 for each in rows], np.float64),
            identities=np.array([each.identity for each in rows], dtype="U64"),
        )
        write_whole(trained_path(config, model), out.getvalue())
        return len(fresh)


def _read(path: Path) -> list[Entry]:
    return read_chain(path, lambda row: Entry(**row), lambda entry: f"entry {entry.number}", HoldoutError)


def _extended(entries: Sequence[Entry], texts: Sequence[Text], now: float) -> list[Entry]:
    made = list(entries)
    known = {entry.text.identity for entry in entries}
    batch = entries[-1].batch + 1 if entries else 0
    for each in texts:
        if each.identity not in known:
            known.add(each.identity)
            entry = Entry(
                len(made), batch, each.prompt, [list(turn) for turn in each.messages], each.wanted, each.other,
                dict(each.provenance), now, made[-1].hash if made else START,
            )  # fmt: skip
            made.append(Entry(**{**asdict(entry), "hash": entry.sealed()}))
    return made


def _named(texts: Sequence[Text]) -> str:
    shown = ", ".join(json.dumps(each.question[:60], ensure_ascii=False) for each in texts[:NAMED_MAX])
    return f"{shown} and {len(texts) - NAMED_MAX} more" if len(texts) > NAMED_MAX else shown
