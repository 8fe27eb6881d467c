#!/usr/bin/env bash
# On a machine with a GPU: the three models at their 6.2B shapes, with random weights that are made here and never
# downloaded, trained a few steps by the real programs: measured peak memory beside the predicted, and speed.
#     bash tests/bench/gpu.sh                            about 13 GB of disk for one model at a time, in FOLDER
#     SHAPE=tiny DEVICE=cpu bash tests/bench/gpu.sh      the same with tiny models, to try it without a GPU
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch.sh"

export SHAPE=${SHAPE:-6b}                                # tiny: two layers
export DEVICE=${DEVICE:-cuda}                            # cpu
FOLDER=${FOLDER:-${TMPDIR:-/tmp}}                        # where the models are made, and deleted again
STEPS=${STEPS:-8}

VISIBLE=${CUDA_VISIBLE_DEVICES:-0}
export CUDA_VISIBLE_DEVICES=${VISIBLE%%,*}               # one GPU: its programs are started without the launcher
if [ "$DEVICE" = cpu ]; then CUDA_VISIBLE_DEVICES=; fi
"$PYTHON" "$ROOT/tests/bench/gpu.py" --folder "$FOLDER" --steps "$STEPS" "$@"
