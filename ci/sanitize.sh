#!/usr/bin/env bash
# Runs the tests that run C++ against extensions built with AddressSanitizer and UndefinedBehaviorSanitizer.
#   ci/sanitize.sh [TEST ...]   tests/plugins and tests/runtime, unless others are named
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
venv=$root/build/sanitize/venv

# A second environment, in which the checkout is installed with sanitizers. Everything else is .venv's: a path in a .pth
# file shows its packages, but not the checkout as .venv has it installed.
if [ ! -x "$venv/bin/python" ]; then
    .venv/bin/python -m venv --without-pip "$venv"
    packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    .venv/bin/python -c "$packages" >"$("$venv/bin/python" -c "$packages")/tools.pth"
fi
echo "sanitize: building (minutes the first time)"
PATH="$root/.venv/bin:$PATH" .venv/bin/python -m pip --python "$venv/bin/python" install -qq --no-build-isolation --no-deps \
    -e . -C cmake.define.ENGINERY_SANITIZE=ON -C build-dir=build/sanitize/cmake

compiler=${CXX:-c++}
# Python itself is not sanitized, so the runtimes must be there first; libstdc++ with them, or they cannot see exceptions.
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so) $("$compiler" -print-file-name=libstdc++.so)"
# Python never frees its interned objects.
export ASAN_OPTIONS=detect_leaks=0
export UBSAN_OPTIONS=print_stacktrace=1
if [ $# = 0 ]; then set -- tests/plugins tests/runtime; fi
# Not captured by file descriptor: a report is written when the process is about to end.
exec "$venv/bin/python" -m pytest -q --capture=sys "$@"
