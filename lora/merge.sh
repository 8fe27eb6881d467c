#!/usr/bin/env bash
# Merges a trained adapter into its base: writes a full checkpoint in the original format, which loads without PEFT.
#     bash merge.sh                                      the newest training
#     CHECKPOINT=output/mine/checkpoint-3000 OUTPUT_DIR=/data/merged bash merge.sh
#     MODEL=/new/place/of/chatglm3-6b bash merge.sh      the base has moved
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

CHECKPOINT=${CHECKPOINT:-$ROOT/lora/output}              # a training, or a folder of trainings: the newest one

NUM_MACHINES=1 NUM_PROCESSES=1 launch "$ROOT/common/merge.py" \
    --lora_checkpoint "$CHECKPOINT" \
    ${OUTPUT_DIR:+--output_dir "$OUTPUT_DIR"} \
    ${MODEL:+--model_name_or_path "$MODEL"} \
    "$@"
