#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU, without a network; ci/README.md says how, and how long.
#   ci/gpu.sh [--out DIR] [--wheels DIR] [--tune] [PART ...]   all parts in this order, or those that are named:
#     build                      the checkout, with the machine's own PyTorch and Triton; what is missing from --wheels
#     test-kernels               tests/gpu: every kernel against references at real sizes
#     test-engines test-soak     engines, graphs and ranks; a minute of random requests, then what has leaked
#     bench-kernels              limits, launches, products and attention beside torch's
#     bench-engine bench-serve   engines of random weights: steps, gaps between them; end to end over HTTP
#     tune                       with --tune or by name: tiles for plugins/attention/tuning.json and plugins/linear/tuning.json
#   ci/gpu.sh --collect DIR      on a machine with a package index: the wheels that such a machine lacks, and the commit
# Each part ends within nine minutes, keeps what it has found in DIR (build/gpu) as it goes, and hides no other's failure.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; }
fail() { echo "gpu: $*" >&2; exit 2; }

# What a machine with CUDA, PyTorch, Triton and transformers may lack, in the versions that the tests ran with. Not what
# these bring in versions of their own: numpy, tokenizers, huggingface_hub.
packages=(onnx onnx-ir ml_dtypes msgpack protobuf sympy mpmath starlette uvicorn httptools h11 click jinja2 markupsafe
    anyio sniffio idna pytest pytest-timeout hypothesis sortedcontainers iniconfig pluggy nanobind scikit-build-core pathspec)
parts_known=(build test-kernels test-engines test-soak bench-kernels bench-engine bench-serve tune)
seconds=540

collect() {
    local pinned platforms=() glibc
    mkdir -p "$1" || exit 2
    for glibc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
    platforms+=(--platform manylinux2014_x86_64 --platform any)
    # Those of .venv where it is there: another version may be another behaviour.
    mapfile -t pinned < <(.venv/bin/python ci/pinned.py "${packages[@]}" 2>/dev/null || printf '%s\n' "${packages[@]}")
    rm -f "$1"/*.whl
    "${PYTHON:-python3}" -m pip download -q --no-deps --only-binary :all: --implementation cp --python-version 3.12 \
        "${platforms[@]}" -d "$1" "${pinned[@]}" || fail "the wheels could not be collected (see above)"
    git rev-parse --short HEAD >"$1/commit.txt" 2>/dev/null || rm -f "$1/commit.txt"
    echo "gpu: $(find "$1" -name '*.whl' | wc -l) wheels in $1, $(du -sh "$1" | cut -f1)"
}

out=build/gpu wheels=build/wheels tune=0 parts=()
while [ $# -gt 0 ]; do
    case $1 in
        --out | --wheels | --collect) [ $# -ge 2 ] || fail "$1: wanted a directory behind it" ;;&
        --out) out=$2; shift 2 ;;
        --wheels) wheels=$2; shift 2 ;;
        --tune) tune=1; shift ;;
        --collect) collect "$2"; exit ;;
        -h | --help) usage; exit ;;
        -*) usage >&2; fail "$1: no such option" ;;
        *)
            [[ " ${parts_known[*]} " == *" $1 "* ]] || { usage >&2; fail "$1: no such part"; }
            parts+=("$1"); shift ;;
    esac
done
if [ ${#parts[@]} = 0 ]; then
    parts=("${parts_known[@]}")
    [ $tune = 1 ] || unset 'parts[-1]'
elif [ $tune = 1 ] && [[ " ${parts[*]} " != *" tune "* ]]; then
    parts+=(tune)
fi
command -v nvidia-smi >/dev/null || fail "no nvidia-smi, so no NVIDIA driver: this machine cannot run it"
nvidia-smi --query-gpu=name --format=csv,noheader >/dev/null || fail "nvidia-smi finds no GPU (see above)"
mkdir -p "$out" && out=$(cd "$out" && pwd) || fail "$out: cannot be written"

venv=$PWD/build/gpu-venv
python=$venv/bin/python
# Compiled kernels may be carried there, and are kept with the checkout.
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$PWD/build/cache} PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
if [ -f "$wheels/commit.txt" ]; then ENGINERY_COMMIT=$(cat "$wheels/commit.txt"); export ENGINERY_COMMIT; fi

# An environment of its own over the machine's packages. They are shown by a path in a .pth file: where python3 is itself
# of an environment, --system-site-packages would show those of another one.
build() {
    local base=${PYTHON:-python3} purelib shown
    "$base" -c 'import torch, triton, sys; sys.exit(not torch.cuda.is_available())' ||
        { echo "gpu: $base has no PyTorch that can use the GPU, or no Triton; name another: PYTHON=... ci/gpu.sh"; return 1; }
    if [ ! -x "$python" ]; then "$base" -m venv --without-pip "$venv" || return 1; fi
    purelib=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return 1
    shown=$("$base" -c 'import site, sys, sysconfig
print(*dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]), sep="\n")')
    echo "$shown" >"$purelib/machine.pth"
    if compgen -G "$wheels/*.whl" >/dev/null; then
        "$base" -m pip --python "$python" install -q --no-index --no-deps --no-compile --ignore-installed "$wheels"/*.whl || return 1
    else
        echo "gpu: no wheels in $wheels: with the machine's packages alone"
    fi
    # CMake and ninja may lie beside the machine's Python alone.
    PATH="$venv/bin:$PATH:$("$base" -c 'import os, sys; print(os.path.dirname(sys.executable))')" \
        "$base" -m pip --python "$python" install -q --no-index --no-build-isolation --no-deps -e . || return 1
    (cd "$out" && "$python" -c 'import enginery, torch, triton, numpy
from enginery.runtime import _core
print("gpu:", _core.cuda_gpu(), "torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__)')
}

# Neither the plugins nor the warnings of the machine's own packages are ours. A fault on the GPU ends the process that
# it happens in (77 or a signal): the tests that had not begun then have another one.
tests() {
    local name=$1 status=0 again; shift
    export ENGINERY_GPU_BEGUN=$out/$name.begun PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
    : >"$ENGINERY_GPU_BEGUN"
    for again in "" .2 .3 .4 .5 .6; do
        "$python" -m pytest -p pytest_timeout -m gpu -W default -ra --durations 10 --junit-xml "$out/$name$again.xml" "$@"
        case $? in
            0) return $status ;;
            5) [ -s "$ENGINERY_GPU_BEGUN" ] && return $status; return 5 ;;
            [1-4]) return 1 ;;
        esac
        status=1
    done
    return 1
}

# Each in a process of its own, for the same reason. Searches share a part's time: `tune` goes on where it was.
measure() {
    local part status=0 deadline
    for part; do
        [ "$part" = tune-attention ] && deadline=110 || deadline=340
        "$python" -m benchmarks.gpu --out "$out" --deadline "$deadline" "$part" || status=1
    done
    return $status
}

run_part() {
    case $1 in
        build) build ;;
        test-kernels) tests "$1" tests/gpu/test_kernels_*.py ;;
        test-engines) tests "$1" tests/gpu --ignore-glob '*/test_kernels_*' --ignore tests/gpu/test_soak.py ;;
        test-soak) tests "$1" tests/gpu/test_soak.py ;;
        bench-kernels) measure limits launches gemm attention ;;
        bench-engine) measure engines engine ;;
        bench-serve) measure engines serve ;;
        tune) measure tune-attention tune ;;
    esac
}

# `timeout` runs commands, and a part is a function of this script.
if [ -n "${ENGINERY_GPU_PART:-}" ]; then run_part "$ENGINERY_GPU_PART"; exit; fi

failed=()
for part in "${parts[@]}"; do
    [ "$part" = build ] || [ -x "$python" ] || fail "nothing is built here yet: ci/gpu.sh build"
    echo "gpu: $part, $(date +%T)"
    began=$SECONDS
    ENGINERY_GPU_PART=$part timeout --kill-after=10 $seconds "$BASH" "$0" --out "$out" --wheels "$wheels" 2>&1 |
        tee "$out/$part.log"
    status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failed+=("$part")
    verdict="exit code $status"
    [ "$status" != 124 ] && [ "$status" != 137 ] || verdict="stopped after $seconds seconds; what it had found is in $out"
    echo "gpu: $part: $verdict, $((SECONDS - began)) s"
    if [ "$part" = build ] && [ "$status" != 0 ]; then break; fi
done
[ ! -f "$out/results.json" ] || "$python" -m benchmarks.gpu --out "$out" table
[ ${#failed[@]} = 0 ] || { echo "gpu: failed, or must be faster: ${failed[*]}"; exit 1; }
