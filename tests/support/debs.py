"""The Debian packages, built for a test; and their content, unpacked or changed as another version."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILDER = ROOT / "build" / "venv-device" / "bin" / "python"


def build(folder: Path, *options: str) -> dict[str, Path]:
    """The packages by name. edged-llm is among them where its llama.cpp has been compiled (`make deb` does)."""
    command = [BUILDER, ROOT / "packaging" / "deb" / "build.py", "--output", folder, "--llm-if-compiled", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    made = [Path(line.split()[0]) for line in done.stdout.splitlines()]
    return {path.name.split("_")[0]: path for path in made}


def field(package: Path, name: str) -> str:
    """One field of a package's control file."""
    return subprocess.check_output(["dpkg-deb", "--field", package, name], text=True).strip()


def unpack(package: Path, folder: Path) -> Path:
    """The files of a package, in `folder`."""
    subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
    return folder


def next_version(package: Path, folder: Path, version: str, files: dict[str, str]) -> Path:
    """`package` as `version`, with other `files` (path: content) in it."""
    tree = folder / f"tree-{version}"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN" / "control"
    control.write_text(control.read_text().replace(field(package, "Version"), version))
    for path, content in files.items():
        (tree / path).write_text(content)
    out = folder / f"{field(package, 'Package')}_{version}.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, out], check=True, capture_output=True)
    shutil.rmtree(tree)
    return out
