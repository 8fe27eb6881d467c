#!/usr/bin/env bash
# Trains an adapter on plain text, as a causal language model, and reports loss and perplexity before and after.
#     bash train_text.sh                                 the shipped demo on the advertisements as plain text
#     MODEL=THUDM/chatglm3-6b TRAIN_FILE='corpus/*.json' VALIDATION_FILE=dev.csv TEXT_COLUMN=text bash train_text.sh
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-demo}                                     # demo, demo3, a folder, or a hub id
TRAIN_FILE=${TRAIN_FILE:-$ROOT/AdvertiseGen/train.json}  # JSON, JSON lines or CSV; files by commas, or a glob
TRAIN_DATASETS=${TRAIN_DATASETS:-}                       # a folder of common/preprocess.sh, instead of TRAIN_FILE
if [ -n "$TRAIN_DATASETS" ]; then TRAIN_FILE=; fi
VALIDATION_FILE=${VALIDATION_FILE:-$ROOT/AdvertiseGen/dev.json}
TEXT_COLUMN=${TEXT_COLUMN:-summary}

LORA_RANK=${LORA_RANK:-8}
LORA_ALPHA=${LORA_ALPHA:-32}                             # the adapter is scaled by alpha / rank
LORA_DROPOUT=${LORA_DROPOUT:-0.1}
LORA_TARGET=${LORA_TARGET:-}                             # layers by commas, or all-linear; empty: the attention's
# QUANTIZATION_BIT: the frozen base in 4 or 8 bit; empty: not quantized.
# BATCH_SIZE=auto: the largest that memory is predicted to hold. CHECK_MEMORY=false: start what is predicted not to fit.
case $MODEL in
    demo | demo3)
        LR=${LR:-5e-3} MAX_STEPS=${MAX_STEPS:-250}
        BATCH_SIZE=${BATCH_SIZE:-16} GRAD_ACCUM=${GRAD_ACCUM:-1} EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-50}
        BLOCK_SIZE=${BLOCK_SIZE:-128} GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-false}
        QUANTIZATION_BIT=${QUANTIZATION_BIT-} ;;
    *)
        LR=${LR:-5e-5} MAX_STEPS=${MAX_STEPS:-3000}
        BATCH_SIZE=${BATCH_SIZE:-4} GRAD_ACCUM=${GRAD_ACCUM:-1} EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-4}
        BLOCK_SIZE=${BLOCK_SIZE:-1024} GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-true}
        QUANTIZATION_BIT=${QUANTIZATION_BIT-4} ;;
esac
SAVE_STEPS=${SAVE_STEPS:-500}
OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/lora/output/text-$(basename "$MODEL")-lora-$LORA_RANK-$LR}

# An interrupted training in OUTPUT_DIR is continued; --overwrite_output_dir starts over.
launch "$ROOT/lora/main.py" \
    --do_train \
    --do_eval \
    --evaluate_base \
    ${TRAIN_FILE:+--train_file "$TRAIN_FILE"} \
    ${TRAIN_DATASETS:+--train_datasets "$TRAIN_DATASETS"} \
    --validation_file "$VALIDATION_FILE" \
    --text_column "$TEXT_COLUMN" \
    --model_name_or_path "$MODEL" \
    --output_dir "$OUTPUT_DIR" \
    --max_source_length "$BLOCK_SIZE" \
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
