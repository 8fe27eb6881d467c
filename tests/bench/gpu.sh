#!/usr/bin/env bash
# Everything that only a GPU can tell, in at most MINUTES on one card with 80 GB: kernels, parity with the CPU, memory
# and speed of the 6.2B shapes with random weights, the programs on the demo. No network, and nothing is downloaded.
#     bash tests/bench/gpu.sh [WORD...]                  items whose names hold one of the words; none: all
#     SHAPE=tiny DEVICE=cpu bash tests/bench/gpu.sh      tiny models on a CPU, to see that the command works
# It takes the libraries of PYTHON, and those in WHEELS, which it installs into a temporary folder. Its first line names
# what is missing. tests/bench/RESULTS.md says which wheels a Python 3.12 with torch 2.11 and transformers needs.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

export SHAPE=${SHAPE:-6b}                                # tiny
export DEVICE=${DEVICE:-cuda}                            # cpu
export MINUTES=${MINUTES:-9}                             # items that would not fit any more are left out, by name
export OUT=${OUT:-$PWD}                                  # a file for JSON lines, as they come; or its folder
if [ -d "$OUT" ]; then OUT=$OUT/gpu.jsonl; fi
export WHEELS=${WHEELS:-}                                # a folder of wheels, of Python packages that are not there
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${PYTHON:-}" ]; then                            # the active environment, else that of the scripts
    PYTHON=python3
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$ROOT/.venv/bin/python" ]; then PYTHON=$ROOT/.venv/bin/python; fi
fi

VISIBLE=${CUDA_VISIBLE_DEVICES:-0}
export CUDA_VISIBLE_DEVICES=${VISIBLE%%,*}
if [ "$DEVICE" = cpu ]; then CUDA_VISIBLE_DEVICES=; fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
BENCH_BEGIN=$(date +%s)
export BENCH_BEGIN
if [ -n "$WHEELS" ]; then
    SITE=$(mktemp -d)
    trap 'rm -rf "$SITE"' EXIT
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl
    export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
fi
"$PYTHON" "$ROOT/tests/bench/gpu.py" "$@"
