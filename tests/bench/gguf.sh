#!/usr/bin/env bash
# A model as GGUF in the real llama.cpp beside the model here: tokens, prompts, answers, logits, and its OpenAI endpoint.
#     LLAMA_CPP=/path/of/llama.cpp bash tests/bench/gguf.sh              its source; the first run builds it (minutes)
#     LLAMA_CPP=… MODEL=/data/chatglm3-6b DTYPE=float16 bash tests/bench/gguf.sh
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
EXTRA_REQUIREMENTS=requirements-export.txt
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch.sh"

exec "$PYTHON" "$ROOT/tests/bench/gguf_check.py" \
    --llama_cpp "${LLAMA_CPP:-}" \
    --model "${MODEL:-demo3}" \
    --dtype "${DTYPE:-float32}" \
    "$@"
