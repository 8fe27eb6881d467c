#!/usr/bin/env bash
# Downloads models, resumes interrupted downloads, and verifies every file. The last line on stdout is the folder.
#     bash common/download.sh chatglm3-6b                a short name; any hub id works too
#     HUB=modelscope bash common/download.sh chatglm-6b chatglm2-6b
#     MODEL=$(bash common/download.sh chatglm3-6b --local_dir /data/chatglm3-6b) bash lora/train.sh
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

exec "$PYTHON" "$ROOT/common/hub/download.py" "$@"
