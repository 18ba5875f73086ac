"""The disk of the virtual machine: Debian with its cloud kernel and the package edged, made once and kept below build/.

It boots by Debian's own initramfs (which checks and mounts the file system) and an init of a few lines instead of
systemd: every instruction is emulated, and what systemd would start has no part in what a cut does to the daemon's
files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.debs import build
from tests.system.nspawn import PACKAGES, CannotBoot, debian

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "powercut"
KERNEL = ("linux-image-cloud-amd64", "initramfs-tools", "e2fsprogs", "logsave", "iproute2")
MODULES = "virtio_pci\nvirtio_blk\nvirtio_net\next4\n"
DISK_BYTES = 3 << 30  # sparse
HOST = "10.0.2.2"  # the host's loopback, as QEMU's user network has it
GUEST = "10.0.2.15/24"
NAME = "broker"  # of the host, in the broker's certificate
TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "mkfs.ext4": "e2fsprogs", "debootstrap": "debootstrap"}
# The disk `run`, made for each run, has what changes: the daemon's configuration, certificates, pictures, the feeder.
INIT = f"""#!/bin/sh
# Process 1. /proc, /sys, /dev and /run are mounted by the initramfs.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
mount -o remount,rw / || echo "edged-init: the root file system cannot be written"
mount -t ext4 -o ro /dev/vdb /mnt || echo "edged-init: no disk with the run's files"
mount -t tmpfs tmpfs /tmp
ip link set lo up
ip address add {GUEST} dev eth0
ip link set eth0 up
ip route add default via {HOST}
sh /mnt/start
poweroff -ff
"""


class CannotCut(Exception):
    """This machine cannot do it; the message says why and the fix."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a virtual machine starts from: an ext4 file system without partitions, the kernel and its initramfs."""

    disk: Path
    kernel: Path
    initramfs: Path


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        text = (done.stdout + done.stderr)[-1500:]
        raise CannotCut(f"{' '.join(map(str, command))}: exit status {done.returncode}: {text}")


def file_system(folder: Path, disk: Path, size_bytes: int) -> None:
    """An ext4 file system in the file `disk` with everything in `folder`."""
    with disk.open("wb") as file:
        file.truncate(size_bytes)
    _run("mkfs.ext4", "-q", "-F", "-d", folder, disk)


def image(scratch: Path) -> Image:
    """The image of what the tree has now; made when it is not there yet. Raises CannotCut."""
    if os.geteuid():
        raise CannotCut(f"only root may make the image, this is user {os.geteuid()}")
    for program, package in TOOLS.items():
        if shutil.which(program) is None:
            raise CannotCut(f"{program} is missing: packaging/setup.sh powercut, or apt-get install {package}")
    deb = build(scratch, "--compression", "none")["edged"]
    made_of = hashlib.sha256(deb.read_bytes())
    made_of.update("\0".join((*PACKAGES, *KERNEL, MODULES, INIT, str(DISK_BYTES))).encode())
    folder = CACHE / made_of.hexdigest()[:12]
    found = Image(folder / "disk.raw", folder / "vmlinuz", folder / "initrd.img")
    if not folder.is_dir():
        shutil.rmtree(CACHE, ignore_errors=True)  # an older package's
        beside = folder.with_name(folder.name + ".new")
        beside.mkdir(parents=True)
        _make(scratch / "root", deb, beside)
        beside.rename(folder)
    return found


def _make(root: Path, deb: Path, into: Path) -> None:
    try:
        source = debian((*PACKAGES, *KERNEL))
    except CannotBoot as error:
        raise CannotCut(str(error)) from None
    _run("cp", "-a", "--reflink=auto", source, root)
    (root / "etc/initramfs-tools/modules").write_text(MODULES)
    conf = root / "etc/initramfs-tools/initramfs.conf"
    conf.write_text(conf.read_text().replace("MODULES=most", "MODULES=list") + "FSTYPE=ext4\n")
    (root / "sbin/edged-init").write_text(INIT)
    (root / "sbin/edged-init").chmod(0o755)
    (root / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{HOST} {NAME}\n")
    shutil.copyfile(deb, root / "edged.deb")
    _run("chroot", root, "dpkg", "-i", "/edged.deb")
    (root / "edged.deb").unlink()
    _run("chroot", root, "install", "-d", "-o", "edged", "-g", "edged", "-m", "750", "/var/lib/edged",
         *(f"/var/spool/edged{name}" for name in ("", "/line", "/line/done", "/line/rejected")))  # fmt: skip
    _run("chroot", root, "update-initramfs", "-u")
    for name in ("vmlinuz", "initrd.img"):
        shutil.copyfile(next((root / "boot").glob(f"{name}-*")), into / name)
    shutil.rmtree(root / "boot")
    shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
    file_system(root, into / "disk.raw", DISK_BYTES)
    shutil.rmtree(root)
