#!/usr/bin/env bash
# Makes what `make demo` and `make test` need: the system packages, one environment for devices, one for the trainer.
# Safe to run again: what is there and current is left alone. Usage: packaging/setup.sh device|trainer|tests|powercut ...
set -euo pipefail
cd "$(dirname "$0")/.."

BUILD=build
WHEELS=$BUILD/wheels
CONSTRAINTS=packaging/constraints.txt

say() { printf '\033[1m%s\033[0m\n' "setup: $*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 to 3.13 found; install one (Debian, Ubuntu: apt-get install python3 python3-venv) or set PYTHON=/path/to/python"
}

# What the system must have, as `command:debian-package`.
system_packages() {
    local missing=() entry
    for entry in mosquitto:mosquitto g++:build-essential make:build-essential; do
        PATH=$PATH:/usr/sbin command -v "${entry%%:*}" >/dev/null || missing+=("${entry##*:}")
    done
    "$PY" -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
    # A system Python needs its headers where a package has no wheel for it.
    [ ${#missing[@]} -eq 0 ] && return
    local wanted root=()
    wanted=$(printf '%s\n' "${missing[@]}" | sort -u | tr '\n' ' ')
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null && sudo -n true 2>/dev/null && root=(sudo) ||
            die "these packages are missing: $wanted- install them as root: apt-get install $wanted"
    fi
    command -v apt-get >/dev/null || die "these are missing and there is no apt-get here: $wanted"
    say "installing $wanted"
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $wanted >/dev/null
}

# What the tests need besides: a booted Debian, a real RTSP server (GStreamer's, run by Debian's own Python), PostgreSQL, Chromium. Missing
# packages are no error here: the tests that need them say what this machine lacks.
test_packages() {
    local missing=()
    command -v debootstrap >/dev/null && command -v systemd-nspawn >/dev/null && command -v systemd-analyze >/dev/null ||
        missing+=(debootstrap systemd-container systemd)
    /usr/bin/python3 -c 'import gi; gi.require_version("GstRtspServer", "1.0"); from gi.repository import Gst, GstRtspServer
Gst.init(None); assert all(map(Gst.ElementFactory.find, ("openh264enc", "h264parse", "rtph264pay")))' 2>/dev/null ||
        missing+=(python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-good gstreamer1.0-plugins-bad)
    compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || missing+=(postgresql)
    command -v chromium >/dev/null || missing+=(chromium)
    command -v certutil >/dev/null || missing+=(libnss3-tools)
    install_if_root "${missing[@]}"
}

# The virtual machine of `make powercut`.
powercut_packages() {
    PATH=$PATH:/usr/sbin command -v qemu-system-x86_64 >/dev/null || install_if_root qemu-system-x86
}

install_if_root() { # packages
    [ $# -eq 0 ] && return
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        say "not here, and installed by root with apt-get alone: $*"
        return
    fi
    say "installing $*"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" \
        >/dev/null || say "not installed: the tests that need them will say so"
}

# llama.cpp compiles for minutes: once, for both environments.
llama_wheel() {
    ls $WHEELS/llama_cpp_python-*.whl >/dev/null 2>&1 && return
    say "compiling llama-cpp-python (about 5 minutes on 2 cores, once)"
    mkdir -p $WHEELS.new
    CMAKE_ARGS="-DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
        "$1/bin/pip" wheel --quiet --no-deps -c $CONSTRAINTS -w $WHEELS.new 'llama-cpp-python>=0.3.30,<0.4'
    mkdir -p $WHEELS
    mv $WHEELS.new/llama_cpp_python-*.whl $WHEELS/
    rmdir $WHEELS.new
}

environment() { # name, extras
    local name=$1 extras=$2 venv=$BUILD/venv-$1 stamp
    stamp=$(cat pyproject.toml $CONSTRAINTS packaging/setup.sh | sha256sum | cut -d' ' -f1)
    if [ -f "$venv/stamp" ] && [ "$(cat "$venv/stamp")" = "$stamp" ]; then return; fi
    say "making the $name environment in $venv"
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -c '' 2>/dev/null || "$PY" -m venv --clear "$venv"
    rm -f "$venv/stamp"
    "$venv/bin/python" -m pip install --quiet --upgrade pip
    llama_wheel "$venv"
    "$venv/bin/pip" install --quiet --find-links $WHEELS -c $CONSTRAINTS -e ".[$extras]"
    if [ "$name" = trainer ]; then
        # ultralytics brings the OpenCV that wants a screen; the headless one has the same modules without libGL.
        "$venv/bin/pip" uninstall --quiet -y opencv-python
        "$venv/bin/pip" install --quiet --force-reinstall --no-deps -c $CONSTRAINTS opencv-python-headless
    fi
    echo "$stamp" >"$venv/stamp"
}

PY=$(find_python)
system_packages
mkdir -p $BUILD
for name in "$@"; do
    case $name in
        device) environment device llm,rtsp,agents ;;
        trainer) environment trainer llm,rtsp,trainer,demo,dev,browser ;;
        tests) test_packages ;;
        powercut) powercut_packages ;;
        *) die "unknown environment '$name': device, trainer, tests or powercut" ;;
    esac
done
