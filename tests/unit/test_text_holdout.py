"""The ledgers of texts: they only grow, changes are named, and what trained is remembered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from edged.wire.manifest import ReleaseManifest, ReleaseRef
from trainer.cli import app
from trainer.config import TrainerConfig, load_config
from trainer.core.split import SplitRules
from trainer.core.text_split import Seen
from trainer.holdout import HoldoutError
from trainer.kinds.texts import Text, Texts, arrange, provenance, sureness
from trainer.releases import StoredRelease
from trainer.text_holdout import check_file, check_releases, freeze, ledger_path, read_sets, read_trained, remember

ANN = {"kind": "person", "who": "ann"}
BIG = {"kind": "model", "who": "site-1", "release": "large@2.0", "confidence": 0.8}
RULES = SplitRules(calibration=0.2, gate=0.3, test=0.1)


def text(number: int, who: Mapping[str, Any] = ANN, other: str | None = None, answer: str = "") -> Text:
    chance = Random(number)
    words = ["".join(chance.choices("abcdefghijklmnop", k=6)) for _ in range(6)]
    asked = f"Who looks after the {' '.join(words)}?"
    return Text({"prompt": asked}, asked, answer or f"the {words[0]} team", other, (), who)


@pytest.fixture
def config(tmp_path: Path) -> TrainerConfig:
    return TrainerConfig(data_dir=tmp_path / "data")


def arranged(
    texts: Sequence[Text], frozen: Mapping[str, Sequence[Text]] | None = None, trained: Sequence[Seen] = ()
) -> Texts:
    return arrange(
        texts, [], frozen=frozen or {}, trained=trained, rules=RULES, names=("clerk", "clerk-lora"), confidence_min=0.5,
        validation_share=0.1,
    )  # fmt: skip


TEXTS = [text(number) for number in range(100)]


def test_a_data_set_falls_apart_once_and_the_same_way_again(config: TrainerConfig) -> None:
    first = arranged(TEXTS)
    assert (
        sum(len(part) for part in (first.training, first.validation, first.holdout, first.calibration, first.test))
        == 100
    )
    assert min(len(first.holdout), len(first.calibration), len(first.test), len(first.training)) >= 5
    told = freeze(config, "clerk", first.new, 1.0)
    assert remember(config, "clerk", [*first.training, *first.validation]) == len(first.training) + len(
        first.validation
    )
    assert {name: each["entries"] for name, each in told.items()} == {
        "gate": len(first.holdout), "calibration": len(first.calibration), "test": len(first.test),
    }  # fmt: skip

    again = arranged(TEXTS[::-1], read_sets(config, "clerk"), read_trained(config, "clerk"))
    assert {each.identity for each in again.training} == {each.identity for each in first.training}
    assert (again.new, again.usable, again.left_out) == ({}, 100, {})
    assert freeze(config, "clerk", again.new, 2.0) == told
    assert remember(config, "clerk", again.training) == 0

    # When the data set is gone, and another one comes, what was frozen still judges, and nothing like it trains.
    alike = [replace(each, prompt=f"Please: {each.prompt}") for each in [*first.holdout, *first.calibration]]
    later = arranged([*alike, *[text(number) for number in range(100, 130)]], read_sets(config, "clerk"))
    assert later.left_out["near_holdout"] > 5
    assert {each.identity for each in first.holdout} < {each.identity for each in later.holdout}
    assert not any(each.prompt.startswith("Please") for each in (*later.training, *later.validation))


def test_what_trained_never_judges(config: TrainerConfig) -> None:
    first = arranged(TEXTS)
    remember(config, "clerk", first.holdout)  # as if an older version had trained on them
    second = arranged(TEXTS, {}, read_trained(config, "clerk"))
    assert second.holdout == []
    assert second.left_out["near_training"] == len(first.holdout)


def test_labels_that_are_none_train_nothing_and_unnamed_ones_judge_nothing() -> None:
    own, adapter = ({**BIG, "release": f"{name}@1.0"} for name in ("clerk", "clerk-lora"))
    rows = [
        *[text(number, own) for number in range(10)], *[text(number, adapter) for number in range(10, 20)],
        *[text(number, {**BIG, "confidence": 0.4}) for number in range(20, 30)],
        *[text(number, {}) for number in range(30, 60)],
        *[text(number, {"kind": "model", "who": "x", "confidence": 0.9}) for number in range(60, 80)],
        text(99, {**BIG, "opinions": [{"status": "labelled", "confidence": 0.9, "label": [{"text": "nobody"}]}]}),
    ]  # fmt: skip
    sets = arranged(rows)
    assert sets.left_out == {"own_prediction": 20, "below_label_confidence": 10, "disputed": 1}
    assert (len(sets.training) + len(sets.validation), sets.new) == (50, {})


def test_who_answered_is_counted_with_how_sure() -> None:
    rows = [text(1), text(2), text(3, BIG), text(4, {**BIG, "confidence": 0.6}), text(5, {})]
    assert provenance(rows) == {"model site-1 (large@2.0)": 2, "person ann": 2, "unknown": 1}
    assert sureness(rows) == {"lowest": 0.6, "mean": pytest.approx(0.7)}
    assert sureness(rows[:2]) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: [rows[0].replace("team", "crew"), *rows[1:]], "line 1 (entry 0): the entry was changed"),
        (lambda rows: [rows[0], *rows[2:]], "line 2 (entry 2): entry 1 is missing or was put elsewhere"),
        (lambda rows: rows[1:], "line 1 (entry 1): entry 0 is missing"),
        (lambda rows: ["{", *rows[1:]], "line 1: "),
        (lambda rows: ['{"number": 0}', *rows[1:]], "line 1: "),
    ],
)
def test_an_entry_that_was_changed_is_named(config: TrainerConfig, change: Any, reason: str) -> None:
    freeze(config, "clerk", {"gate": TEXTS[:5]}, 1.0)
    path = ledger_path(config, "clerk", "gate")
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(HoldoutError, match="restore the ledger from a copy") as error:
        read_sets(config, "clerk")
    assert f"{path}, {reason}" in str(error.value)


def test_a_replaced_ledger_is_found_by_what_releases_were_judged_on(config: TrainerConfig) -> None:
    judged = freeze(config, "clerk", {"gate": TEXTS[:5]}, 1.0)
    release = StoredRelease(
        ReleaseRef(release="clerk-lora@1.0", sha256="0" * 64),
        ReleaseManifest(
            release="clerk-lora@1.0", kind="lora", engine="llama", files={}, created="2026",
            evaluation={"holdout_sets": judged},
        ),
        Path("x"),
    )  # fmt: skip
    freeze(config, "clerk", {"gate": TEXTS[:8]}, 2.0)
    assert check_releases(config, "clerk", [release]) == []
    ledger_path(config, "clerk", "gate").unlink()
    assert check_releases(config, "clerk", [release]) == ["clerk-lora@1.0"]
    freeze(config, "clerk", {"gate": TEXTS[3:12]}, 3.0)
    assert check_releases(config, "clerk", [release]) == ["clerk-lora@1.0"]


def test_a_conversation_comes_back_as_it_was_frozen(config: TrainerConfig) -> None:
    turns = (("system", "Be brief."), ("user", "A seven?"))
    talk = Text({}, "Be brief.\nInstruct: A seven?\nOutput:", "yes\u2028", "no", turns, BIG)
    freeze(config, "clerk", {"calibration": [talk]}, 1.0)
    (found,) = read_sets(config, "clerk")["calibration"]
    assert (found, found.identity) == (replace(talk, given=None), talk.identity)
    assert found.question == "A seven?"


def test_a_damaged_record_of_what_trained_stops_the_job(config: TrainerConfig) -> None:
    remember(config, "clerk", TEXTS[:3])
    path = config.data_dir / "trained/clerk/texts.npz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(HoldoutError, match=r"clerk/texts.npz: .*restore it"):
        read_trained(config, "clerk")


def checked(texts: Sequence[Text], frozen: Sequence[Text] = (), trained: Sequence[Seen] = ()) -> list[Text]:
    return check_file(Path("holdout.jsonl"), texts, frozen, trained, ("clerk", "clerk-lora"), 0.5, TEXTS[50:60])


def test_a_configured_holdout_may_grow_and_nothing_else() -> None:
    assert checked(TEXTS[:5]) == TEXTS[:5]
    assert checked(TEXTS[:8], TEXTS[:5]) == TEXTS[5:8]
    with pytest.raises(
        HoldoutError, match=r"has changed since it was first used: 1 examples are gone or say something else"
    ):
        checked([*TEXTS[:4], text(4, answer="nobody")], TEXTS[:5])
    for more, reason in (
        (text(20, {}), "1 no_provenance, say who answered"),
        (text(20, {**BIG, "release": "clerk@1.0"}), "1 own_prediction"),
        (text(20, {**BIG, "confidence": 0.1}), "1 below_label_confidence"),
        (text(55, other="x"), "1 near_other_set"),
    ):
        with pytest.raises(HoldoutError) as error:
            checked([*TEXTS[:5], more], TEXTS[:5])
        assert reason in str(error.value) and json.dumps(more.question[:60]) in str(error.value)
    with pytest.raises(HoldoutError, match="1 near_training"):
        checked(TEXTS[:6], TEXTS[:5], [TEXTS[5].seen])


def test_the_command_line_shows_and_verifies_the_sets_of_texts(tmp_path: Path) -> None:
    (tmp_path / "trainer.toml").write_text('data_dir = "data"\n[models.clerk]\nkind = "llm"\ncheckpoint = "c"\n')
    config = load_config(tmp_path / "trainer.toml")
    rows = [text(1), text(2, {**BIG, "device": "d1"}), text(3, {**BIG, "device": "d1"}, "nobody")]
    freeze(config, "clerk", {"gate": rows}, 1_700_000_000.0)

    def call(what: str) -> Any:
        return CliRunner().invoke(app, ["holdout", what, "clerk", "--config", str(tmp_path / "trainer.toml"), "--json"])

    shown = json.loads(call("show").stdout)
    assert {name: row["examples"] for name, row in shown.items()} == {
        "gate": 3,
        "calibration": 0,
        "test": 0,
        "holdout": 0,
        "base": 0,
    }
    gate = shown["gate"]
    assert (gate["pairs"], gate["devices"], gate["frozen_first"]) == (1, {"d1": 2}, "2023-11-14T22:13:20Z")
    assert gate["labelled_by"] == {"model site-1 (large@2.0)": 2, "person ann": 1}
    assert json.loads(call("verify").stdout)["gate"] == gate["identity"]
    path = ledger_path(config, "clerk", "gate")
    path.write_text(path.read_text().replace("ann", "bob"))
    done = call("verify")
    assert done.exit_code == 1 and "entry 0): the entry was changed" in done.stderr


class Commands:
    """`trainer holdout` on a model whose sets are files or ledgers alone."""

    def __init__(self, folder: Path, more: str = "") -> None:
        self.folder = folder
        text = f'data_dir = "data"\n[models.clerk]\nkind = "llm"\ncheckpoint = "c"\n{more}'
        (folder / "trainer.toml").write_text(text)
        self.config = load_config(folder / "trainer.toml")

    def file(self, name: str, rows: Sequence[Text], *more: str) -> Path:
        lines = []
        for each in rows:
            step = {"tool": "escalate", "status": "success", **each.provenance}
            where = {"device": each.provenance.get("device"), "ts": 1.7e9}
            steps = [{"tool": "generate", "output": each.other, "status": "failure", **where}] if each.other else []
            row = {"goal": each.prompt, "context_summary": "", "plan": [{"tool": "generate", "arguments": {}}]}
            lines.append(json.dumps({**row, "execution": [*steps, step], "summary": each.wanted}))
        path = self.folder / name
        path.write_text("".join(f"{each}\n" for each in (*lines, *more)))
        return path

    def __call__(self, *arguments: str | Path, code: int = 0) -> Any:
        command = ["holdout", *map(str, arguments), "--config", str(self.folder / "trainer.toml"), "--json"]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == code, done.output
        return done.stderr if code else json.loads(done.stdout)


def test_freezing_by_hand_takes_what_may_judge_and_names_the_others(tmp_path: Path) -> None:
    call = Commands(tmp_path)
    own = {**BIG, "release": "clerk-lora@1.0"}
    remember(call.config, "clerk", [text(7)])
    freeze(call.config, "clerk", {"calibration": [text(8)]}, 1.0)
    rows = [*TEXTS[10:16], text(20, {}), text(21, own), text(22, {**BIG, "confidence": 0.1}), text(7), text(8)]
    given = call.file("given.jsonl", [*rows, TEXTS[10]], "{broken")
    done = call("freeze", "clerk", "--from", given)
    assert (done["set"], done["added"], done["texts"]) == ("target", 6, 6)
    assert {reason: len(each) for reason, each in done["refused"].items()} == {
        "no_provenance": 1, "own_prediction": 1, "below_label_confidence": 1, "near_training": 1, "near_other_set": 1,
        "duplicate": 1, "bad_line": 1,
    }  # fmt: skip
    assert {each.prompt for each in read_sets(call.config, "clerk")["gate"]} == {each.prompt for each in TEXTS[10:16]}
    assert "is frozen since its first entry: use `trainer holdout extend`" in call(
        "freeze", "clerk", "--from", given, code=1
    )

    more = call.file("more.jsonl", TEXTS[14:18])
    done = call("extend", "clerk", "--from", more)
    assert (done["added"], done["texts"], done["refused"].keys()) == (2, 8, {"duplicate"})
    assert call("verify", "clerk")["gate"] == done["identity"]
    # What is frozen by hand judges, and nothing like it ever trains.
    again = [replace(each, prompt=each.prompt.upper()) for each in TEXTS[10:18]]
    sets = arranged([*TEXTS[10:18], *again], read_sets(call.config, "clerk"))
    assert (sets.training, sets.validation) == ([], [])


def test_the_base_set_is_frozen_before_it_is_extended(tmp_path: Path) -> None:
    call = Commands(tmp_path)
    given = call.file("general.jsonl", TEXTS[:12])
    assert "is not frozen yet" in call("extend", "clerk", "--set", "base", "--from", given, code=1)
    assert "--from FILE is missing" in call("freeze", "clerk", "--set", "base", code=1)
    assert "there is target, base, test, calibration" in call(
        "freeze", "clerk", "--set", "gold", "--from", given, code=1
    )
    nobody = call.file("nobody.jsonl", [text(1, {})])
    assert "no text was frozen: 1 no_provenance" in call("freeze", "clerk", "--set", "base", "--from", nobody, code=1)
    assert call("freeze", "clerk", "--set", "base", "--from", given)["texts"] == 12
    assert call("show", "clerk")["base"]["examples"] == 12
    # Target and base are one side: the same question may be in both; the test is apart from them.
    assert call("freeze", "clerk", "--set", "target", "--from", given)["texts"] == 12
    assert "no text was frozen: 12 near_other_set" in call("freeze", "clerk", "--set", "test", "--from", given, code=1)


def test_a_configured_file_is_the_set_and_is_frozen_from_there(tmp_path: Path) -> None:
    call = Commands(tmp_path, 'holdout = "judge.jsonl"\nholdout_base = "general.jsonl"\n')
    call.file("judge.jsonl", TEXTS[:5])
    call.file("general.jsonl", TEXTS[20:23])
    other = call.file("other.jsonl", TEXTS[5:8])
    assert "that file is the set; add the lines to it" in call("freeze", "clerk", "--from", other, code=1)
    assert call("freeze", "clerk")["texts"] == 5
    assert call("freeze", "clerk", "--set", "base")["texts"] == 3
    call.file("judge.jsonl", TEXTS[:7])
    assert call("extend", "clerk")["added"] == 2
    call.file("judge.jsonl", TEXTS[1:7])
    assert "1 examples are gone" in call("extend", "clerk", code=1)
    assert {name: row["examples"] for name, row in call("show", "clerk").items() if row["examples"]} == {
        "holdout": 7,
        "base": 3,
    }


def test_with_pairs_the_judges_are_pairs_and_the_base_set_is_not(tmp_path: Path) -> None:
    call = Commands(tmp_path, 'strategy = "dpo"\n')
    rows = [text(number, other="nobody") for number in range(6)]
    assert call("freeze", "clerk", "--from", call.file("pairs.jsonl", rows))["texts"] == 6
    assert {each.other for each in read_sets(call.config, "clerk")["gate"]} == {"nobody"}
    assert call("freeze", "clerk", "--set", "base", "--from", call.file("base.jsonl", TEXTS[10:15]))["texts"] == 5
    assert {each.other for each in read_sets(call.config, "clerk")["base"]} == {None}
