#!/usr/bin/env bash
# Writes a tuned model for other programs. ChatGLM2-6B and ChatGLM3-6B.
#     bash export.sh                                     the newest training, for transformers and vLLM
#     FORMAT=gguf bash export.sh                         one file for llama.cpp and Ollama
#     FORMAT=original bash export.sh                     for the code of the official repository
#     CHECKPOINT=output/mine OUTPUT_DIR=/data/exported bash export.sh
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
FORMAT=${FORMAT:-glm}                                    # glm, gguf or original
if [ "$FORMAT" = gguf ]; then EXTRA_REQUIREMENTS=requirements-export.txt; fi
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

CHECKPOINT=${CHECKPOINT-$ROOT/full/output}               # a training, or a folder of trainings: the newest one
DTYPE=${DTYPE:-float16}                                  # float16, bfloat16 or float32

NUM_MACHINES=1 NUM_PROCESSES=1 launch "$ROOT/common/export/export.py" \
    --format "$FORMAT" \
    --dtype "$DTYPE" \
    ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} \
    ${OUTPUT_DIR:+--output_dir "$OUTPUT_DIR"} \
    ${MODEL:+--model_name_or_path "$MODEL"} \
    "$@"
