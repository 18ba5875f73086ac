"""What is wrong with a device before it is deployed: each finding names the thing, the value and the fix.

Nothing is changed by looking: no folder is made, no session on the broker is lost, no running daemon disturbed.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edged import check_agents, check_server
from edged.check_broker import broker, certificates
from edged.check_machine import clock, disk, memory, permissions, service_user
from edged.check_profile import profile
from edged.check_trust import trust
from edged.config import ConfigError, Settings, Slot
from edged.config_sources import DirectorySource
from edged.findings import Finding, Look
from edged.status_socket import ask_status

CONFIG_VARIABLE = "EDGED_CONFIG"


def inspect(
    settings: Settings, config: Path | None = None, *, environment: Mapping[str, str] = os.environ, proving: bool = True
) -> list[Finding]:
    """Look at everything; `config` is the file that the settings come from."""
    status = ask_status(settings.device.state_dir)
    look = Look(settings, time.time(), config, environment, status, proving)
    return [finding for part in PARTS for finding in _whole(part, look)]


def unusable(error: ConfigError) -> list[Finding]:
    """The findings about a configuration that cannot be read, a line of the error each; nothing else can be looked at."""
    fix = "correct the line, then check again: nothing else was looked at"
    return [Finding("configuration", "error", line, fix) for line in str(error).splitlines()]


def screen(findings: list[Finding]) -> Iterator[str]:
    """The lines for people, and a last one that counts."""
    words = {"ok": "ok  ", "warning": "WARN", "error": "FAIL"}
    for finding in findings:
        yield f"{words[finding.level]} {finding.name}: {finding.text}"
        if finding.fix:
            yield f"       fix: {finding.fix}"
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    yield f"{len(findings)} findings: {errors} errors, {warnings} warnings"


def _whole(part: Callable[[Look], Iterator[Finding]], look: Look) -> list[Finding]:
    """What a part finds. A part that fails is a finding too: the others are still worth reading."""
    found = []
    try:
        for finding in part(look):
            found.append(finding)  # what was found before the failure counts
    except Exception as error:
        text = f"this could not be looked at: {type(error).__name__}: {error}"
        found.append(Finding(part.__name__, "error", text, "report this with the archive of `edged diag`"))
    return found


def configuration(look: Look) -> Iterator[Finding]:
    """What validates, and still cannot be meant."""
    settings = look.settings
    counts = f"{len(settings.slots)} slots, {len(settings.pipelines)} pipelines, {len(settings.responders)} responders"
    yield Finding("configuration", "ok", f"{look.config or 'the configuration'} is valid: {counts}")
    if not settings.pipelines and not settings.responders and not settings.agents:
        fix = "add a [pipelines.NAME], a [responders.NAME] or an [agents.NAME] table"
        yield Finding(
            "configuration", "warning", "no pipeline, no responder and no agent: this device has nothing to do", fix
        )
    users = {p.slot for p in settings.pipelines.values()} | {r.slot for r in settings.responders.values()}
    users |= {agent.slot for agent in settings.agents.values()}
    for name in settings.slots.keys() - users:
        text = "no pipeline and no responder uses it: its model only takes memory"
        yield Finding(f"slots.{name}", "warning", text, f"use it, or remove [slots.{name}]")
    folders: dict[Path, str] = {}
    for name, pipeline in settings.pipelines.items():
        if isinstance(pipeline.source, DirectorySource):
            first = folders.setdefault(pipeline.source.path.resolve(), name)
            if first != name:
                text = (
                    f"{pipeline.source.path} is the folder of pipeline {first} too: each file would reach one of both"
                )
                yield Finding(f"pipelines.{name}", "error", text, "give each pipeline a folder of its own")


def environment(look: Look) -> Iterator[Finding]:
    """Variables that look as if they configured something and do nothing."""
    sections = Settings.model_fields.keys()
    used = []
    for variable in sorted(look.environment):
        if not variable.upper().startswith("EDGED_") or variable == CONFIG_VARIABLE:
            continue
        key = variable[len("EDGED_") :].lower()
        if key.partition("__")[0] in sections:
            used.append(variable)
            continue
        section = next((name for name in sections if key.startswith(f"{name}_")), None)
        meant = f"EDGED_{section}__{key[len(section) + 1 :]}".upper() if section else ""
        fix = f"write {meant} with two underscores after the section" if meant else "unset it, or correct its spelling"
        yield Finding("environment", "warning", f"{variable} does nothing: there is no such setting", fix)
    if used:
        yield Finding("environment", "ok", f"overrides the file: {', '.join(used)}")


def running(look: Look) -> Iterator[Finding]:
    """Whether a daemon works here already."""
    if look.status is not None:
        yield Finding("daemon", "ok", f"edged runs with this state_dir (pid {look.status.get('pid')})")
        return
    lock = look.settings.device.state_dir / "lock"
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = f"{lock} is held by a process that does not answer: it starts or ends, or hangs"
        yield Finding("daemon", "error", text, "see `systemctl status edged`, and restart it when this stays")
    except OSError:
        yield Finding("daemon", "ok", "no edged runs with this state_dir")  # it never did: there is no lock yet
    else:
        yield Finding("daemon", "ok", "no edged runs with this state_dir")


def sources(look: Look) -> Iterator[Finding]:
    """Where the items come from. A source's configuration may have a method `check() -> Iterable[(level, text, fix)]`."""
    for name, pipeline in look.settings.pipelines.items():
        title = f"pipelines.{name}.source"
        if isinstance(pipeline.source, DirectorySource):
            yield _folder(title, pipeline.source.path)
            continue
        hook: Any = getattr(pipeline.source, "check", None)
        if callable(hook):
            for level, text, fix in hook():
                yield Finding(title, level, text, fix)
        else:
            yield Finding(title, "ok", f"{pipeline.source.type}: nothing to look at before it runs")


def _folder(title: str, path: Path) -> Finding:
    if not path.exists():
        parent = next(folder for folder in path.resolve().parents if folder.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            return Finding(title, "ok", f"{path} is made at the start")
        return Finding(
            title, "error", f"{path} is missing and {parent} is not writable", f"create it: install -d -o edged {path}"
        )
    if not path.is_dir():
        return Finding(title, "error", f"{path} is no folder", "name the folder that the files appear in")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        text = f"{path} is not readable and writable: an answered file is moved out of it"
        return Finding(title, "error", text, f"give it to the user that runs edged: chown edged {path}")
    return Finding(title, "ok", f"{path} is readable and writable")


def slots(look: Look) -> Iterator[Finding]:
    """Every seed: whole, of a kind that the slot takes, and, when proving, answering as promised."""
    for name, slot in look.settings.slots.items():
        if slot.server is not None:
            yield check_server.finding(f"slots.{name}", slot.server)
        elif slot.seed is None:
            yield Finding(f"slots.{name}", "ok", "no seed: the first model comes from the fleet's desired state")
        else:
            yield _seed(f"slots.{name}", slot, slot.seed, look.proving)
        if slot.adapter is not None:
            yield _adapter(name, slot.adapter)


def _adapter(name: str, folder: Path) -> Finding:
    from edged.named import faults
    from edged.releases import reference

    wrong = "; ".join(faults(name, folder))
    if wrong:
        fix = "mend the overrides file or slots.NAME.adapter: the model serves without an adapter"
        return Finding(f"slots.{name}.adapter", "error", wrong, fix)
    return Finding(f"slots.{name}.adapter", "ok", f"{reference(folder).release} is there")


def _seed(title: str, slot: Slot, seed: Path, proving: bool) -> Finding:
    from edged.engines.base import EngineOptions
    from edged.prove import ProveFailed, prove, too_slow
    from edged.releases import BadRelease, reference, verify

    try:
        ref = reference(seed)
        manifest = verify(seed, ref)
    except BadRelease as error:
        return Finding(title, "error", f"seed {seed}: {error}", "copy the release folder again, as the trainer made it")
    if slot.isolation == "process" and manifest.kind != "llm":
        text = f"seed {ref.release} is of kind {manifest.kind}: only language models run in a process of their own"
        return Finding(title, "error", text, 'take isolation = "process" out of this slot')
    if not proving:
        return Finding(title, "ok", f"{ref.release} is whole; it was not asked to answer")
    try:
        proof = prove(seed, EngineOptions(slot.threads, tuple(slot.providers), slot.extra), slot.prove_s_max)
        if slow := too_slow(proof, slot.latency_ms_max):
            raise ProveFailed(slow)
    except ProveFailed as error:
        fix = "use a release made for this device, or raise prove_s_max or latency_ms_max if it was only too slow"
        return Finding(title, "error", f"seed {seed}: {error}", fix)
    return Finding(title, "ok", f"{ref.release} answers {proof.golden} golden inputs as promised")


# In the order in which people mend things.
PARTS: tuple[Callable[[Look], Iterator[Finding]], ...] = (
    configuration, environment, profile, memory, permissions, service_user, disk, clock, running, sources, certificates,
    broker, trust, slots, check_agents.agents,
)  # fmt: skip
