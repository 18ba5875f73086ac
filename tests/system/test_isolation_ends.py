"""Whatever ends an engine's process costs at most the request in hand, and nothing of it is left behind."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from edged import acts
from edged.core.probation import Criteria
from edged.engines.base import EngineError, EngineOptions, Finished, GenerateRequest, Token
from edged.engines.host import MODULE, Backoff, Patience, ProcessGenerator
from edged.engines.served import OOM_SCORE
from edged.prove import Proof
from edged.releases import reference
from edged.wire import messages
from tests.support.device import Bus, Device, tables, until
from tests.support.hosted import (
    ADAPTED,
    LONG,
    PLAIN,
    PROMPT,
    UNHURRIED,
    Start,
    ask,
    clerk,
    gone,
    in_thread,
    manifest,
    serving,
    stop,
)
from tests.support.models import write_manifest
from tests.system.broker import Broker
from tests.unit.test_updater import AtOnce, Box
from trainer.golden import write_prompt_golden
from trainer.releases import build_manifest

# Whatever ends the process costs at most the request in hand.


def test_killed_in_the_middle_of_an_answer(start: Start, slow: Path) -> None:
    engine = start(slow)
    pid = serving(engine)
    answer = engine.generate(GenerateRequest("the line"))
    assert isinstance(next(answer), Token)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"clerk@1.0: the engine's process was ended by SIGKILL \(.*memory"):
        list(answer)
    assert ask(engine, "the line", tokens_max=3), "the next request waits for the new process"
    assert serving(engine) != pid


@pytest.mark.parametrize(("number", "how"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_killed_with_a_request_in_hand_its_adapter_comes_back(
    start: Start, phi: dict[str, Path], number: int, how: str
) -> None:
    engine = start(patience=UNHURRIED)
    engine.attach(phi["adapter_gguf"])
    pid = serving(engine)
    stop(pid)  # so that it has the request, and no answer yet
    thread, out = in_thread(lambda: ask(engine))
    until("the request is in hand", lambda: engine._call is not None)
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    thread.join()
    assert isinstance(out[0], EngineError)
    assert how in str(out[0])
    assert ask(engine) == ADAPTED
    engine.attach(None)
    os.kill(serving(engine, other_than=pid), signal.SIGKILL)
    until("its end is noticed", lambda: engine.pid is None)
    assert ask(engine) == PLAIN, "and what was taken off stays off"


def test_its_last_words_are_told(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('built for another processor')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineError, match="RuntimeError: built for another processor"):
        start()
    (tmp_path / "llama_cpp.py").write_text("import os, sys; print('GGML_ASSERT failed', file=sys.stderr); os.abort()")
    with pytest.raises(EngineError, match="was ended by SIGABRT; its last words: GGML_ASSERT failed"):
        start()
    (tmp_path / "llama_cpp.py").write_text("import os, sys; os.write(int(sys.argv[1]), b'no frame'); os.read(0, 1)")
    with pytest.raises(EngineError, match=r"is damaged: it sent a frame of 1852776550 bytes, .* and was killed"):
        start()


@pytest.mark.parametrize("in_hand", [False, True])
def test_a_stopped_process_is_replaced(start: Start, in_hand: bool) -> None:
    engine = start()
    pid = serving(engine)
    stop(pid)
    if in_hand:
        with pytest.raises(EngineError, match="did not answer for 3 s, and was killed"):
            ask(engine)
    serving(engine, other_than=pid)
    assert ask(engine) == PLAIN
    assert gone(pid)


def test_a_long_prompt_is_no_stuck_process(start: Start, slow: Path) -> None:
    patience = Patience(ping_s=0.05, answer_s_max=2.0, restart_s_max=0.0)
    engine = start(slow, patience)
    pid = engine.pid
    for length in (
        len(LONG) // 4,
        len(LONG) // 2,
        len(LONG),
    ):  # as long as this machine needs to have work for long enough
        started = time.monotonic()
        *_, finished = engine.generate(GenerateRequest(LONG[-length:], tokens_max=1))
        assert isinstance(finished, Finished)
        assert finished.reason == "length"
        if time.monotonic() - started > 2 * patience.answer_s_max:
            break
    else:
        pytest.fail("this machine is too fast for the model `slow`: make it larger")
    assert engine.pid == pid


def test_what_does_not_come_back_is_told_with_its_reason(start: Start, phi: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(phi["model_gguf"], tmp_path / "model.gguf"))
    ends: list[tuple[str, bool]] = []
    patience = Patience(backoff_s=0.05, backoff_s_max=0.4, restart_s_max=0.3)
    engine = ProcessGenerator(
        path.parent, manifest(path), EngineOptions(), lambda how, in_hand: ends.append((how, in_hand)), patience
    )
    path.rename(tmp_path / "aside")
    os.kill(serving(engine), signal.SIGKILL)
    until("it has been tried often", lambda: len(ends) >= 4)
    with pytest.raises(EngineError, match=r"model\.gguf: cannot be read .*; the engine is (being )?started again"):
        ask(engine)
    assert "SIGKILL" in ends[0][0]
    assert all("cannot be read" in how for how, _ in ends[1:])
    assert not any(in_hand for _, in_hand in ends)
    (tmp_path / "aside").rename(path)
    serving(engine)
    assert ask(engine) == PLAIN
    engine.close()


def test_the_pause_between_two_starts_grows_until_it_has_served_for_a_while() -> None:
    backoff = Backoff(Patience(backoff_s=0.5, backoff_s_max=60.0, steady_s=60.0))
    assert [backoff.after(served) for served in [0.0] * 5 + [59.0] * 4] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert [backoff.after(served) for served in [60.0, 0.0]] == [0.5, 1]


# Nothing is left behind, and nobody but the daemon ends it.


def test_nothing_is_left_of_engines_that_came_and_went(start: Start) -> None:
    def held() -> tuple[int, int, int]:
        return len(os.listdir("/proc/self/fd")), len(psutil.Process().children()), threading.active_count()

    start().close()
    gc.collect()  # what other tests left behind goes now, not in between
    before = held()
    for turn in range(20):
        engine = start()
        pid = serving(engine)
        if turn % 4 == 1:
            os.kill(pid, signal.SIGKILL)
        elif turn % 4 == 2:
            stop(pid)
        elif turn % 4 == 3:
            assert next(engine.generate(GenerateRequest(PROMPT)))
        engine.close()
        engine.close()
    assert all(now <= then for now, then in zip(held(), before, strict=True)), (held(), before)
    with pytest.raises(EngineError, match="closed"):
        engine.generate(GenerateRequest(PROMPT))
    with pytest.raises(EngineError, match="closed"):
        engine.attach(None)


def test_signals_for_the_daemon_do_not_end_it(start: Start) -> None:
    engine = start()
    pid = serving(engine)
    assert os.getpgid(pid) != os.getpgid(0), "Ctrl-C reaches the whole group"
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)  # systemd sends it to every process of the service
    assert ask(engine) == PLAIN
    assert engine.pid == pid
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) >= OOM_SCORE, "the kernel takes it before the daemon"


PARENT = """
import json, sys, time
from pathlib import Path
from edged.engines.base import EngineOptions
from edged.engines.host import ProcessGenerator
from edged.wire.manifest import ReleaseManifest
engine = ProcessGenerator(Path(sys.argv[1]), ReleaseManifest.model_validate_json(sys.argv[2]), EngineOptions())
print(engine.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_it_ends_with_its_daemon(phi: dict[str, Path], stopped: bool) -> None:
    command = [sys.executable, "-c", PARENT, phi["base"], manifest(phi["model_gguf"]).model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if stopped:  # it cannot notice anything itself
            stop(pid)
        parent.kill()
    until("the engine's process has ended", lambda: gone(pid))


def test_a_process_that_dies_again_and_again_ends_its_probation(
    tmp_path: Path, phi: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acts, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(acts, "prove", lambda *_: Proof(0.1, 0.1, 1))
    old, new = (clerk(tmp_path / name, phi["model_gguf"], f"clerk@{name}") for name in ("1.0", "1.1"))
    box = Box(tmp_path / "state", old, new)
    try:
        box.desire(reference(new))
        assert (box.eye.active, box.eye.update) == ("clerk@1.1", "switched")
        for _ in range(Criteria().engine_ends_max + 1):
            assert box.slot.live is not None
            engine = box.slot.live.engine
            assert isinstance(engine, ProcessGenerator)
            ends = box.store.counters().get("engine_ends", 0)
            os.kill(serving(engine), signal.SIGKILL)  # while nobody asks anything
            until("its end is counted", lambda n=ends: box.store.counters().get("engine_ends", 0) > n)
        until("it is put back", lambda: box.wait(0.1) or box.eye.active == "clerk@1.0")
        assert (box.eye.update, box.eye.reason) == ("reverted", "its process ended 2 times during probation")
        assert (
            sum("engine_ended: eye: clerk@1.1: the engine's process was ended by SIGKILL" in s for s in box.said) == 2
        )
    finally:
        box.slot.stop()
        box.updater.stop()
        box.store.close()


def test_the_daemon_survives_its_engine(tmp_path: Path, slow: Path, start: Start) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(slow, base / "model.gguf")
    answer = ask(start(slow), "the line", tokens_max=32)
    roles = {"model": "model.gguf", **write_prompt_golden(base, [("the line", answer)])}
    write_manifest(base, build_manifest(base, "talker@1.0", kind="llm", engine="llama", roles=roles))
    with Broker(tmp_path / "broker") as broker:
        plan = tables(tmp_path, "dev1", broker, None)
        plan["slots"] = {"tongue": {"seed": base}}
        plan["pipelines"] = {"chat": {"slot": "tongue", "task": "generate", "source": {"type": "mqtt"}}}
        bus = Bus(broker)
        with Device(tmp_path, plan) as device:
            assert device.process is not None
            daemon = device.process.pid

            def engine(*but: psutil.Process) -> psutil.Process:
                def look() -> psutil.Process | None:
                    children = psutil.Process(daemon).children()
                    return next((child for child in children if MODULE in child.cmdline() and child not in but), None)

                return until("the engine's process", look)

            def answered() -> bool:
                request = bus.ask("dev1", "chat", generation_prompt="the line", tokens_max=32)
                return bus.reply(request).generated_response == answer

            first = engine()
            used = first.cpu_times().user
            request = bus.ask("dev1", "chat", generation_prompt=LONG, tokens_max=1)
            until("it works on the request", lambda: first.cpu_times().user > used + 0.2)
            first.kill()
            assert "the engine's process was ended by SIGKILL" in (bus.reply(request).error or "")
            assert answered()
            counters = device.counted("engine_ends")["counters"]
            assert (counters["engine_ends"], counters["items_engine_error"]) == (1, 1)

            second = engine(first)
            second.kill()  # while nobody asks anything
            device.counted("engine_ends", 2)
            assert answered()
            assert any("SIGKILL" in event.text for event in bus.of(messages.Event, "dev1"))
            third = engine(first, second)
            assert device.status() is not None, "it is the same daemon all the time"
            assert device.stop() == 0
            assert gone(third.pid)
        bus.close()
