#!/usr/bin/env bash
# Predicts how much memory a training will take, part by part, from the model's config.json alone.
#     MODEL=chatglm3-6b METHOD=lora bash common/memory.sh
#     MODEL=chatglm-6b METHOD=ptuning DEVICE_MEMORY=8 bash common/memory.sh      does it fit on a card with 8 GB?
#     DEEPSPEED=full/ds_zero_3.json NUM_GPUS=4 METHOD=full MODEL=chatglm2-6b bash common/memory.sh
# All variables and flags are those of METHOD/train.sh, with the same defaults: BATCH_SIZE, MAX_SOURCE_LENGTH,
# MAX_TARGET_LENGTH, QUANTIZATION_BIT, PRE_SEQ_LEN, LORA_RANK, LORA_TARGET, GRADIENT_CHECKPOINTING, ... Two are its own:
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

export MODEL=${MODEL:-demo}                              # demo, demo3, a folder, a hub id, or chatglm-6b, chatglm2-6b, chatglm3-6b
export METHOD=${METHOD:-lora}                            # ptuning, lora, full
export DEVICE_MEMORY=${DEVICE_MEMORY:-}                  # GB of a card that is not here; default: the visible one's
export DEVICE=${DEVICE:-gpu}                             # cpu: as it would be trained there
export DEEPSPEED=${DEEPSPEED:-}                          # a file of DeepSpeed
export NUM_GPUS=${NUM_GPUS:-1}

"$PYTHON" "$ROOT/common/memory/fit.py" "$@"
