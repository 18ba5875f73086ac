"""The Debian package on a booted Debian with systemd as PID 1 and no network: what an operator does with it, and what the
unit does alone. Each test begins with a fresh installation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.debs import ROOT, build, field, next_version
from tests.support.device import merged, toml, until
from tests.support.hosted import PLAIN, PROMPT, clerk
from tests.support.models import put_pictures
from tests.system.nspawn import CannotBoot, Machine

pytestmark = pytest.mark.long

CONFIG = "etc/edged/edged.toml"
EXPOSURE_MAX = 2.0
START_S_MAX = 60.0
# Of the test, so that it does not wait for half a minute; the unit's own is longer.
IMPATIENT = "[Service]\nWatchdogSec=4\nRestartSec=1\n"
OF_OTHERS = "usr/lib/edged/lib/python3.11/site-packages"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    booting = Machine(tmp_path_factory.mktemp("booted"))
    try:
        booted = booting.__enter__()
    except CannotBoot as reason:
        pytest.skip(
            f"this machine boots no Debian: {reason}. tests/system/test_deb.py runs the unit's own command line instead"
        )
    try:
        yield booted
    finally:
        booting.__exit__(None, None, None)


@pytest.fixture
def installed(machine: Machine, packages: dict[str, Path]) -> Machine:
    """The machine as `dpkg -i` of the package leaves it: nothing configured, nothing learned."""
    query = ("dpkg-query", "--show", "--showformat=${db:Status-Abbrev}${Package} ${Version}\n", "edged*")
    have = [line for line in machine.run(*query, check=False).stdout.splitlines() if not line.startswith("un ")]
    machine.run("systemctl", "stop", "edged", check=False)
    for left in ("etc/systemd/system/edged.service.d", "var/spool/edged/line", "var/lib/edged", "etc/edged/key.pem"):
        path = machine.root / left
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "reset-failed")
    if have == [f"ii edged {field(packages['edged'], 'Version')}"]:
        (machine.root / CONFIG).write_bytes((ROOT / "packaging" / "edged.toml").read_bytes())
        machine.run("systemctl", "enable", "--now", "edged")
    else:
        machine.run("dpkg", "--purge", "edged-llm", "edged")
        install(machine, packages["edged"])
    active(machine)
    return machine


def install(machine: Machine, *packages: Path, options: tuple[str, ...] = ()) -> str:
    """`dpkg -i` inside; what it said."""
    for package in packages:
        shutil.copy(package, machine.root / "root" / package.name)
    done = machine.run("dpkg", *options, "-i", *(f"/root/{package.name}" for package in packages))
    for package in packages:
        (machine.root / "root" / package.name).unlink()
    return done.stdout + done.stderr


def wait(machine: Machine, what: str, found: Callable[[], Any], seconds: float = START_S_MAX) -> Any:
    """The first true value of `found`; a failure shows the unit and its journal."""
    try:
        return until(what, found, seconds)
    except AssertionError as error:
        unit = machine.run("systemctl", "status", "--no-pager", "edged", check=False).stdout
        raise AssertionError(f"{error}\n{unit}\n{machine.journal('edged')[-6000:]}") from None


def active(machine: Machine, other_than: int = 0) -> int:
    """The daemon's process, once systemd has heard READY from it (and it is not `other_than`)."""

    def look() -> int:
        pid = int(machine.show("edged", "MainPID"))
        ready = machine.run("systemctl", "is-active", "edged", check=False).stdout.strip() == "active"
        return pid if ready and pid != other_than else 0

    return int(wait(machine, "the daemon is ready", look))


def signal_to(machine: Machine, name: str, pid: int) -> None:
    """Send a signal; this small Debian has no kill but the shell's own."""
    machine.run("sh", "-c", f"kill -{name} {pid}")


def status(machine: Machine) -> dict[str, Any]:
    """What `edged status --json` says; empty while nobody answers."""
    said = machine.run("edged", "status", "--json", check=False).stdout
    return dict(json.loads(said)) if said else {}


def seeing(**more: Any) -> dict[str, Any]:
    """A configuration: one model that looks at the pictures in /var/spool/edged/line."""
    source = {"type": "directory", "path": "/var/spool/edged/line"}
    base: dict[str, Any] = {
        "device": {"id": "boot-1", "site": "plant"}, "broker": {"port": 1883},
        "slots": {"eye": {"seed": "/var/lib/edged/seed/toy"}},
        "pipelines": {"line": {"slot": "eye", "source": source, "results": "durable"}},
    }  # fmt: skip
    return merged(base, more)


def configure(machine: Machine, tables: dict[str, Any], releases: dict[str, Path]) -> None:
    """Write the configuration and put releases in /var/lib/edged/seed, as an operator would."""
    seeds = machine.root / "var/lib/edged/seed"
    seeds.mkdir(exist_ok=True)
    for name, release in releases.items():
        shutil.copytree(release, seeds / name, dirs_exist_ok=True)
    (machine.root / CONFIG).write_text(toml(tables))
    spool = machine.root / "var/spool/edged/line"
    spool.mkdir(exist_ok=True)
    machine.run("chown", "-R", "edged:edged", "/var/lib/edged/seed", "/var/spool/edged/line")


def drop_in(machine: Machine, text: str) -> None:
    """What `systemctl edit edged` does."""
    folder = machine.root / "etc/systemd/system/edged.service.d"
    folder.mkdir(exist_ok=True)
    (folder / "test.conf").write_text(text)
    machine.run("systemctl", "daemon-reload")


def answered(machine: Machine, name: str) -> None:
    """Put a picture in the folder and wait until it has been answered."""
    line = machine.root / "var/spool/edged/line"
    put_pictures(line, [name])
    machine.run("chown", "edged:edged", f"/var/spool/edged/line/{name}", check=False)
    wait(machine, f"{name} is answered", (line / "done" / name).exists)


def test_an_installation_without_a_network_starts_a_daemon_that_works(installed: Machine) -> None:
    interfaces = re.findall(r"^ *(\w+):", installed.run("cat", "/proc/net/dev").stdout, re.MULTILINE)
    assert interfaces == ["lo"]
    assert installed.run("systemctl", "is-enabled", "edged").stdout.strip() == "enabled"
    assert installed.show("edged", "Type") == "notify"
    pid = installed.show("edged", "MainPID")
    assert installed.run("stat", "-c", "%U", f"/proc/{pid}").stdout.strip() == "edged"
    modes = installed.run(
        "stat", "-c", "%n %a %U %G", "/etc/edged", f"/{CONFIG}", "/var/lib/edged", "/run/edged"
    ).stdout
    assert modes.splitlines()[:3] == [
        "/etc/edged 750 root edged", f"/{CONFIG} 640 root edged", "/var/lib/edged 750 edged edged",
    ]  # fmt: skip
    wait(installed, "the broker", lambda: status(installed).get("broker") == "connected")
    assert installed.run("edged", "check").returncode == 0
    assert installed.run("dpkg", "--verify", "edged").stdout == ""


def test_the_daemon_cannot_touch_the_rest_of_the_device(installed: Machine) -> None:
    said = installed.run("systemd-analyze", "security", "--no-pager", "edged.service").stdout
    found = re.search(r"Overall exposure level for edged.service: ([\d.]+)", said)
    assert found, said
    assert float(found[1]) <= EXPOSURE_MAX, said
    pid = installed.show("edged", "MainPID")
    inside = ("nsenter", "--target", pid, "--mount", "--")
    assert installed.run(*inside, "touch", "/etc/edged/x", check=False).returncode
    assert installed.run(*inside, "touch", "/usr/lib/edged/x", check=False).returncode
    assert installed.run(*inside, "ls", "/dev/kmsg", check=False).returncode, "devices are hidden"
    capabilities = re.findall(r"^Cap(?:Eff|Prm|Bnd):\s*(\w+)", installed.run("cat", f"/proc/{pid}/status").stdout, re.M)
    assert {int(mask, 16) for mask in capabilities} == {0}


def test_the_drop_in_for_cameras_and_gpus_lets_the_daemon_see_devices(installed: Machine) -> None:
    node = "/dev/video9"  # not a real one: only whether it is seen
    installed.run("touch", node)
    installed.run("groupadd", "--force", "--system", "render")  # udev's, which this small Debian is without

    def sees(pid: int) -> bool:
        return not installed.run("nsenter", "--target", str(pid), "--mount", "--", "ls", node, check=False).returncode

    assert not sees(active(installed))
    drop_in(installed, (installed.root / "usr/share/doc/edged/examples/devices.conf").read_text())
    installed.run("systemctl", "restart", "edged")
    pid = active(installed)
    assert sees(pid)
    held = set(installed.run("grep", "^Groups", f"/proc/{pid}/status").stdout.split()[1:])
    numbers = installed.run("getent", "group", "video", "render").stdout.splitlines()
    assert {line.split(":")[2] for line in numbers} <= held


def test_ready_means_that_the_model_has_answered(installed: Machine, toy: Path) -> None:
    configure(installed, seeing(), {"toy": toy})
    installed.run("systemctl", "restart", "edged")  # returns at READY
    model = status(installed)["models"]["eye"]
    assert "toy@1.0" in str(model["active"])
    answered(installed, "a.png")


def test_a_model_that_cannot_be_loaded_is_never_ready(installed: Machine) -> None:
    """And what is said about it is where an operator looks."""
    configure(installed, seeing(), {})
    installed.run("systemctl", "--no-block", "restart", "edged")
    wait(installed, "the reason", lambda: "/var/lib/edged/seed/toy" in installed.journal("edged"))
    assert installed.run("systemctl", "is-active", "edged", check=False).stdout.strip() != "active"


def test_a_language_model_runs_within_the_units_limits(
    installed: Machine, packages: dict[str, Path], phi: dict[str, Path], tmp_path: Path
) -> None:
    if "edged-llm" not in packages:
        pytest.skip("edged-llm is not there: its llama.cpp has not been compiled; `make deb` does (10 minutes)")
    release = clerk(tmp_path / "clerk", phi["model_gguf"])
    before = active(installed)
    install(installed, packages["edged-llm"])
    active(installed, other_than=before)
    tables = {**seeing(), "slots": {"tongue": {"seed": "/var/lib/edged/seed/clerk"}}, "pipelines": {
        "chat": {"slot": "tongue", "task": "generate", "source": {"type": "mqtt"}}}}  # fmt: skip
    configure(installed, tables, {"clerk": release})
    installed.run("systemctl", "restart", "edged")
    assert "clerk@1.0" in str(status(installed)["models"]["tongue"]["active"])
    answer = installed.run("runuser", "-u", "edged", "--", "edged", "infer", "tongue", "--prompt", PROMPT)
    assert PLAIN in answer.stdout


def test_a_stopped_process_is_noticed_by_the_watchdog_and_replaced(installed: Machine, toy: Path) -> None:
    drop_in(installed, IMPATIENT)
    configure(installed, seeing(), {"toy": toy})
    installed.run("systemctl", "restart", "edged")
    pid = active(installed)
    answered(installed, "before.png")
    signal_to(installed, "STOP", pid)
    active(installed, other_than=pid)
    assert "Watchdog timeout" in installed.journal("edged")
    assert int(installed.show("edged", "NRestarts")) == 1
    answered(installed, "after.png")


def test_a_crash_loop_does_not_give_up(installed: Machine) -> None:
    drop_in(installed, "[Service]\nRestartSec=0\n")
    installed.run("systemctl", "restart", "edged")
    pid = active(installed)
    for _ in range(7):  # systemd gives up after five in ten seconds unless it is told otherwise
        signal_to(installed, "KILL", pid)
        pid = active(installed, other_than=pid)


def test_a_stop_finishes_in_order_and_within_its_time(installed: Machine, toy: Path) -> None:
    configure(installed, seeing(), {"toy": toy})
    installed.run("systemctl", "restart", "edged")
    answered(installed, "a.png")
    installed.run("systemctl", "stop", "edged")
    assert installed.show("edged", "Result") == "success"
    assert installed.show("edged", "ExecMainStatus") == "0"
    assert "stopped" in installed.journal("edged")


def test_a_reload_takes_a_good_configuration_and_refuses_a_bad_one(installed: Machine, toy: Path) -> None:
    configure(installed, seeing(), {"toy": toy})
    installed.run("systemctl", "restart", "edged")
    pid = active(installed)
    more = {"pipelines": {"ask": {"slot": "eye", "source": {"type": "mqtt"}}}}
    configure(installed, seeing(**more), {})
    installed.run("systemctl", "reload", "edged")
    wait(installed, "the new pipeline", lambda: "ask" in status(installed).get("pipelines", {}))
    (installed.root / CONFIG).write_text("[device]\nid = 'boot-1'\nidd = 1\n")
    installed.run("systemctl", "reload", "edged")
    wait(installed, "the refusal", lambda: "device.idd" in installed.journal("edged"))
    assert active(installed) == pid
    answered(installed, "a.png")
    configure(installed, seeing(**more), {})  # `edged status` reads the file as well
    assert "ask" in status(installed)["pipelines"]


def test_an_upgrade_keeps_configuration_and_state_and_runs_the_new_code(
    installed: Machine, packages: dict[str, Path], toy: Path, tmp_path: Path
) -> None:
    configure(installed, seeing(), {"toy": toy})
    installed.run("systemctl", "restart", "edged")
    answered(installed, "a.png")
    kept, pid = (installed.root / CONFIG).read_text(), active(installed)
    boots = sorted(path.name for path in (installed.root / "var/lib/edged").iterdir())
    newer = field(packages["edged"], "Version") + "+1"
    files = {CONFIG: "[device]\nid = 'of-the-newer-package'\n", f"{OF_OTHERS}/edged/newer.py": "# only here\n"}
    upgrade = next_version(packages["edged"], tmp_path, newer, files)
    said = install(installed, upgrade, options=("--force-confdef", "--force-confold"))
    assert (installed.root / CONFIG).read_text() == kept, said
    assert (installed.root / f"{CONFIG}.dpkg-dist").exists()
    active(installed, other_than=pid)
    assert sorted(path.name for path in (installed.root / "var/lib/edged").iterdir()) == boots
    assert list((installed.root / OF_OTHERS / "edged/__pycache__").glob("newer.*"))
    answered(installed, "b.png")
    installed.run("systemctl", "disable", "--now", "edged")
    install(installed, packages["edged"], options=("--force-downgrade", "--force-confold"))
    assert installed.run("systemctl", "is-enabled", "edged", check=False).stdout.strip() == "disabled"
    assert installed.run("systemctl", "is-active", "edged", check=False).stdout.strip() == "inactive"
    assert not (installed.root / OF_OTHERS / "edged/newer.py").exists()


def test_a_removal_keeps_what_was_learned_and_a_purge_does_not(
    installed: Machine, packages: dict[str, Path], toy: Path
) -> None:
    configure(installed, seeing(), {"toy": toy})
    (installed.root / "etc/edged/key.pem").write_text("the operator's own")
    installed.run("systemctl", "restart", "edged")
    answered(installed, "a.png")
    installed.run("dpkg", "--remove", "edged")
    assert not (installed.root / "usr/lib/edged").exists(), "bytecode was left behind"
    assert not (installed.root / "usr/bin/edged").exists()
    assert (installed.root / CONFIG).exists()
    assert (installed.root / "var/lib/edged/edged.db").exists()
    assert installed.run("systemctl", "is-active", "edged", check=False).stdout.strip() == "inactive"
    install(installed, packages["edged"])
    active(installed)
    answered(installed, "b.png")
    said = installed.run("dpkg", "--purge", "edged")
    assert not (installed.root / "var/lib/edged").exists()
    assert not (installed.root / CONFIG).exists()
    assert (installed.root / "etc/edged/key.pem").exists()
    assert "/etc/edged is not empty and stays" in said.stdout + said.stderr
    assert installed.run("id", "-un", "edged").stdout.strip() == "edged", "its number is not given to another"
    assert installed.run("systemctl", "cat", "edged", check=False).returncode
    assert not list(installed.root.glob("etc/systemd/system/**/edged.service"))
