#!/usr/bin/env bash
# Adds a trained adapter into its base: a full checkpoint in the original format, which loads without PEFT.
#     bash merge.sh                                      what train.sh trained last with the same variables
#     CHECKPOINT=output/mine/checkpoint-3000 OUTPUT_DIR=/data/merged bash merge.sh
#     MODEL=/new/place/of/chatglm3-6b CHECKPOINT=... bash merge.sh       where the base has moved
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-}                                         # empty: the base that the adapter names
case ${MODEL:-demo} in
    demo | demo3) LR=${LR:-5e-3} ;;
    *) LR=${LR:-5e-5} ;;
esac
LORA_RANK=${LORA_RANK:-8}                                # like LR it only names the folder
CHECKPOINT=${CHECKPOINT:-$ROOT/lora/output/adgen-$(basename "${MODEL:-demo}")-lora-$LORA_RANK-$LR}
OUTPUT_DIR=${OUTPUT_DIR:-$CHECKPOINT/merged}

NUM_MACHINES=1 NUM_PROCESSES=1 launch "$ROOT/common/merge.py" \
    --lora_checkpoint "$CHECKPOINT" \
    --output_dir "$OUTPUT_DIR" \
    ${MODEL:+--model_name_or_path "$MODEL"} \
    "$@"
