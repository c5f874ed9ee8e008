#!/usr/bin/env bash
# Runs the tests that run C++ against extensions built with sanitizers, in which every step begins with garbage in the
# memory that it must write before it reads (runtime/csrc/poison.h).
#   ci/sanitize.sh [TEST ...]          AddressSanitizer and UndefinedBehaviorSanitizer; tests/plugins and tests/runtime
#   ci/sanitize.sh thread [TEST ...]   ThreadSanitizer; the tests that use threads
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
mode=address sanitizers=address,undefined libraries="libasan.so libubsan.so"
if [ "${1:-}" = thread ]; then
    mode=thread sanitizers=thread libraries=libtsan.so
    shift
fi
venv=$root/build/sanitize/$mode/venv

# A second environment, in which the checkout is installed with sanitizers. Everything else is .venv's: a path in a .pth
# file shows its packages, but not the checkout as .venv has it installed.
if [ ! -x "$venv/bin/python" ]; then
    .venv/bin/python -m venv --without-pip "$venv"
    packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    .venv/bin/python -c "$packages" >"$("$venv/bin/python" -c "$packages")/tools.pth"
fi
echo "sanitize $mode: building (minutes the first time)"
# With debug information, or reports name no lines.
PATH="$root/.venv/bin:$PATH" .venv/bin/python -m pip --python "$venv/bin/python" install -qq --no-build-isolation --no-deps \
    -e . -C cmake.define.ENGINERY_SANITIZE=$sanitizers -C cmake.build-type=RelWithDebInfo -C install.strip=false \
    -C build-dir=build/sanitize/$mode/cmake

compiler=${CXX:-c++}
# Python itself is not sanitized, so the runtimes must be there first; libstdc++ with them, or they cannot see exceptions.
preload=
for library in $libraries libstdc++.so; do preload+="$("$compiler" -print-file-name=$library) "; done
run=(env "LD_PRELOAD=$preload")
case $mode in
    address)
        # Python never frees its interned objects.
        run+=(ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1)
        # Not what a precision costs: the same kernels over 60,000 tokens, which takes a quarter of an hour here.
        tests=(tests/plugins tests/runtime --ignore=tests/runtime/test_quality.py)
        ;;
    thread)
        # The sanitizer does not see how the threads of NumPy's and torch's libraries wait for each other.
        run+=(TSAN_OPTIONS=halt_on_error=1 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1)
        # Its memory has places of its own, which a randomized layout may have taken; containers may forbid to choose.
        if setarch -R true 2>/dev/null; then run=(setarch -R "${run[@]}"); fi
        runtime=(cpu_executor loop engine_api pump architectures)
        tests=("${runtime[@]/#/tests/runtime/test_}")
        tests=("${tests[@]/%/.py}" -k "not transformers and not narrow")
        ;;
esac
if [ $# = 0 ]; then set -- "${tests[@]}"; fi
# Not captured by file descriptor: a report is written when the process is about to end.
exec "${run[@]}" "$venv/bin/python" -m pytest -q --capture=sys "$@"
