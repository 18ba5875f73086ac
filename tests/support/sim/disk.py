"""A disk that forgets: every change below one folder is recorded (disk.c), and a power cut leaves what POSIX promises.

What survives for sure: the bytes of a file that were there when it was fsynced, and the names in a folder that were there
when the folder was fsynced. Of everything later a part survives, by seed: none, all, a beginning, or any subset. So a name
may survive without the bytes of its file, bytes without the name, a file's new length without its bytes (zeros), a write
up to one of its sectors, and a later rename without an earlier one. A rename happens wholly or not at all, and a sector is
never torn.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from bench.kept import kept

ROOT = Path(__file__).parents[3]
SOURCE = Path(__file__).with_name("disk.c")
MAPPED = "-shm"  # SQLite's mapped memory, made anew by who opens the database first
SALTED = b".key"  # encrypted with a salt that is new every time
SECTOR = 512  # bytes that are written wholly or not at all
OPEN, WRITE, SIZE, RENAME, LINK, UNLINK, MKDIR, FSYNC, CLOSE = range(1, 10)
NAMES = ("", "open", "write", "size", "rename", "link", "unlink", "mkdir", "fsync", "close")
_RECORD = struct.Struct("=iiiiqqII")


def library() -> Path:
    """The recorder, compiled when its source is new."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    command = ["gcc", "-O2", "-shared", "-fPIC", str(SOURCE), "-ldl"]
    return kept(
        ROOT / "build" / "sim" / f"disk-{digest}.so",
        lambda path: subprocess.run([*command, "-o", str(path)], check=True),
    )


@dataclass(eq=False, slots=True)
class File:
    """A file's bytes: those that are on the disk, and what was done to them since."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # (offset, data), or (size, None)

    def sync(self) -> None:
        self.durable, self.pending = self.now(), []

    def now(self) -> bytes:
        content = bytearray(self.durable)
        for at, data in self.pending:
            _apply(content, at, data)
        return bytes(content)

    def left(self, dice: Random) -> bytes:
        """What a power cut leaves."""
        if not self.pending:
            return self.durable
        count, how = len(self.pending), dice.choice(("none", "all", "beginning", "any", "any"))
        some = dice.randrange(count + 1)
        content = bytearray(self.durable)
        for number, (at, data) in enumerate(self.pending):
            kept = how == "all" or (how == "beginning" and number < some) or (how == "any" and dice.random() < 0.5)
            if kept:
                _apply(content, at, data)
            elif data is not None and dice.random() < 0.5:  # the new length, and perhaps a part of the bytes
                content.extend(bytes(max(0, at + len(data) - len(content))))
                if how != "none" and dice.random() < 0.5:
                    first = -at % SECTOR
                    end = first + SECTOR * dice.randrange(len(data) // SECTOR + 1)
                    if 0 < end < len(data):
                        content[at : at + end] = data[:end]
        return bytes(content)


def _apply(content: bytearray, at: int, data: bytes | None) -> None:
    end = at if data is None else at + len(data)
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    if data is None:
        del content[at:]
    else:
        content[at:end] = data


@dataclass(eq=False, slots=True)
class Folder:
    """The names in a folder: those that are on the disk, and those that there are now."""

    durable: dict[str, File | Folder] = field(default_factory=dict)
    now: dict[str, File | Folder] = field(default_factory=dict)


Key = tuple[Folder, str]
Change = dict[Key, File | Folder | None]  # name -> what it stands for afterwards; wholly or not at all


class Model:
    """The files below one folder and the changes that are not on the disk yet."""

    def __init__(self, top: Folder | None = None) -> None:
        self.top = top or Folder()
        self.changes: list[Change] = []
        self.open: dict[int, File | Folder] = {}
        self.trace: list[str] | None = None

    def change(self, change: Change) -> None:
        for (folder, name), node in change.items():
            if node is None:
                folder.now.pop(name, None)
            else:
                folder.now[name] = node
        self.changes.append(change)

    def sync(self, node: File | Folder) -> None:
        """fsync."""
        if isinstance(node, File):
            node.sync()
            return
        left: list[Change] = []
        for change in self.changes:
            if any(folder is node for folder, _ in change):
                for (folder, name), target in change.items():
                    _set(folder.durable, name, target)
                    for earlier in left:  # what an earlier change said of this name is overtaken
                        earlier.pop((folder, name), None)
            else:
                left.append(change)
        self.changes = [change for change in left if change]

    def left(self, dice: Random) -> Model:
        """What a power cut leaves, as a disk on which all of it is durable."""
        how, some = dice.choice(("none", "all", "beginning", "any", "any")), dice.randrange(len(self.changes) + 1)
        names: dict[Folder, dict[str, File | Folder]] = {}
        for number, change in enumerate(self.changes):
            if how == "all" or (how == "beginning" and number < some) or (how == "any" and dice.random() < 0.5):
                for (folder, name), node in change.items():
                    _set(names.setdefault(folder, dict(folder.durable)), name, node)
        made: dict[File, File] = {}
        return Model(_settled(self.top, lambda f: names.get(f, f.durable), lambda f: f.left(dice), made))

    def kept(self) -> Model:
        """What there is now, as a disk of its own on which all of it is durable."""
        return Model(_settled(self.top, lambda f: f.now, lambda f: f.now(), {}))

    def carried(self) -> Model:
        """What the end of the process leaves: everything, because the system goes on. What was not durable still is not."""
        self.open = {}
        folders = [self.top]
        for folder in folders:
            folders += [node for node in folder.now.values() if isinstance(node, Folder)]
            for name in [name for name in folder.now if name.endswith(MAPPED)]:
                del folder.now[name]
                folder.durable.pop(name, None)
                self.changes = [
                    {key: node for key, node in each.items() if key != (folder, name)} for each in self.changes
                ]
        self.changes = [change for change in self.changes if change]
        return self

    def find(self, path: str, start: Folder | None = None) -> tuple[Folder, str]:
        """The folder that a path's last name is in, and that name; for the top itself, an empty name."""
        folder, parts = start or self.top, [part for part in path.split("/") if part not in ("", ".")]
        for part in parts[:-1]:
            inner = folder.now[part]
            assert isinstance(inner, Folder), path
            folder = inner
        return folder, parts[-1] if parts else ""

    def write_to(self, root: Path) -> None:
        """Make these files."""
        written: dict[File, str] = {}
        stack = [(self.top, str(root))]
        while stack:
            folder, path = stack.pop()
            for name, node in folder.now.items():
                inner = f"{path}/{name}"
                if isinstance(node, Folder):
                    os.mkdir(inner)
                    if node.now:
                        stack.append((node, inner))
                elif node in written:
                    os.link(written[node], inner)
                else:
                    written[node] = inner
                    with open(inner, "wb", buffering=0) as file:
                        file.write(node.now())

    @classmethod
    def with_folders(cls, *names: str) -> Model:
        """A new disk with these folders."""
        folders: dict[str, File | Folder] = {name: Folder() for name in names}
        return cls(Folder(folders, dict(folders)))


def _set(names: dict[str, File | Folder], name: str, node: File | Folder | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _settled(folder: Folder, names_of, content_of, made: dict[File, File]) -> Folder:  # type: ignore[no-untyped-def]
    found: dict[str, File | Folder] = {}
    for name, node in names_of(folder).items():
        if isinstance(node, Folder):
            found[name] = _settled(node, names_of, content_of, made)
        elif not name.endswith(MAPPED):
            if node not in made:
                made[node] = File(content_of(node))
            found[name] = made[node]
    return Folder(found, dict(found))


class Disk:
    """The folder `root` of a process that runs with the recorder (see `library`). One at a time."""

    def __init__(self, root: Path, traced: bool = False) -> None:
        self.root, self.traced = root, traced
        self.trace: list[str] = []
        self._c = ctypes.CDLL(None)
        self._c.sim_log.restype = ctypes.c_void_p
        self._c.sim_log_length.restype = ctypes.c_size_t
        self._c.sim_operations.restype = ctypes.c_long
        self._c.sim_cut.argtypes = [ctypes.c_long]
        self._model = Model()

    @property
    def on(self) -> bool:
        """Whether there is power: what is done without it does not happen."""
        return bool(self._c.sim_on())

    @property
    def operations(self) -> int:
        """How many changes were made since the power came."""
        return int(self._c.sim_operations())

    def power_on(self, files: Model) -> None:
        """Begin with these files. What the process before it had open is closed first: its end closed it."""
        gc.collect()
        if self.root.exists():
            shutil.rmtree(self.root)
        self.root.mkdir(parents=True)
        files.write_to(self.root)
        self._model = files
        self._c.sim_start(str(self.root).encode())

    def cut_before(self, operation: int) -> None:
        """The power goes before that many more changes (1: before the next one; 0: it stays)."""
        self._c.sim_cut(operation)

    def links(self, there: bool) -> None:
        """Whether this file system has hard links."""
        self._c.sim_links(int(there))

    def stop(self) -> None:
        """From now on nothing reaches the disk."""
        self._c.sim_stop()

    def power_off(self, dice: Random | None) -> Model:
        """What is left now, after a power cut, or without `dice` after the end of the process."""
        self._c.sim_stop()
        self._take_in()
        return self._model.left(dice) if dice else self._model.carried()

    def _take_in(self) -> None:
        log = ctypes.string_at(self._c.sim_log(), self._c.sim_log_length()) if self._c.sim_log_length() else b""
        self._c.sim_log_clear()
        at, prefix, root, salted = 0, len(str(self.root)), str(self.root).encode(), dict[int, bool]()
        while at < len(log):
            op, fd, fd2, flags, offset, size, n, m = _RECORD.unpack_from(log, at)
            at += _RECORD.size
            first, second = log[at : at + n], log[at + n : at + n + m]
            at += n + m
            if self.traced:
                names = "" if op == WRITE else f"{first.decode()[prefix:]} {second.decode()[prefix:]}"
                file = f" {fd}" if op in (WRITE, SIZE, FSYNC) else ""
                if op == OPEN:
                    salted[fd] = first.endswith(SALTED)
                told = "" if salted.get(fd) else f" {zlib.crc32(first.replace(root, b'')):08x}"
                data = f"{n}{told}" if op == WRITE else str(size)
                self.trace.append(f"{NAMES[op]}{file} {offset} {data} {names}")
            self._replay(op, fd, fd2, flags, offset, size, first, second)

    def _where(self, fd: int, path: bytes) -> tuple[Folder, str]:
        text = path.decode()
        if text.startswith("/"):
            return self._model.find(text[len(str(self.root)) :])
        start = self._model.open[fd]
        assert isinstance(start, Folder), text
        return self._model.find(text, start)

    def _replay(
        self, op: int, fd: int, fd2: int, flags: int, offset: int, size: int, first: bytes, second: bytes
    ) -> None:
        model = self._model
        if op == OPEN:
            folder, name = self._where(fd2, first)
            node = folder.now.get(name) if name else folder
            if node is None:
                node = File()
                model.change({(folder, name): node})
            elif flags & os.O_TRUNC and isinstance(node, File):
                node.pending.append((0, None))
            model.open[fd] = node
        elif op == CLOSE:
            model.open.pop(fd, None)
        elif op in (WRITE, SIZE):
            file = model.open[fd]
            assert isinstance(file, File)
            if op == WRITE:
                file.pending.append((offset, first))
            elif not flags or size > len(file.now()):  # only grown
                file.pending.append((size, None))
        elif op == FSYNC:
            model.sync(model.open[fd])
        elif op == MKDIR:
            model.change({self._where(fd, first): Folder()})
        elif op == UNLINK:
            model.change({self._where(fd, first): None})
        elif op in (RENAME, LINK):
            source, target = self._where(fd, first), self._where(fd2, second)
            node = source[0].now[source[1]]
            if source != target and target[0].now.get(target[1]) is not node:
                model.change({target: node} if op == LINK else {source: None, target: node})
