#!/usr/bin/env bash
# Chats in the terminal with a model and a trained prefix; the answer streams.
#     bash cli_demo.sh                                   the demo and the prefix that train.sh trained
#     CHECKPOINT= bash cli_demo.sh                       the base model alone
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-demo}                                     # demo, demo3, a folder, or a hub id
case $MODEL in
    demo | demo3) PRE_SEQ_LEN=${PRE_SEQ_LEN:-32} QUANTIZATION_BIT=${QUANTIZATION_BIT-} ;;
    *) PRE_SEQ_LEN=${PRE_SEQ_LEN:-128} QUANTIZATION_BIT=${QUANTIZATION_BIT-4} ;;     # 4, 8, or empty: 16 bit
esac
LR=${LR:-2e-2}                                           # like PRE_SEQ_LEN it only names the folder
CHECKPOINT=${CHECKPOINT-$ROOT/ptuning/output/adgen-$(basename "$MODEL")-pt-$PRE_SEQ_LEN-$LR}
SYSTEM_PROMPT=${SYSTEM_PROMPT:-}                         # of ChatGLM3
need_checkpoint "bash ptuning/train.sh" "$@"

NUM_MACHINES=1 NUM_PROCESSES=1 launch "$ROOT/common/chat/cli_demo.py" \
    --model_name_or_path "$MODEL" \
    ${CHECKPOINT:+--ptuning_checkpoint "$CHECKPOINT"} \
    ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
    ${SYSTEM_PROMPT:+--system_prompt "$SYSTEM_PROMPT"} \
    "$@"
