#!/usr/bin/env bash
# Installs, from nothing but Python >= 3.11 and a C++ compiler. `make` calls it when something has changed.
#   ci/setup.sh build   .venv with the build tools, and the checkout with its compiler and demo extras, editable
#   ci/setup.sh test    and what the tests need: torch and transformers to compare with, linters, pytest
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13 python3.14; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, found $(python3 --version 2>&1). Install one, or name it: PYTHON=/path/to/python make"
}

# Debian keeps venv and Python.h in packages of their own.
missing_packages() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || echo python3-dev
    command -v "${CXX:-c++}" >/dev/null || echo g++
}

install_missing_packages() {
    local missing
    missing=$(missing_packages "$1" | tr '\n' ' ')
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "missing: $missing(as Debian calls them). Install them, for instance: sudo apt-get install $missing"
    fi
    say "installing $missing"
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends $missing; } >/dev/null
    [ -z "$(missing_packages "$1")" ] || fail "still missing: $(missing_packages "$1" | tr '\n' ' ')"
}

build() {
    if [ ! -x .venv/bin/python ]; then
        local python
        python=$(find_python)
        install_missing_packages "$python"
        say "creating .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    if [ ! -e .venv/tools ]; then
        say "installing the build tools"
        # pip 25.1 is the first that reads dependency groups.
        .venv/bin/python -m pip install -qq "pip>=25.1" "scikit-build-core>=1.1" "nanobind>=3.0,<4" "cmake>=3.24" ninja
        touch .venv/tools
    fi
    say "installing the checkout (its C++ takes minutes the first time)"
    .venv/bin/python -m pip install -qq --no-build-isolation -e ".[compiler,demo]"
    # As pip does for what is not editable: where Python may not write bytecode, every start would compile us anew.
    .venv/bin/python -m compileall -q __init__.py engines plugins compiler runtime
    touch .venv/built
}

test_tools() {
    say "installing what the tests need"
    # First, and with its version: where the index has a CPU build of this one (2.13.0+cpu), pip prefers it; the plain name
    # would bring gigabytes of CUDA libraries that no test uses.
    .venv/bin/python -m pip install -qq torch==2.13.0
    .venv/bin/python -m pip install -qq --no-build-isolation --group dev -e ".[compiler,demo,eval]"
    touch .venv/tested
}

case "${1:-}" in
    build) build ;;
    test) test_tools ;;
    *) fail "usage: ci/setup.sh build|test" ;;
esac
