#!/usr/bin/env bash
# A model as GGUF in the real llama.cpp beside the model here: tokens, prompts, answers, logits, and its OpenAI endpoint.
#     LLAMA_CPP=/path/of/llama.cpp bash tests/bench/gguf.sh              its source; the first run builds it (minutes)
#     LLAMA_CPP=… MODEL=/data/chatglm3-6b DTYPE=float16 bash tests/bench/gguf.sh
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
EXTRA_REQUIREMENTS=requirements-export.txt
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch.sh"

MODEL=${MODEL:-demo3}
DTYPE=${DTYPE:-float32}
: "${LLAMA_CPP:?the folder with the source of llama.cpp}"
BUILD=${BUILD:-$LLAMA_CPP/build}

if [ ! -x "$BUILD/bin/llama-server" ]; then
    cmake -S "$LLAMA_CPP" -B "$BUILD" -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF
    cmake --build "$BUILD" -j "$(nproc)" --target llama-server
fi
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
CHECKPOINT='' MODEL=$MODEL FORMAT=gguf DTYPE=$DTYPE OUTPUT_DIR=$WORK/gguf bash "$ROOT/full/export.sh"
"$PYTHON" "$ROOT/tests/bench/gguf_check.py" "$BUILD/bin/llama-server" "$WORK/gguf/model.gguf" "$MODEL" "$@"
