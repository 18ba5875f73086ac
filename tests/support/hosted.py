"""Engines in processes of their own, for the tests of them: how they are started, watched and stopped."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from edged.engines.base import EngineError, GenerateRequest, Generator, generate_all
from edged.engines.host import Patience, ProcessGenerator
from edged.wire.manifest import FileEntry, ReleaseManifest
from tests.support.device import until
from tests.support.models import write_manifest
from trainer.golden import write_prompt_golden
from trainer.releases import build_manifest

PROMPT = "line 1 read a 7 with score 0.9. What to do?\n"
PLAIN, ADAPTED = "accept the seven", "PASS seven"
# The defaults are for slow boards. Here the process may be quick to come back, and it is noticed soon that it is stuck.
QUICK = Patience(ping_s=0.05, answer_s_max=3.0, backoff_s=0.05, halt_s_max=30.0, close_s_max=0.5)
UNHURRIED = Patience(ping_s=0.05, answer_s_max=600.0, backoff_s=0.05, halt_s_max=600.0)
LONG = "the line reads a seven, " * 1000  # prompt tokens by the thousand for `slow`

Start = Callable[..., ProcessGenerator]


def manifest(path: Path, engine: str = "llama") -> ReleaseManifest:
    entry = FileEntry.of(path.name, 1, [b"x"])
    return ReleaseManifest(release="clerk@1.0", kind="llm", engine=engine, files={"model": entry}, created="2026")


def clerk(folder: Path, model: Path, release: str = "clerk@1.0") -> Path:
    """A release of the demo's Phi in `folder`."""
    folder.mkdir()
    shutil.copy(model, folder / "model.gguf")
    roles = {"model": "model.gguf", **write_prompt_golden(folder, [(PROMPT, PLAIN)])}
    write_manifest(folder, build_manifest(folder, release, kind="llm", engine="llama", roles=roles))
    return folder


def ask(engine: Generator, prompt: str = PROMPT, **request: Any) -> str:
    return generate_all(engine, GenerateRequest(prompt, **request))[0]


def serving(engine: ProcessGenerator, other_than: int = 0) -> int:
    """The process of `engine`, once there is one (that is not `other_than`)."""

    def look() -> int:
        pid = engine.pid
        return pid if pid and pid != other_than else 0

    return until("the engine's process serves", look)


def in_thread(act: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """`act` under way in a thread; what it returned, or the EngineError that it raised, is put in the list."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(act())
        except EngineError as error:
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, out


def stop(pid: int) -> None:
    """Stop the process as a debugger would; it computes and hears nothing more."""
    os.kill(pid, signal.SIGSTOP)
    until("it stands still", lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie has)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def halting(after: int, reason: str = "cancelled") -> Callable[[], str]:
    """A `halt` that has the reason from its call number `after` on."""
    calls = iter(range(1 << 30))
    return lambda: reason if next(calls) >= after else ""
