#!/usr/bin/env bash
# Trains a LoRA adapter and scores base and tuned model side by side.
#     bash train.sh                                      the shipped demo, minutes on a CPU
#     MODEL=THUDM/chatglm3-6b bash train.sh              the real model in 4 bit, with the settings of ChatGLM3
#     LR=1e-4 bash train.sh --max_steps 10               any variable below; further flags go to main.py
#     MODEL=chatglm3-6b DEVICE_MEMORY=8 bash train.sh --plan     does it fit on a card with 8 GB? Nothing is downloaded
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-demo}                                     # demo, demo3, a folder, a short name or a hub id
TRAIN_FILE=${TRAIN_FILE:-$ROOT/AdvertiseGen/train.json}
TRAIN_DATASETS=${TRAIN_DATASETS:-}                       # a folder that common/preprocess.sh made, instead of TRAIN_FILE
if [ -n "$TRAIN_DATASETS" ]; then TRAIN_FILE=; fi
VALIDATION_FILE=${VALIDATION_FILE:-$ROOT/AdvertiseGen/dev.json}
PROMPT_COLUMN=${PROMPT_COLUMN:-content}
RESPONSE_COLUMN=${RESPONSE_COLUMN:-summary}
HISTORY_COLUMN=${HISTORY_COLUMN:-}                       # set if the files hold earlier rounds
CONVERSATION_COLUMN=${CONVERSATION_COLUMN:-}             # set if they hold whole conversations, instead of these three

LORA_RANK=${LORA_RANK:-8}
LORA_ALPHA=${LORA_ALPHA:-32}                             # the adapter is scaled by alpha / rank
LORA_DROPOUT=${LORA_DROPOUT:-0.1}
LORA_TARGET=${LORA_TARGET:-}                             # names with commas, or all-linear; empty: the attention's layers

# QUANTIZATION_BIT: the frozen base in 4 or 8 bit; empty: not quantized.
# BATCH_SIZE=auto: the largest batch that fits, as predicted. CHECK_MEMORY=false: only warn if the training does not fit.
case $MODEL in
    demo | demo3)
        LR=${LR:-5e-3} MAX_STEPS=${MAX_STEPS:-250}
        BATCH_SIZE=${BATCH_SIZE:-16} GRAD_ACCUM=${GRAD_ACCUM:-1} EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-50}
        MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-64} MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-64}
        GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-false} QUANTIZATION_BIT=${QUANTIZATION_BIT-} ;;
    *)
        LR=${LR:-5e-5} MAX_STEPS=${MAX_STEPS:-3000}
        BATCH_SIZE=${BATCH_SIZE:-4} GRAD_ACCUM=${GRAD_ACCUM:-1} EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-8}
        MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-256} MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-512}
        GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-true} QUANTIZATION_BIT=${QUANTIZATION_BIT-4} ;;
esac
SAVE_STEPS=${SAVE_STEPS:-500}
OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/lora/output/${TASK:-adgen}-$(basename "$MODEL")-lora-$LORA_RANK-$LR}

# Continues an interrupted training in OUTPUT_DIR; --overwrite_output_dir starts over.
launch "$ROOT/lora/main.py" \
    --do_train \
    --do_predict \
    --evaluate_base \
    ${TRAIN_FILE:+--train_file "$TRAIN_FILE"} \
    ${TRAIN_DATASETS:+--train_datasets "$TRAIN_DATASETS"} \
    --test_file "$VALIDATION_FILE" \
    --prompt_column "$PROMPT_COLUMN" \
    --response_column "$RESPONSE_COLUMN" \
    ${HISTORY_COLUMN:+--history_column "$HISTORY_COLUMN"} \
    ${CONVERSATION_COLUMN:+--conversation_column "$CONVERSATION_COLUMN"} \
    --model_name_or_path "$MODEL" \
    --output_dir "$OUTPUT_DIR" \
    --max_source_length "$MAX_SOURCE_LENGTH" \
    --max_target_length "$MAX_TARGET_LENGTH" \
    --per_device_train_batch_size "$BATCH_SIZE" \
    --per_device_eval_batch_size "$EVAL_BATCH_SIZE" \
    --gradient_accumulation_steps "$GRAD_ACCUM" \
    --activation_checkpointing "$GRADIENT_CHECKPOINTING" \
    --max_steps "$MAX_STEPS" \
    --logging_steps 10 \
    --save_steps "$SAVE_STEPS" \
    --learning_rate "$LR" \
    --lora_rank "$LORA_RANK" \
    --lora_alpha "$LORA_ALPHA" \
    --lora_dropout "$LORA_DROPOUT" \
    ${LORA_TARGET:+--lora_target "$LORA_TARGET"} \
    ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
    ${CHECK_MEMORY:+--check_memory "$CHECK_MEMORY"} \
    "$@"
