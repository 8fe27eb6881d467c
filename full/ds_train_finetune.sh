#!/usr/bin/env bash
# train.sh under DeepSpeed, on all GPUs that are visible (NUM_GPUS limits them), or on all cores of a CPU.
#     MODEL=THUDM/chatglm-6b bash ds_train_finetune.sh
#     DEEPSPEED=full/ds_zero_3_offload.json NUM_GPUS=4 bash ds_train_finetune.sh
#     NUM_MACHINES=2 MACHINE_RANK=0 MAIN_IP=10.0.0.1 bash ds_train_finetune.sh      and the same with rank 1 on the other
# ds_zero_2.json shards gradients and optimizer, ds_zero_3.json the weights too; ds_zero_3_offload.json shards the same and
# keeps weights and optimizer in the host's memory. The official deepspeed.json works unchanged, and so does your own file.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
FULL=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec bash "$FULL/train.sh" --deepspeed "${DEEPSPEED:-$FULL/ds_zero_2.json}" "$@"
