#!/usr/bin/env bash
# Chats in the terminal with a fully trained model; the answer streams.
#     bash cli_demo.sh                                   what train.sh trained
#     CHECKPOINT= bash cli_demo.sh                       the base model alone
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-demo}                                     # the base; like LR it only names the folder
case $MODEL in
    demo | demo3) LR=${LR:-1e-3} ;;
    *) LR=${LR:-1e-4} ;;
esac
CHECKPOINT=${CHECKPOINT-$ROOT/full/output/adgen-$(basename "$MODEL")-full-$LR}
QUANTIZATION_BIT=${QUANTIZATION_BIT-}                    # 4, 8, or empty: 16 bit
SYSTEM_PROMPT=${SYSTEM_PROMPT:-}                         # of ChatGLM3 and GLM-4
need_checkpoint "bash full/train.sh" "$@"

NUM_MACHINES=1 NUM_PROCESSES=1 launch "$ROOT/common/chat/cli_demo.py" \
    --model_name_or_path "${CHECKPOINT:-$MODEL}" \
    ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
    ${SYSTEM_PROMPT:+--system_prompt "$SYSTEM_PROMPT"} \
    "$@"
