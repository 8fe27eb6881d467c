#!/usr/bin/env bash
# Serves a tuned model to programs that speak OpenAI's interface, and its base beside it under the name base.
#     bash serve.sh                                      the newest training, at http://127.0.0.1:8000/v1
#     HOST=0.0.0.0 API_KEY=secret bash serve.sh          reachable from other machines
#     CHECKPOINT=output/one,two=output/other bash serve.sh   several trainings of one base, under their names
#     CHECKPOINT= MODEL=demo3 bash serve.sh              a base model alone
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
EXTRA_REQUIREMENTS=requirements-web.txt
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

CHECKPOINT=${CHECKPOINT-$ROOT/lora/output}               # a training, or a folder of trainings: the newest one
HOST=${HOST:-127.0.0.1}                                  # 0.0.0.0: reachable from other machines
PORT=${PORT:-8000}                                       # the next free one if it is taken
ALLOWED_HOSTS=${ALLOWED_HOSTS:-}                         # more names that programs reach it by, as of a reverse proxy
export API_KEY=${API_KEY:-}                              # empty: requests need no key

NUM_MACHINES=1 NUM_PROCESSES=1 launch "$ROOT/common/chat/server.py" \
    --host "$HOST" \
    --port "$PORT" \
    ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} \
    ${MODEL:+--model_name_or_path "$MODEL"} \
    ${QUANTIZATION_BIT+--quantization_bit "${QUANTIZATION_BIT:-0}"} \
    ${ALLOWED_HOSTS:+--allowed_hosts "$ALLOWED_HOSTS"} \
    "$@"
