"""The pool keeps what was said, once, beside what others say, and gives only the bytes that were put in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
import pytest

from trainer.database import Database
from trainer.pool import Pool, PoolError, Record, Wanted, said_by

BOX = {"label": "cat", "box": [1.0, 2.0, 5.0, 6.5]}


def png(value: int) -> bytes:
    return cv2.imencode(".png", np.full((8, 8, 3), value, np.uint8))[1].tobytes()


def record(data: bytes, **changes: object) -> Record:
    made = Record(
        sha256(data).hexdigest(),
        "eye",
        "detect",
        (BOX,),
        "model",
        "big1",
        "teacher@1.0",
        0.8,
        "dev1",
        5.0,
        "device dev1",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(Database(tmp_path / "trainer.sqlite"), tmp_path / "pool")


def test_the_same_twice_changes_nothing_and_another_label_is_another_opinion(pool: Pool, tmp_path: Path) -> None:
    data = png(1)
    first = record(data)
    assert pool.add([(first, data)], 10.0) == [True]
    assert pool.add([(first, data), (replace(first, origin="elsewhere"), data)], 20.0) == [False, False]
    other = record(data, label=({**BOX, "label": "dog"},))
    assert pool.add([(other, None)], 30.0) == [True]
    again = Pool(Database(tmp_path / "trainer.sqlite"), tmp_path / "pool")  # another process, another day
    assert {each.id for each in again.records()} == {first.id, other.id}
    kept = again.records(Wanted(ids=frozenset({first.id})))[0]
    assert kept == replace(first, said=10.0)
    assert again.read(first.sha256) == data


def test_every_read_checks_the_bytes(pool: Pool) -> None:
    data, other = png(1), png(2)
    pool.add([(record(data), data), (record(other), other)], 1.0)
    damaged = pool.path(record(data).sha256)
    damaged.write_bytes(data[:-1] + b"\0")
    with pytest.raises(PoolError, match=rf"{damaged.name} has SHA-256 .* damaged; remove it"):
        pool.read(damaged.name)
    assert [damaged.name in str(error) for error in pool.verify()] == [True]
    pool.add([(record(data), data)], 2.0)  # an import repairs it
    assert pool.read(damaged.name) == data
    damaged.unlink()
    with pytest.raises(PoolError, match=r"No such file.*import or pull"):
        pool.read(damaged.name)


def test_bytes_that_are_not_what_the_record_names_are_refused(pool: Pool) -> None:
    with pytest.raises(PoolError, match="another sample's"):
        pool.add([(record(png(1)), png(2))], 1.0)
    with pytest.raises(PoolError, match=r"is not in .*import it again"):
        pool.add([(record(png(1)), None)], 1.0)
    assert pool.records() == []


def test_a_persons_word_counts_until_another_word_of_a_person(pool: Pool) -> None:
    data = png(1)
    said = record(data)
    pool.add([(said, data)], 1.0)
    rejected, accepted = said_by(said, "ann", verdict="rejected"), said_by(said, "ann")

    def counts() -> tuple[list[str], dict[str, int]]:
        chosen = pool.labelled(Wanted(model="eye"))
        return [each.who for each in chosen.records], chosen.left_out

    assert counts() == (["big1"], {})
    pool.add([(rejected, None)], 2.0, renew=True)
    assert counts() == ([], {"rejected": 1})
    pool.add([(said, data)], 3.0)  # the same import again does not undo it
    assert counts() == ([], {"rejected": 1})
    pool.add([(accepted, None)], 4.0, renew=True)
    assert counts() == (["ann"], {})
    pool.add([(rejected, None)], 5.0, renew=True)
    assert counts() == ([], {"rejected": 1})
    pool.add([(accepted, None)], 6.0, renew=True)
    assert counts() == (["ann"], {})
    corrected = said_by(said, "bob", label=[{**BOX, "label": "dog"}])
    pool.add([(corrected, None)], 7.0, renew=True)
    assert counts() == (["bob"], {})
    assert pool.labelled(Wanted(model="eye", kind="model")).left_out == {"not_wanted": 1}
    assert len(pool.records(Wanted(verdict=""))) == 4, "nothing that was said is gone"


def test_records_are_found_by_what_they_say(pool: Pool) -> None:
    items = [(record(png(n), device=f"d{n % 2}", confidence=n / 10, captured=float(n)), png(n)) for n in range(10)]
    pool.add(items, 1.0)
    pool.add([(record(png(50), model="ear"), png(50)), (record(png(51), label=()), png(51))], 1.0)
    found = pool.records(Wanted(model="eye", device="d1", confidence_min=0.3, confidence_max=0.7, label="cat"))
    assert [each.captured for each in found] == [3, 5, 7]
    assert len(pool.records(Wanted(model="eye"))) == 11


KILLED = """
import sys
from pathlib import Path
from tests.unit.test_pool import png, record
from trainer.database import Database
from trainer.pool import Pool

folder = Path(sys.argv[1])
pool = Pool(Database(folder / "trainer.sqlite"), folder / "pool")
number = 0
while True:
    items = [(record(png(value), captured=float(number)), png(value)) for value in range(number, number + 4)]
    pool.add(items, 1.0)
    number = (number + 4) % 240
    print(number, flush=True)
"""


def test_a_kill_leaves_no_row_without_its_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    for rows in (3, 9):
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout is not None
            for _ in range(rows):
                process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
    pool = Pool(Database(tmp_path / "trainer.sqlite"), tmp_path / "pool")
    assert len(pool.records()) >= 36
    assert list(pool.verify()) == []
