#!/usr/bin/env bash
# Trains a prefix on conversations: rows with a question, an answer and the rounds before them.
#     bash train_chat.sh                                 the shipped demo on the shipped conversations
#     MODEL=THUDM/chatglm-6b TRAIN_FILE=chat.json VALIDATION_FILE=chat_dev.json bash train_chat.sh
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-demo}
TRAIN_FILE=${TRAIN_FILE:-$ROOT/AdvertiseGen/train_chat.json}
VALIDATION_FILE=${VALIDATION_FILE:-$ROOT/AdvertiseGen/dev_chat.json}
PROMPT_COLUMN=${PROMPT_COLUMN:-prompt}
RESPONSE_COLUMN=${RESPONSE_COLUMN:-response}
HISTORY_COLUMN=${HISTORY_COLUMN:-history}                # [[question, answer], ...]

if [ "$MODEL" = demo ]; then
    PRE_SEQ_LEN=${PRE_SEQ_LEN:-32} LR=${LR:-2e-2} MAX_STEPS=${MAX_STEPS:-150}
    BATCH_SIZE=${BATCH_SIZE:-16} GRAD_ACCUM=${GRAD_ACCUM:-1} EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-50}
    GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-false} QUANTIZATION_BIT=${QUANTIZATION_BIT-}
else
    PRE_SEQ_LEN=${PRE_SEQ_LEN:-128} LR=${LR:-1e-2} MAX_STEPS=${MAX_STEPS:-3000}
    BATCH_SIZE=${BATCH_SIZE:-1} GRAD_ACCUM=${GRAD_ACCUM:-16} EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-16}
    GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-true} QUANTIZATION_BIT=${QUANTIZATION_BIT-4}
fi
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-256}
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-256}
SAVE_STEPS=${SAVE_STEPS:-1000}
OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/ptuning/output/chat-$(basename "$MODEL")-pt-$PRE_SEQ_LEN-$LR}

launch "$ROOT/ptuning/main.py" \
    --do_train \
    --do_predict \
    --evaluate_base \
    --train_file "$TRAIN_FILE" \
    --test_file "$VALIDATION_FILE" \
    --prompt_column "$PROMPT_COLUMN" \
    --response_column "$RESPONSE_COLUMN" \
    --history_column "$HISTORY_COLUMN" \
    --model_name_or_path "$MODEL" \
    --output_dir "$OUTPUT_DIR" \
    --max_source_length "$MAX_SOURCE_LENGTH" \
    --max_target_length "$MAX_TARGET_LENGTH" \
    --per_device_train_batch_size "$BATCH_SIZE" \
    --per_device_eval_batch_size "$EVAL_BATCH_SIZE" \
    --gradient_accumulation_steps "$GRAD_ACCUM" \
    --gradient_checkpointing "$GRADIENT_CHECKPOINTING" \
    --max_steps "$MAX_STEPS" \
    --logging_steps 10 \
    --save_steps "$SAVE_STEPS" \
    --learning_rate "$LR" \
    --pre_seq_len "$PRE_SEQ_LEN" \
    ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
    "$@"
