#!/usr/bin/env bash
# Chats in the browser with a fully trained model; the answers stream.
#     bash web_demo.sh                                   what train.sh trained
#     COMPARE=true bash web_demo.sh                      with its base beside it, a second model in memory
#     CHECKPOINT= bash web_demo.sh                       the base model alone
#     HOST=0.0.0.0 PASSWORD=secret bash web_demo.sh      open to other machines, user name chatglm
# shellcheck source-path=SCRIPTDIR
EXTRA_REQUIREMENTS=requirements-web.txt
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-demo}                                     # the base; like LR it only names the folder
case $MODEL in
    demo | demo3) LR=${LR:-1e-3} ;;
    *) LR=${LR:-1e-4} ;;
esac
CHECKPOINT=${CHECKPOINT-$ROOT/full/output/adgen-$(basename "$MODEL")-full-$LR}
QUANTIZATION_BIT=${QUANTIZATION_BIT-}                    # 4, 8, or empty: 16 bit
COMPARE=${COMPARE:-false}                                # true: loads the base too, which the checkpoint names
SYSTEM_PROMPT=${SYSTEM_PROMPT:-}                         # of ChatGLM3 and GLM-4; can be changed in the page
HOST=${HOST:-127.0.0.1}                                  # 0.0.0.0: reachable from other machines
PORT=${PORT:-7860}                                       # the next free one where it is taken
export PASSWORD=${PASSWORD:-}                            # empty: no login
SHARE=${SHARE:-false}                                    # true: also a public link through Gradio's servers
need_checkpoint "bash full/train.sh" "$@"

NUM_MACHINES=1 NUM_PROCESSES=1 launch "$ROOT/common/chat/web_demo.py" \
    --model_name_or_path "${CHECKPOINT:-$MODEL}" \
    ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
    ${SYSTEM_PROMPT:+--system_prompt "$SYSTEM_PROMPT"} \
    --compare "$COMPARE" \
    --host "$HOST" \
    --port "$PORT" \
    --share "$SHARE" \
    "$@"
