#!/usr/bin/env bash
# Answers every row of a file with a fully trained model and scores the answers: generated_predictions.txt, ROUGE, BLEU-4.
#     bash evaluate_finetune.sh                          what train.sh trained last with the same variables
#     CHECKPOINT=output/mine/checkpoint-3000 bash evaluate_finetune.sh --evaluate_base
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-demo}                                     # like LR it only names the folder
TEST_FILE=${TEST_FILE:-${VALIDATION_FILE:-$ROOT/AdvertiseGen/dev.json}}
PROMPT_COLUMN=${PROMPT_COLUMN:-content}
RESPONSE_COLUMN=${RESPONSE_COLUMN:-summary}
HISTORY_COLUMN=${HISTORY_COLUMN:-}                       # set where the file holds earlier rounds
CONVERSATION_COLUMN=${CONVERSATION_COLUMN:-}             # set where it holds whole conversations, instead of the three
case $MODEL in
    demo | demo3) LR=${LR:-1e-3} ;;
    *) LR=${LR:-1e-4} ;;
esac
CHECKPOINT=${CHECKPOINT:-$ROOT/full/output/adgen-$(basename "$MODEL")-full-$LR}
OUTPUT_DIR=${OUTPUT_DIR:-$CHECKPOINT}
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-64}
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-64}
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-16}
QUANTIZATION_BIT=${QUANTIZATION_BIT:-}                   # 4, 8, or empty: 16 bit

launch "$ROOT/full/main.py" \
    --do_predict \
    --test_file "$TEST_FILE" \
    --prompt_column "$PROMPT_COLUMN" \
    --response_column "$RESPONSE_COLUMN" \
    ${HISTORY_COLUMN:+--history_column "$HISTORY_COLUMN"} \
    ${CONVERSATION_COLUMN:+--conversation_column "$CONVERSATION_COLUMN"} \
    --model_name_or_path "$CHECKPOINT" \
    --output_dir "$OUTPUT_DIR" \
    --max_source_length "$MAX_SOURCE_LENGTH" \
    --max_target_length "$MAX_TARGET_LENGTH" \
    --per_device_eval_batch_size "$EVAL_BATCH_SIZE" \
    ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
    "$@"
