#!/usr/bin/env bash
# Chats in the browser with a trained adapter, and with the base model beside it; the answers stream.
#     bash web_demo.sh                                   the demo and the adapter that train.sh trained
#     CHECKPOINT= bash web_demo.sh                       the base model alone
#     HOST=0.0.0.0 PASSWORD=secret bash web_demo.sh      open to other machines, user name chatglm
# shellcheck source-path=SCRIPTDIR
EXTRA_REQUIREMENTS=requirements-web.txt
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-demo}                                     # demo, demo3, a folder, or a hub id
case $MODEL in
    demo | demo3) LR=${LR:-5e-3} QUANTIZATION_BIT=${QUANTIZATION_BIT-} ;;
    *) LR=${LR:-5e-5} QUANTIZATION_BIT=${QUANTIZATION_BIT-4} ;;                      # 4, 8, or empty: 16 bit
esac
LORA_RANK=${LORA_RANK:-8}                                # like LR it only names the folder
CHECKPOINT=${CHECKPOINT-$ROOT/lora/output/adgen-$(basename "$MODEL")-lora-$LORA_RANK-$LR}
COMPARE=${COMPARE:-auto}                                 # false: without the base model beside it
SYSTEM_PROMPT=${SYSTEM_PROMPT:-}                         # of ChatGLM3 and GLM-4; can be changed in the page
HOST=${HOST:-127.0.0.1}                                  # 0.0.0.0: reachable from other machines
PORT=${PORT:-7860}                                       # the next free one where it is taken
export PASSWORD=${PASSWORD:-}                            # empty: no login
SHARE=${SHARE:-false}                                    # true: also a public link through Gradio's servers
need_checkpoint "bash lora/train.sh" "$@"

NUM_MACHINES=1 NUM_PROCESSES=1 launch "$ROOT/common/chat/web_demo.py" \
    --model_name_or_path "$MODEL" \
    ${CHECKPOINT:+--lora_checkpoint "$CHECKPOINT"} \
    ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
    ${SYSTEM_PROMPT:+--system_prompt "$SYSTEM_PROMPT"} \
    --compare "$COMPARE" \
    --host "$HOST" \
    --port "$PORT" \
    --share "$SHARE" \
    "$@"
