#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU, without a network. Results go into DIR.
#   ci/gpu.sh [--out DIR] [--wheels DIR] [build] [test] [bench]   all three parts, or those that are named
#   ci/gpu.sh --collect DIR    on a machine with a package index: what a machine with CUDA, PyTorch and Triton still lacks
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/gpu wheels=build/wheels parts=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --wheels) wheels=$2; shift 2 ;;
        --collect)
            python3 -m pip download -q --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
                --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform any -d "$2" onnx onnx-ir ml_dtypes msgpack \
                starlette uvicorn httptools h11 click jinja2 markupsafe anyio sniffio idna pytest pytest-timeout \
                hypothesis sortedcontainers iniconfig pluggy protobuf sympy mpmath nanobind scikit-build-core pathspec
            exit ;;
        build | test | bench) parts+=("$1"); shift ;;
        *) echo "gpu: $1: wanted --out DIR, --wheels DIR, --collect DIR, build, test or bench" >&2; exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(build test bench)
command -v nvidia-smi >/dev/null || { echo "gpu: no nvidia-smi, so no NVIDIA driver: this machine cannot run it" >&2; exit 2; }
mkdir -p "$out"
venv=$PWD/build/gpu-venv

for part in "${parts[@]}"; do
    echo "gpu: $part"
    case $part in
        build)
            [ -x "$venv/bin/python" ] || python3 -m venv --system-site-packages "$venv"
            "$venv/bin/python" -m pip install -q --no-index --find-links "$wheels" --no-deps "$wheels"/*.whl
            "$venv/bin/python" -m pip install -q --no-build-isolation --no-deps -e .
            nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/machine.csv" ;;
        test)
            "$venv/bin/python" -m pytest -q -m gpu tests/gpu | tee "$out/tests.txt" ;;
        bench)
            for precision in fp8 bf16; do
                "$venv/bin/python" benchmarks/gpu.py --precision "$precision" --kv-cache-dtype "$precision" \
                    --json "$out/throughput.llama-3.1-8b.$precision.json" | tee -a "$out/table.txt"
            done ;;
    esac
done
