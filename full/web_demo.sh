#!/usr/bin/env bash
# Chats in the browser with a fully trained model; the answers stream.
#     bash web_demo.sh                                   the newest training
#     CHECKPOINT= MODEL=demo3 bash web_demo.sh           a base model alone
#     HOST=0.0.0.0 PASSWORD=secret bash web_demo.sh      open to other machines, user name chatglm
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
EXTRA_REQUIREMENTS=requirements-web.txt
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

CHECKPOINT=${CHECKPOINT-$ROOT/full/output}               # a training, or a folder of trainings: the newest one
COMPARE=${COMPARE:-false}                                # true: loads the base too, a second model in memory
SYSTEM_PROMPT=${SYSTEM_PROMPT:-}                         # for ChatGLM3 and GLM-4; can be changed in the page
HOST=${HOST:-127.0.0.1}                                  # 0.0.0.0: reachable from other machines
PORT=${PORT:-7860}                                       # the next free one if it is taken
ALLOWED_HOSTS=${ALLOWED_HOSTS:-}                         # more names that visitors reach it by, as of a reverse proxy
export PASSWORD=${PASSWORD:-}                            # empty: no login
SHARE=${SHARE:-false}                                    # true: also a public link through Gradio's servers

NUM_MACHINES=1 NUM_PROCESSES=1 launch "$ROOT/common/chat/web_demo.py" \
    ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} \
    ${MODEL:+--model_name_or_path "$MODEL"} \
    ${QUANTIZATION_BIT+--quantization_bit "${QUANTIZATION_BIT:-0}"} \
    ${SYSTEM_PROMPT:+--system_prompt "$SYSTEM_PROMPT"} \
    --compare "$COMPARE" \
    --host "$HOST" \
    --port "$PORT" \
    ${ALLOWED_HOSTS:+--allowed_hosts "$ALLOWED_HOSTS"} \
    --share "$SHARE" \
    "$@"
