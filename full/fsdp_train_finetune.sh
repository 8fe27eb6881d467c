#!/usr/bin/env bash
# train.sh under FSDP2, with which PyTorch shards weights, gradients and optimizer over all visible GPUs.
#     MODEL=THUDM/chatglm3-6b bash fsdp_train_finetune.sh
#     NUM_MACHINES=2 MACHINE_RANK=0 MAIN_IP=10.0.0.1 bash fsdp_train_finetune.sh    and the same with rank 1 on the other
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
FULL=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec bash "$FULL/train.sh" --fsdp true --fsdp_config "${FSDP_CONFIG:-$FULL/fsdp2.json}" "$@"
