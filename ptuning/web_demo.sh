#!/usr/bin/env bash
# Chats in the browser with a trained prefix, and with the base model beside it; the answers stream.
#     bash web_demo.sh                                   the demo and the prefix that train.sh trained
#     CHECKPOINT= bash web_demo.sh                       the base model alone
#     HOST=0.0.0.0 PASSWORD=secret bash web_demo.sh      open to other machines, user name chatglm
# shellcheck source-path=SCRIPTDIR
EXTRA_REQUIREMENTS=requirements-web.txt
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-demo}                                     # demo, demo3, a folder, or a hub id
case $MODEL in
    demo | demo3) PRE_SEQ_LEN=${PRE_SEQ_LEN:-32} QUANTIZATION_BIT=${QUANTIZATION_BIT-} ;;
    *) PRE_SEQ_LEN=${PRE_SEQ_LEN:-128} QUANTIZATION_BIT=${QUANTIZATION_BIT-4} ;;     # 4, 8, or empty: 16 bit
esac
LR=${LR:-2e-2}                                           # like PRE_SEQ_LEN it only names the folder
CHECKPOINT=${CHECKPOINT-$ROOT/ptuning/output/adgen-$(basename "$MODEL")-pt-$PRE_SEQ_LEN-$LR}
COMPARE=${COMPARE:-auto}                                 # false: without the base model beside it
SYSTEM_PROMPT=${SYSTEM_PROMPT:-}                         # of ChatGLM3; can be changed in the page
HOST=${HOST:-127.0.0.1}                                  # 0.0.0.0: reachable from other machines
PORT=${PORT:-7860}                                       # the next free one where it is taken
export PASSWORD=${PASSWORD:-}                            # empty: no login
SHARE=${SHARE:-false}                                    # true: also a public link through Gradio's servers
need_checkpoint "bash ptuning/train.sh" "$@"

NUM_MACHINES=1 NUM_PROCESSES=1 launch "$ROOT/common/chat/web_demo.py" \
    --model_name_or_path "$MODEL" \
    ${CHECKPOINT:+--ptuning_checkpoint "$CHECKPOINT"} \
    ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
    ${SYSTEM_PROMPT:+--system_prompt "$SYSTEM_PROMPT"} \
    --compare "$COMPARE" \
    --host "$HOST" \
    --port "$PORT" \
    --share "$SHARE" \
    "$@"
