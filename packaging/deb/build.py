"""Builds the Debian packages edged and edged-llm. Run by `make deb`; `--help` shows the options.

The device gets files alone: its packages come from wheels for its architecture, put beside each other below /usr/lib/edged,
run by its own /usr/bin/python3.11. Nothing of the trainer goes in. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import tree

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build"
# A wheel's platform tag for each architecture of Debian 12, whose C library is 2.36.
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
GLIBC_MINOR_MAX = 36
LLAMA = re.compile(r"^llama[-_]cpp[-_]python")
# Code for every generation of processors, chosen when it is loaded: what is compiled here must run there.
LLAMA_CMAKE = "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON"
# What others ask for and the device never imports: pip and its kin (a device installs packages), the hub's client and what
# only that needs (a device fetches from its trainer).
LEFT_OUT = {
    "pip", "setuptools", "wheel", "huggingface-hub", "hf-xet", "fsspec", "filelock", "tqdm", "requests", "urllib3",
    "charset-normalizer", "pyyaml",
}  # fmt: skip
MARKS = {"bash": "usr/share/bash-completion/completions/edged", "zsh": "usr/share/zsh/vendor-completions/_edged",
         "fish": "usr/share/fish/vendor_completions.d/edged.fish"}  # fmt: skip


class CannotBuild(Exception):
    """The package cannot be made; the message says why and what to do."""


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Run a command; its output. Raises CannotBuild with what it said."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **(env or {})}
    )
    if done.returncode:
        raise CannotBuild(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def say(text: str) -> None:
    """One line of progress."""
    print(f"deb: {text}", file=sys.stderr, flush=True)


def tool(name: str) -> None:
    """Raise CannotBuild when a program of the system is missing."""
    if shutil.which(name) is None:
        raise CannotBuild(f"{name} is missing: apt-get install {'binutils' if name == 'readelf' else 'dpkg'}")


def requirements() -> dict[str, list[str]]:
    """What pyproject.toml asks for, by package: the daemon with its cameras, and the language models with agents on them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return {"edged": project["dependencies"] + extras["rtsp"], "edged-llm": extras["llm"] + extras["agents"]}


def project_version() -> str:
    """The version in pyproject.toml."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def native_architecture() -> str:
    """Of this machine, as Debian calls it."""
    return run("dpkg", "--print-architecture").strip()


def fetch_wheels(architecture: str, package: str, wanted: list[str], own: Path | None = None) -> Path:
    """The folder with the wheels of `wanted`, of the file `own`, and all that they need, for this architecture; fetched
    once."""
    constraints = ROOT / "packaging" / "constraints.txt"
    inputs = "\n".join([*wanted, constraints.read_text()]).encode() + (own.read_bytes() if own else b"")
    stamp = hashlib.sha256(inputs).hexdigest()
    folder = BUILD / "deb" / "wheels" / f"{architecture}-{package}-{stamp[:12]}"
    if folder.is_dir():
        return folder
    say(f"fetching the wheels of {package} for {architecture}")
    machine = MACHINES[architecture]
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC_MINOR_MAX, 16, -1)]
    tags += [f"manylinux2014_{machine}", f"linux_{machine}"]
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(beside), "-c", str(constraints)]
    command += ["--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp"]
    command += [f"--platform={tag}" for tag in tags]
    run(*command, *wanted, *([own] if own else []))
    beside.rename(folder)
    return folder


def llama_wheel(architecture: str, compile_it: bool) -> Path | None:
    """The wheel of llama.cpp for all processors of this architecture; None where there is none and none is made.

    llama.cpp has no wheels of its own: it is compiled, and only on a machine of that architecture.
    """
    folder = BUILD / "wheels-portable"
    pattern = f"llama_cpp_python-*_{MACHINES[architecture]}.whl"
    if there := sorted(folder.glob(pattern)):
        return there[-1]
    if not compile_it:
        return None
    if architecture != native_architecture():
        raise CannotBuild(
            f"edged-llm for {architecture} is compiled on a machine of that architecture, this one is "
            f"{native_architecture()}: run `make deb` there, or here with --without-llm"
        )
    say("compiling llama-cpp-python for all processors (10 minutes on 2 cores, once)")
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        asked = next(r for r in requirements()["edged-llm"] if LLAMA.match(r))
        # Not from pip's cache, which may hold one that was compiled for the processor of this machine alone.
        run(
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-cache-dir", "--no-deps", "--no-binary",
            "llama-cpp-python", "-c", ROOT / "packaging" / "constraints.txt", "-w", scratch, asked,
            env={"CMAKE_ARGS": LLAMA_CMAKE, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()), "TMPDIR": scratch},
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        for wheel in Path(scratch).glob("*.whl"):
            shutil.move(wheel, folder / wheel.name)
    return max(folder.glob(pattern))


def distribution(wheel: Path) -> str:
    """The normalised name in a wheel's file name."""
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


def install_wheels(wheels: list[Path], target: Path) -> None:
    """Unpack wheels beside each other, without what a device has no use for."""
    chosen = [str(wheel) for wheel in wheels if distribution(wheel) not in LEFT_OUT]
    machine_tags = [f"--platform={w.split('-')[-1].removesuffix('.whl').split('.')[0]}" for w in chosen]
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile",
        "--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp", *sorted(set(machine_tags)),
        "--target", target, *chosen,
    )  # fmt: skip


def put(text: str | bytes, path: Path, mode: int = 0o644) -> None:
    """Write a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)


def completions(root: Path) -> None:
    """Completion for three shells, as typer generates it from the commands."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    for shell, path in MARKS.items():
        script = get_completion_script(prog_name="edged", complete_var="_EDGED_COMPLETE", shell=shell)
        put(script + "\n", root / path)


def daemon_files(root: Path, version: str) -> None:
    """Everything of edged that is no wheel: its code, the launcher, the unit, the configuration, the manual."""
    library = root / "usr/lib/edged"
    site = library / "lib/python3.11/site-packages"
    shutil.copytree(ROOT / "edged", site / "edged", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = f"Metadata-Version: 2.1\nName: edged\nVersion: {project_version()}\n"
    put(metadata, site / f"edged-{project_version()}.dist-info/METADATA")
    put("dpkg\n", site / f"edged-{project_version()}.dist-info/INSTALLER")
    # A virtual environment is a symbolic link and this file: the device's own interpreter, and only what lies here.
    put("home = /usr/bin\ninclude-system-site-packages = false\n", library / "pyvenv.cfg")
    (library / "bin").mkdir()
    (library / "bin/python").symlink_to("/usr/bin/python3.11")
    launcher = "#!/usr/lib/edged/bin/python\nfrom edged.cli import main\n\nmain()\n"
    put(launcher, library / "bin/edged", 0o755)
    (root / "usr/bin").mkdir()
    (root / "usr/bin/edged").symlink_to("../lib/edged/bin/edged")
    copies = {
        "systemd/edged.service": "usr/lib/systemd/system/edged.service",
        "systemd/edged.sysusers": "usr/lib/sysusers.d/edged.conf",
        "systemd/edged.tmpfiles": "usr/lib/tmpfiles.d/edged.conf",
        "systemd/devices.conf": "usr/share/doc/edged/examples/devices.conf",
        "docs/edged.example.toml": "usr/share/doc/edged/examples/edged.toml",
        "packaging/edged.toml": "etc/edged/edged.toml",
    }
    for source, target in copies.items():
        put((ROOT / source).read_bytes(), root / target)
    for profile in sorted((ROOT / "firmware_profiles").glob("*.toml")):
        put(profile.read_bytes(), root / "usr/share/edged/profiles" / profile.name)
    manual = (HERE / "edged.1").read_text().replace("@VERSION@", version)
    put(gzip.compress(manual.encode(), 9, mtime=0), root / "usr/share/man/man1/edged.1.gz")
    completions(root)


def documents(root: Path, package: str, version: str, epoch: int) -> None:
    """The changelog that Debian wants, and the licences."""
    folder = root / "usr/share/doc" / package
    when = subprocess.check_output(["date", "-R", "-u", "-d", f"@{epoch}"], text=True, env={"LC_ALL": "C"}).strip()
    entry = f"{package} ({version}) unstable; urgency=medium\n\n  * See NEWS.gz.\n\n"
    put(gzip.compress(f"{entry} -- The edged developers <edged@localhost>  {when}\n".encode(), 9, mtime=0),
        folder / "changelog.gz")  # fmt: skip
    put(gzip.compress((ROOT / "CHANGELOG.md").read_bytes(), 9, mtime=0), folder / "NEWS.gz")
    put((HERE / "copyright").read_bytes(), folder / "copyright")


def pack(package: str, root: Path, output: Path, version: str, architecture: str, compression: str, epoch: int) -> Path:
    """Write DEBIAN/ and let dpkg-deb make the file; its path."""
    control = root / "DEBIAN"
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    if conffiles := [path for path in files if path.relative_to(root).parts[0] == "etc"]:
        put("".join(f"/{path.relative_to(root)}\n" for path in conffiles), control / "conffiles")
    sums = [f"{hashlib.md5(p.read_bytes()).hexdigest()}  {p.relative_to(root)}\n" for p in files if p not in conffiles]
    put("".join(sums), control / "md5sums")
    values = {
        "VERSION": version, "ARCHITECTURE": architecture, "LIBRARIES": ", ".join(tree.libraries(root, architecture)),
        "INSTALLED_KIB": str(sum(path.stat().st_size // 1024 + 1 for path in files)),
    }  # fmt: skip
    text = (HERE / f"control.{package}").read_text()
    put(re.sub(r"@(\w+)@", lambda found: values[found[1]], text), control / "control")
    for script in ("postinst", "prerm", "postrm"):
        if (HERE / f"{package}.{script}").is_file():
            put((HERE / f"{package}.{script}").read_bytes(), control / script, 0o755)
    tree.settle(root, epoch)
    path = output / f"{package}_{version}_{architecture}.deb"
    output.mkdir(parents=True, exist_ok=True)
    run("dpkg-deb", "--root-owner-group", f"-Z{compression}", "--build", root, path,
        env={"SOURCE_DATE_EPOCH": str(epoch)})  # fmt: skip
    return path


def source_epoch() -> int:
    """The time that all files get: SOURCE_DATE_EPOCH, else of the last commit."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    try:
        return int(run("git", "log", "-1", "--format=%ct"))
    except (CannotBuild, FileNotFoundError):
        return int((ROOT / "pyproject.toml").stat().st_mtime)


def build(options: argparse.Namespace) -> list[Path]:
    """Make the packages that `options` ask for; their paths."""
    for name in ("dpkg-deb", "readelf"):
        tool(name)
    wanted, epoch, architecture = requirements(), source_epoch(), options.architecture
    base = fetch_wheels(architecture, "edged", wanted["edged"])
    llama = None if options.llm == "no" else llama_wheel(architecture, options.llm == "yes")
    made = []
    with tempfile.TemporaryDirectory(dir=BUILD / "deb") as scratch:
        root = Path(scratch) / "edged"
        install_wheels(sorted(base.glob("*.whl")), root / "usr/lib/edged/lib/python3.11/site-packages")
        daemon_files(root, options.version)
        roots = {"edged": root}
        if llama is not None:
            others = [requirement for requirement in wanted["edged-llm"] if not LLAMA.match(requirement)]
            both = fetch_wheels(architecture, "edged-llm", others, llama)
            there = {distribution(wheel) for wheel in base.glob("*.whl")}
            more = [wheel for wheel in sorted(both.glob("*.whl")) if distribution(wheel) not in there]
            roots["edged-llm"] = Path(scratch) / "edged-llm"
            install_wheels(more, roots["edged-llm"] / "usr/lib/edged/lib/python3.11/site-packages")
        for package, folder in roots.items():
            tree.trim(folder / "usr/lib/edged/lib/python3.11/site-packages")
            documents(folder, package, options.version, epoch)
            say(f"packing {package}")
            made.append(
                pack(package, folder, options.output, options.version, architecture, options.compression, epoch)
            )
    return made


def main() -> None:
    """Parse, build, say what was made: path, bytes, SHA-256."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=sorted(MACHINES), default=native_architecture())
    parser.add_argument("--output", type=Path, default=BUILD / "deb")
    parser.add_argument("--version", default=project_version())
    parser.add_argument("--compression", choices=("zstd", "xz", "gzip", "none"), default="zstd")
    llm = parser.add_mutually_exclusive_group()
    llm.add_argument("--without-llm", dest="llm", action="store_const", const="no", default="yes")
    llm.add_argument("--llm-if-compiled", dest="llm", action="store_const", const="if-compiled")
    options = parser.parse_args()
    (BUILD / "deb").mkdir(parents=True, exist_ok=True)
    try:
        made = build(options)
    except (CannotBuild, tree.BadTree) as error:
        sys.exit(f"deb: {error}")
    for path in made:
        print(f"{path}  {path.stat().st_size} bytes  sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
