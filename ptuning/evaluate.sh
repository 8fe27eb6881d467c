#!/usr/bin/env bash
# Answers every row of a file with a trained prefix and scores the answers: generated_predictions.txt, ROUGE, BLEU-4.
#     bash evaluate.sh                                   what train.sh trained last with the same variables
#     CHECKPOINT=output/mine/checkpoint-3000 bash evaluate.sh
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-demo}                                     # the base that the prefix was trained on
TEST_FILE=${TEST_FILE:-${VALIDATION_FILE:-$ROOT/AdvertiseGen/dev.json}}
PROMPT_COLUMN=${PROMPT_COLUMN:-content}
RESPONSE_COLUMN=${RESPONSE_COLUMN:-summary}
HISTORY_COLUMN=${HISTORY_COLUMN:-}                       # set where the file holds earlier rounds
CONVERSATION_COLUMN=${CONVERSATION_COLUMN:-}             # set where it holds whole conversations, instead of the three

case $MODEL in
    demo | demo3) PRE_SEQ_LEN=${PRE_SEQ_LEN:-32} QUANTIZATION_BIT=${QUANTIZATION_BIT-} ;;
    *) PRE_SEQ_LEN=${PRE_SEQ_LEN:-128} QUANTIZATION_BIT=${QUANTIZATION_BIT-4} ;;     # 4, 8, or empty: 16 bit
esac
LR=${LR:-2e-2}                                           # like PRE_SEQ_LEN it only names the folder:
                                                         # what a prefix is stands in its checkpoint
CHECKPOINT=${CHECKPOINT:-$ROOT/ptuning/output/adgen-$(basename "$MODEL")-pt-$PRE_SEQ_LEN-$LR}
OUTPUT_DIR=${OUTPUT_DIR:-$CHECKPOINT}
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-64}
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-64}
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-8}

launch "$ROOT/ptuning/main.py" \
    --do_predict \
    --test_file "$TEST_FILE" \
    --prompt_column "$PROMPT_COLUMN" \
    --response_column "$RESPONSE_COLUMN" \
    ${HISTORY_COLUMN:+--history_column "$HISTORY_COLUMN"} \
    ${CONVERSATION_COLUMN:+--conversation_column "$CONVERSATION_COLUMN"} \
    --model_name_or_path "$MODEL" \
    --ptuning_checkpoint "$CHECKPOINT" \
    --output_dir "$OUTPUT_DIR" \
    --max_source_length "$MAX_SOURCE_LENGTH" \
    --max_target_length "$MAX_TARGET_LENGTH" \
    --per_device_eval_batch_size "$EVAL_BATCH_SIZE" \
    ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
    "$@"
