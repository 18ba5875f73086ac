"""The Debian package as a file: what is in it, what is not, and whether it runs from where it lies."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from edged.cli import app
from edged.status_socket import ask_status
from tests.support.debs import ROOT, build, field, unpack
from tests.support.device import clean_env, toml, until
from tests.support.models import put_pictures
from tests.system.broker import Broker

UNIT = ROOT / "systemd" / "edged.service"
EXPOSURE_MAX = 2.0
SITE = "usr/lib/edged/lib/python3.11/site-packages"
TRAINER_ONLY = ("trainer", "torch", "transformers", "ultralytics", "peft", "optimum", "onnx", "scipy", "pandas", "pip")
INTERPRETER = Path("/usr/bin/python3.11")  # of Debian 12, which the package is for


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="module")
def tree(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The daemon's package, unpacked."""
    return unpack(packages["edged"], tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def command(tree: Path) -> list[str | Path]:
    """`edged` of the unpacked package."""
    if not INTERPRETER.exists():
        pytest.skip(f"{INTERPRETER}, which the package runs on, is not on this machine")
    return [tree / "usr/lib/edged/bin/python", tree / "usr/lib/edged/bin/edged"]


def test_the_daemon_and_nothing_of_the_trainer_is_in_it(tree: Path) -> None:
    site = tree / SITE
    assert (site / "edged" / "daemon.py").is_file()
    assert [name for name in TRAINER_ONLY if (site / name).exists()] == []
    assert not list(tree.rglob("__pycache__")), "bytecode is made at the installation"
    assert not list(site.glob("llama_cpp*")), "language models are a package of their own"


def test_it_has_all_that_an_operator_expects(tree: Path) -> None:
    expected = [
        "etc/edged/edged.toml", "usr/bin/edged", "usr/lib/systemd/system/edged.service", "usr/lib/sysusers.d/edged.conf",
        "usr/share/man/man1/edged.1.gz", "usr/share/bash-completion/completions/edged",
        "usr/share/zsh/vendor-completions/_edged", "usr/share/fish/vendor_completions.d/edged.fish",
        "usr/share/doc/edged/copyright", "usr/share/doc/edged/changelog.gz", "usr/share/doc/edged/examples/edged.toml",
    ]  # fmt: skip
    assert [path for path in expected if not os.path.lexists(tree / path)] == []
    profiles = {path.name for path in (ROOT / "firmware_profiles").glob("*.toml")}
    assert {path.name for path in (tree / "usr/share/edged/profiles").glob("*.toml")} == profiles


def test_the_package_says_what_it_needs_and_what_it_configures(packages: dict[str, Path], tmp_path: Path) -> None:
    depends = field(packages["edged"], "Depends")
    assert "python3.11" in depends
    assert re.search(r"libc6 \(>= 2\.\d+\)", depends), depends
    subprocess.run(["dpkg-deb", "--control", packages["edged"], tmp_path / "control"], check=True)
    assert (tmp_path / "control" / "conffiles").read_text() == "/etc/edged/edged.toml\n"
    for script in ("postinst", "prerm", "postrm"):
        subprocess.run(["sh", "-n", tmp_path / "control" / script], check=True)


def test_the_manual_names_every_command(tree: Path) -> None:
    manual = gzip.decompress((tree / "usr/share/man/man1/edged.1.gz").read_bytes()).decode()
    documented = re.findall(r"^\.It Cm (.*)", manual, re.MULTILINE)

    def missing(group: typer.core.TyperGroup, above: str = "") -> Iterator[str]:
        for name, inner in group.commands.items():
            if isinstance(inner, typer.core.TyperGroup):
                yield from missing(inner, name)
                continue
            lines = [line.split() for line in documented]
            if not any((above or name) == words[0] and name in words for words in lines):
                yield f"{above} {name}".strip()

    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    assert list(missing(group)) == []


def test_the_shells_complete_its_commands(tree: Path, command: list[str | Path]) -> None:
    script = (tree / "usr/share/bash-completion/completions/edged").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    asked = {**clean_env(), "_EDGED_COMPLETE": "complete_bash", "COMP_WORDS": "edged sta", "COMP_CWORD": "1"}
    assert "complete_bash" in script
    answer = subprocess.run(command, env=asked, capture_output=True, text=True, check=False).stdout
    assert answer.split() == ["status"]


def test_a_systemd_unit_keeps_the_daemon_apart_from_the_rest_of_the_device() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine: apt-get install systemd")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", UNIT],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for edged.service: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= EXPOSURE_MAX, done.stdout


def test_the_shipped_configuration_is_good(tree: Path, command: list[str | Path], tmp_path: Path) -> None:
    with Broker(tmp_path / "broker") as broker:
        here = {"EDGED_DEVICE__STATE_DIR": str(tmp_path / "state"), "EDGED_BROKER__PORT": str(broker.port)}
        done = subprocess.run(
            [*command, "check", "--json", "-c", tree / "etc/edged/edged.toml"],
            capture_output=True, text=True, check=False, env={**clean_env(), **here},
        )  # fmt: skip
    assert done.stdout, done.stderr
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert findings["state_dir"]["ok"], findings
    assert findings["broker"]["ok"], findings


def test_the_units_own_command_line_tells_the_service_manager_how_it_is(
    tree: Path, command: list[str | Path], toy: Path, tmp_path: Path
) -> None:
    """What test_booted.py sees through systemd, without it: this works where no Debian can be booted."""
    found = re.search(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert found
    program, *arguments = shlex.split(found[1])
    assert program == "/usr/bin/edged"
    config, pictures = tmp_path / "edged.toml", tmp_path / "in"
    pictures.mkdir()
    source = {"type": "directory", "path": pictures}
    with Broker(tmp_path / "broker") as broker, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        config.write_text(toml({
            "device": {"id": "packed", "state_dir": tmp_path / "state"}, "broker": {"port": broker.port},
            "slots": {"eye": {"seed": toy}}, "pipelines": {"line": {"slot": "eye", "source": source}},
        }))  # fmt: skip
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(1)
        told: list[str] = []

        def hears(what: str) -> bool:
            with suppress(TimeoutError):
                told.extend(manager.recv(4096).decode().splitlines())
            return what in told

        environment = {**clean_env(), "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        arguments = [argument.replace("/etc/edged/edged.toml", str(config)) for argument in arguments]
        with (tmp_path / "log").open("wb") as log:
            daemon = subprocess.Popen([*command, *arguments], env=environment, stdout=log, stderr=log)
        try:
            until("READY", lambda: hears("READY=1"))
            status = ask_status(tmp_path / "state")
            assert status
            assert "toy@1.0" in str(status["models"]["eye"]["active"])
            told.clear()
            until("WATCHDOG", lambda: hears("WATCHDOG=1"))
            put_pictures(pictures, ["a.png"])
            until("the picture is answered", lambda: (pictures / "done" / "a.png").exists())
            daemon.send_signal(signal.SIGTERM)
            until("STOPPING", lambda: hears("STOPPING=1"))
            assert daemon.wait(20) == 0, (tmp_path / "log").read_text()
        finally:
            daemon.kill()
            daemon.wait()


@pytest.mark.long
def test_the_same_source_gives_the_same_bytes(packages: dict[str, Path], tmp_path: Path) -> None:
    again = build(tmp_path)
    sums = [{n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in made.items()} for made in (packages, again)]
    assert sums[0] == sums[1]
