"""What goes into a package's tree and what does not, and which libraries of the system it needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

# Folders and files of other people's packages that nothing on a device imports, relative to site-packages.
NOT_WANTED = (
    "bin", "include", "lib", "share",
    "**/tests", "**/__pycache__", "**/*.pyi", "**/*.a", "**/*.pxd", "**/*.dist-info/RECORD",
    "**/*.dist-info/direct_url.json", "**/*.dist-info/REQUESTED",
    "cv2/data/*.xml", "numpy/_core/include", "numpy/f2py", "numpy/distutils",
    "onnxruntime/datasets", "onnxruntime/quantization", "onnxruntime/tools", "onnxruntime/transformers",
    "av/include", "llama_cpp/server",
)  # fmt: skip
# Libraries that wheels expect of the system, and where Debian has them. Anything else must lie in the tree.
SYSTEM = {
    r"libc\.so\.6|libm\.so\.6|libdl\.so\.2|librt\.so\.1|libpthread\.so\.0|libutil\.so\.1|libmvec\.so\.1|ld-linux.*": "libc6",
    r"libgcc_s\.so\.1": "libgcc-s1",
    r"libstdc\+\+\.so\.6": "libstdc++6",
    r"libgomp\.so\.1": "libgomp1",
    r"libz\.so\.1": "zlib1g",
}
MACHINE = {"amd64": "X86-64", "arm64": "AArch64"}
# Appended to llama_cpp/__init__.py: ggml has one backend for each generation of processors, and loads none by itself.
CHOOSE_PROCESSOR = """
# Added by the package: the code for each generation of processors is in a library of its own. Load the best.
import os as _os
from llama_cpp._ggml import libggml as _libggml, libggml_base_path as _libraries
_libggml.ggml_backend_load_all_from_path(_os.fsencode(_libraries))
"""


class BadTree(Exception):
    """The tree would not work on the device; the message names the file and what it lacks."""


def trim(site: Path) -> None:
    """Take out of site-packages what no device needs, and choose llama.cpp's processor code at run time."""
    for path in [*site.glob("bin/libggml-cpu-*.so"), *site.glob("lib/libggml-cpu-*.so")]:
        shutil.move(path, site / "llama_cpp" / "lib" / path.name)
    for pattern in NOT_WANTED:
        for path in list(site.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    libraries = site / "llama_cpp" / "lib"
    if libraries.is_dir():
        _link_again(libraries)
        if not (libraries / "libggml-cpu.so").exists():
            if not list(libraries.glob("libggml-cpu-*.so")):
                raise BadTree(f"{libraries}: no processor code of llama.cpp; compile the wheel again")
            package = site / "llama_cpp" / "__init__.py"
            package.write_text(package.read_text() + CHOOSE_PROCESSOR)


def _link_again(folder: Path) -> None:
    """A wheel has no symbolic links: libx.so, libx.so.0 and libx.so.0.1 are three copies there. Keep the longest name."""
    for path in sorted(folder.glob("*.so.*"), key=lambda path: len(path.name)):
        for shorter in folder.glob("*.so*"):
            if path.name.startswith(f"{shorter.name}.") and shorter.read_bytes() == path.read_bytes():
                shorter.unlink()
                shorter.symlink_to(path.name)


def libraries(root: Path, architecture: str) -> list[str]:
    """Debian's packages of the libraries that the tree needs. Raises BadTree for one that nobody has, or of another
    architecture."""
    binaries = sorted(p for p in root.rglob("*.so*") if p.is_file() and not p.is_symlink() and _is_elf(p))
    if not binaries:
        return ["libc6"]
    output = subprocess.run(
        ["readelf", "--wide", "--file-header", "--dynamic", "--version-info", *binaries],
        capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"},
    ).stdout  # fmt: skip
    wrong = [name for name in re.findall(r"Machine: +(.*)", output) if MACHINE[architecture] not in name]
    if wrong:
        raise BadTree(f"{len(wrong)} libraries are for {wrong[0]}, not for {architecture}")
    here = {path.name for path in root.rglob("*.so*")}
    found = set()
    for name in sorted(set(re.findall(r"\(NEEDED\).*\[(.*)\]", output)) - here):
        package = next((package for pattern, package in SYSTEM.items() if re.fullmatch(pattern, name)), None)
        if package is None:
            raise BadTree(f"{name} is needed and lies neither in the tree nor in a package that is known here (SYSTEM)")
        found.add(package)
    glibc = max((tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_(2\.\d+)", output)), default=(2, 17))
    return [f"libc6 (>= {glibc[0]}.{glibc[1]})" if name == "libc6" else name for name in sorted(found)]


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def settle(root: Path, epoch: int) -> None:
    """The same modes and times whoever builds it, and however."""
    for path in sorted(root.rglob("*"), reverse=True):
        if not path.is_symlink():
            executable = path.is_dir() or (path.stat().st_mode & 0o100 and path.suffix not in (".py", ".so"))
            path.chmod(0o755 if executable else 0o644)
        os.utime(path, (epoch, epoch), follow_symlinks=False)
    root.chmod(0o755)
    os.utime(root, (epoch, epoch))
