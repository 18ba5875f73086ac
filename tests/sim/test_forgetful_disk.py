"""The disk of the simulation: what a power cut may leave, and what it may not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from tests.support.sim.disk import SECTOR, File, Folder, Model
from tests.support.sim.run import preloaded

ROOT = Path(__file__).parents[2]
SEEDS = [Random(seed) for seed in range(200)]


def folder_of(model: Model, name: str) -> Folder:
    node = model.top.now[name]
    assert isinstance(node, Folder)
    return node


def test_what_was_fsynced_survives_and_nothing_else_is_sure() -> None:
    model = Model.with_folders("state")
    state, file = folder_of(model, "state"), File()
    model.change({(state, "a"): file})
    file.pending.append((0, b"x" * 2000))
    found = [folder_of(model.left(dice), "state").now for dice in SEEDS]
    assert {"a" in names for names in found} == {True, False}
    contents = {names["a"].durable for names in found if "a" in names}  # type: ignore[union-attr]
    assert {b"", b"x" * 2000, bytes(2000)} < contents  # the name alone, all, the length alone, and sectors of it
    model.sync(file)
    # Its name is another matter.
    assert {"a" in folder_of(model.left(dice), "state").now for dice in SEEDS} == {True, False}
    model.sync(state)
    left = [folder_of(model.left(dice), "state").now["a"] for dice in SEEDS]
    assert {each.durable for each in left} == {b"x" * 2000}  # type: ignore[union-attr]


def test_a_rename_happens_wholly_or_not_at_all() -> None:
    model = Model.with_folders("state")
    state, old, new = folder_of(model, "state"), File(b"old"), File(b"new")
    for name, file in (("a", old), ("b", new)):
        model.change({(state, name): file})
    model.sync(state)
    model.change({(state, "b"): None, (state, "a"): new})
    found = [{name: node.durable for name, node in folder_of(model.left(dice), "state").now.items()} for dice in SEEDS]  # type: ignore[union-attr]
    assert {"a": b"new"} in found
    assert all(names in ({"a": b"new"}, {"a": b"old", "b": b"new"}) for names in found)
    model.sync(state)
    assert all(folder_of(model.left(dice), "state").now.keys() == {"a"} for dice in SEEDS)


def test_an_fsynced_folder_does_not_bring_back_a_name_that_it_lost_before() -> None:
    model = Model.with_folders("one", "two")
    one, two, file = folder_of(model, "one"), folder_of(model, "two"), File(b"x")
    model.change({(one, "a"): file})
    model.change({(one, "a"): None, (two, "a"): file})
    model.sync(two)
    assert all(not folder_of(model.left(dice), "one").now for dice in SEEDS)


@given(st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=2000)), max_size=6), st.integers())
def test_a_file_is_made_of_old_and_new_sectors(writes: list[tuple[int, bytes]], seed: int) -> None:
    file = File(b"o" * 1500, [(at, data) for at, data in writes])
    left = file.left(Random(seed))
    assert len(left) <= len(file.now())
    for at in range(len(left)):
        possible = {b"o"[0] if at < 1500 else 0, 0 if at >= 1500 else b"o"[0]}
        possible |= {data[at - start] for start, data in writes if start <= at < start + len(data)}
        assert left[at] in possible, at
    assert SECTOR == 512


PROGRAM = """
import os, shutil, sqlite3, sys
from pathlib import Path
from tests.support.sim.disk import Disk, Model
disk = Disk(Path(sys.argv[1]) / "disk")
disk.power_on(Model.with_folders("state"))
state = disk.root / "state"
database = sqlite3.connect(state / "a.db", isolation_level=None)
database.execute("PRAGMA journal_mode=WAL"); database.execute("PRAGMA synchronous=FULL")
database.execute("CREATE TABLE t (x)"); database.execute("INSERT INTO t VALUES (randomblob(9000))")
(state / "deep" / "er").mkdir(parents=True)
with (state / "deep" / "f").open("wb") as file:
    file.write(b"12345"); file.flush(); file.seek(1); file.write(b"x"); file.flush(); file.truncate(4)
shutil.copyfile(state / "deep" / "f", state / "copy")
os.link(state / "copy", state / "linked")
(state / "copy").rename(state / "deep" / "er" / "moved")
shutil.copytree(state / "deep", state / "twin"); shutil.rmtree(state / "twin")
fd = os.open(state / "grown", os.O_CREAT | os.O_WRONLY)
os.posix_fallocate(fd, 0, 100); os.pwrite(fd, b"end", 97); os.close(fd)
def files(root):
    paths = [path for path in root.rglob("*") if not path.name.endswith("-shm")]
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in paths}
there = files(disk.root)
left = disk.power_off(None)
modelled = Path(sys.argv[1]) / "modelled"
modelled.mkdir()
left.write_to(modelled)
assert files(modelled) == there, "the model is not what is there"
database.close()
disk.power_on(left)
disk.cut_before(2)
(state / "one").write_bytes(b""); assert disk.on
(state / "two").write_bytes(b""); assert not disk.on
assert "one" in disk.power_off(None).top.now["state"].now and "two" not in left.top.now["state"].now
"""


def test_the_recorder_sees_what_python_and_sqlite_do(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=preloaded(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
