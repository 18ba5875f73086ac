"""Authorities that a browser trusts besides its own, as Chromium reads them: in NSS's database below its home folder.

A pinned key (`--ignore-certificate-errors-spki-list`) will not do: Chromium then takes any chain in which the pinned
certificate lies anywhere, and anybody can put a public certificate there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

DATABASE = ".pki/nssdb"
SECONDS_MAX = 30.0
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class BadAuthorities(ValueError):
    """Authorities that nothing can be made of; the message says why and what to do."""


def trust(ca: Path, home: Path) -> None:
    """Let a browser with the home folder `home` trust the authorities in the PEM file `ca`. Raises BadAuthorities."""
    program = shutil.which("certutil")
    if program is None:
        raise BadAuthorities(
            f"{ca} needs certutil, by which Chromium is told; install it: apt-get install libnss3-tools"
        )
    try:
        certificates = _CERTIFICATE.findall(ca.read_text("ascii"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadAuthorities(f"{ca}: {error}; give a PEM file with the authority's certificate") from None
    if not certificates:
        raise BadAuthorities(f"{ca} holds no certificate; give a PEM file with the authority's certificate")
    folder = home / DATABASE
    folder.mkdir(parents=True)
    _certutil(program, folder, ["-N", "--empty-password"])
    for number, each in enumerate(certificates):
        _certutil(program, folder, ["-A", "-a", "-n", f"edged {number}", "-t", "C,,"], f"{each}\n")


def _certutil(program: str, folder: Path, words: list[str], given: str = "") -> None:
    command = [program, *words, "-d", f"sql:{folder}"]
    try:
        subprocess.run(command, input=given, capture_output=True, text=True, timeout=SECONDS_MAX, check=True)
    except subprocess.CalledProcessError as error:
        raise BadAuthorities(f"certutil: {(error.stderr or error.stdout).strip()[:300]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadAuthorities(f"certutil: {error}") from None
