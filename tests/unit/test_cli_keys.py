"""`trainer keys` and `trainer release` as an operator types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from trainer.cli import app
from trainer.cli_keys import PASSPHRASE

SECRET = "correct horse battery"


class Trainer:
    """A trainer's configuration and its command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "trainer.toml").write_text('data_dir = "data"\n[trust]\nmodels_days = 14\n')

    def run(self, *arguments: str | Path, answers: str = "") -> Result:
        config = ["--config", str(self.folder / "trainer.toml")]
        return CliRunner().invoke(app, [*map(str, arguments), *config], input=answers)

    def ok(self, *arguments: str | Path) -> str:
        done = self.run(*arguments)
        assert done.exit_code == 0, done.output
        return done.stdout

    def wrong(self, *arguments: str | Path) -> str:
        done = self.run(*arguments)
        assert done.exit_code == 1, done.output
        return done.stderr

    def keys(self) -> dict[str, dict[str, Any]]:
        return {row["role"]: row for row in json.loads(self.ok("keys", "list", "--json"))}

    def releases(self) -> dict[str, dict[str, Any]]:
        return {row["release"]: row for row in json.loads(self.ok("release", "list", "--json"))}


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setenv(PASSPHRASE, SECRET)
    return Trainer(tmp_path)


@pytest.fixture
def media(tmp_path: Path) -> list[Path]:
    return [tmp_path / name for name in ("ann", "ben", "eve")]


def offline(*media: Path) -> list[str | Path]:
    return [part for medium in media for part in ("--offline", medium)]


@pytest.fixture
def ready(trainer: Trainer, media: list[Path]) -> Trainer:
    trainer.ok("keys", "init", *offline(*media))
    return trainer


def test_keys_are_made_once_and_listed_with_their_ends(trainer: Trainer, media: list[Path], toy: Path) -> None:
    trainer.ok("release", "add", toy)
    assert "no keys are here; make them with `trainer keys init --offline DIR`" in trainer.wrong("keys", "list")
    out = trainer.ok("keys", "init", *offline(*media))
    assert f"root for devices: {trainer.folder / 'trust' / 'metadata' / '1.root.json'}" in out
    assert out.count("offline key: ") == 6
    assert "not signed yet: toy@1.0; sign what devices run with `trainer release sign NAME@VERSION`" in out
    assert "keys are made once" in trainer.wrong("keys", "init", *offline(*media))
    rows = trainer.keys()
    shown = {role: (row["needed"], len(row["keys"]), round(row["days_left"])) for role, row in rows.items()}
    assert shown == {"root": (2, 3, 365), "targets": (2, 3, 365), "models": (1, 1, 14), "snapshot": (1, 1, 7),
                     "timestamp": (1, 1, 1)}  # fmt: skip
    lines = trainer.ok("keys", "list").splitlines()
    assert [line.split()[0] for line in lines] == ["role", *rows]
    assert rows["root"]["keys"][0][:8] in lines[1]


def test_other_quorums_and_mistakes(trainer: Trainer, media: list[Path]) -> None:
    assert "name one or more with --offline" in trainer.wrong("keys", "init")
    assert "for example 2/3" in trainer.wrong("keys", "init", "--root", "3", *offline(*media))
    trainer.ok("keys", "init", "--root", "3/5", "--targets", "1/1", *offline(*media))
    rows = trainer.keys()
    assert [(rows[role]["needed"], len(rows[role]["keys"])) for role in ("root", "targets")] == [(3, 5), (1, 1)]


def test_the_passphrase_is_asked_for_twice_when_it_is_new_and_once_when_not(
    trainer: Trainer, media: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PASSPHRASE)
    keys = [f"{word} horse battery staple" for word in ("ann's", "ben's", "eve's")]
    one = ("--root", "1/1", "--targets", "1/1")
    done = trainer.run(
        "keys", "init", *one, *offline(*media[:1]), answers=f"{keys[0]}\n{keys[0]}\n{keys[1]}\n{keys[1]}\n"
    )
    assert done.exit_code == 0, done.output
    assert f"Passphrase of {media[0] / 'root-'}" in done.output
    assert "horse" not in done.output
    assert trainer.run("keys", "renew", "root", *offline(*media[:1]), answers="wrong\n").exit_code == 1
    done = trainer.run("keys", "renew", "root", *offline(*media[:1]), answers=f"{keys[0]}\n")
    assert "root 2 is published" in done.stdout
    file = trainer.folder / "secret"
    file.write_text(keys[1] + "\n")
    assert "targets 2 is published" in trainer.ok(
        "keys", "renew", "targets", *offline(*media[:1]), "--passphrase-file", file
    )


def test_keys_change_in_one_ceremony_or_at_several_places(ready: Trainer, media: list[Path]) -> None:
    before = ready.keys()
    assert "root 2 is published" in ready.ok("keys", "rotate", "snapshot", "timestamp", "models", *offline(*media[:2]))
    after = ready.keys()
    assert [role for role in before if before[role]["keys"] == after[role]["keys"]] == ["root", "targets"]
    out = ready.ok("keys", "rotate", "root", "--key", after["root"]["keys"][0][:8], *offline(media[1]))
    assert "continue with `trainer keys sign --offline DIR`" in out
    assert ready.keys()["root"]["staged"]
    assert "root 3 is published" in ready.ok("keys", "sign", *offline(media[2]))
    assert "nothing waits for signatures" in ready.wrong("keys", "sign", *offline(media[2]))
    out = ready.ok("keys", "revoke", ready.keys()["targets"]["keys"][2][:8], *offline(media[0]))
    assert "1 of 2 signatures" in out
    assert "given up" in ready.ok("keys", "sign", "--discard")
    assert "name its role alone" in ready.wrong("keys", "rotate", "root", "targets", "--key", "0")
    assert "name root or targets, or nothing" in ready.wrong("keys", "renew", "models")
    assert "nothing was due" in ready.ok("keys", "renew")


def test_releases_are_signed_listed_and_revoked(ready: Trainer, toy: Path, toy2: Path) -> None:
    ready.ok("release", "add", toy)
    ready.ok("release", "add", toy2)
    assert {name: row["signed"] for name, row in ready.releases().items()} == {"toy@1.0": True, "toy@1.1": True}
    out = ready.ok("release", "revoke", "toy@1.0", "--reason", "it burns")
    assert "toy@1.0 is not signed any more; give devices that run it another: `trainer fleet status`" in out
    row = ready.releases()["toy@1.0"]
    assert (row["signed"], row["revoked"]) == (False, "it burns")
    assert "was revoked (it burns) and stays so" in ready.wrong("release", "add", toy)
    assert "was revoked (it burns) and stays so" in ready.wrong("release", "sign", "toy@1.0")
    assert "toy@1.1 is signed" in ready.ok("release", "sign", "toy@1.1")
    assert json.loads(ready.ok("release", "sign", "toy@1.1", "--json")) == {"release": "toy@1.1", "signed": True}
    assert json.loads(ready.ok("release", "revoke", "toy@1.1", "--reason", "it too", "--json")) == {
        "release": "toy@1.1", "revoked": True, "was_signed": True
    }  # fmt: skip
    assert "expected name@MAJOR.MINOR" in ready.wrong("release", "revoke", "toy", "--reason", "x")


def test_without_keys_releases_are_registered_unsigned(trainer: Trainer, toy: Path) -> None:
    trainer.ok("release", "add", toy)
    assert trainer.releases()["toy@1.0"]["signed"] is False
    assert "make them with `trainer keys init`" in trainer.wrong("release", "sign", "toy@1.0")
    assert "there is nothing to revoke" in trainer.wrong("release", "revoke", "toy@1.0", "--reason", "x")
