#!/usr/bin/env bash
# Chats in the terminal with a model and a trained adapter; the answer streams.
#     bash cli_demo.sh                                   the demo and the adapter that train.sh trained
#     CHECKPOINT= bash cli_demo.sh                       the base model alone
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-demo}                                     # demo, demo3, a folder, or a hub id
case $MODEL in
    demo | demo3) LR=${LR:-5e-3} QUANTIZATION_BIT=${QUANTIZATION_BIT-} ;;
    *) LR=${LR:-5e-5} QUANTIZATION_BIT=${QUANTIZATION_BIT-4} ;;                      # 4, 8, or empty: 16 bit
esac
LORA_RANK=${LORA_RANK:-8}                                # like LR it only names the folder
CHECKPOINT=${CHECKPOINT-$ROOT/lora/output/adgen-$(basename "$MODEL")-lora-$LORA_RANK-$LR}
SYSTEM_PROMPT=${SYSTEM_PROMPT:-}                         # of ChatGLM3 and GLM-4
need_checkpoint "bash lora/train.sh" "$@"

NUM_MACHINES=1 NUM_PROCESSES=1 launch "$ROOT/common/chat/cli_demo.py" \
    --model_name_or_path "$MODEL" \
    ${CHECKPOINT:+--lora_checkpoint "$CHECKPOINT"} \
    ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
    ${SYSTEM_PROMPT:+--system_prompt "$SYSTEM_PROMPT"} \
    "$@"
