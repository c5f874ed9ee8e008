#!/usr/bin/env bash
# Checks lint, formatting and types, and says everything that is wrong. With --fix, mends what can be mended.
set -uo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
mapfile -t cpp_sources < <(find plugins runtime/csrc -name '*.cpp' -o -name '*.h')

if [ "${1:-}" = --fix ]; then
    ruff check -q --fix
    ruff format -q
    clang-format -i "${cpp_sources[@]}"
    exit
fi

# The package under its name, whatever the checkout is called (mypy_path in pyproject.toml).
mkdir -p build/house
ln -sfn ../.. build/house/enginery

failed=0
check() {
    local what=$1 output
    shift
    if output=$("$@" 2>&1); then
        echo "check: $what: ok"
    else
        echo "check: $what: failed ($1). What \`make format\` can mend, it does."
        echo "$output"
        failed=1
    fi
}
check "lint" ruff check -q
check "Python format" ruff format -q --check
check "C++ format" clang-format --dry-run -Werror "${cpp_sources[@]}"
check "types" mypy --strict -p enginery.engines -p enginery.plugins -p enginery.compiler -p enginery.runtime
exit $failed
