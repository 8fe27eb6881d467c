#!/usr/bin/env bash
# Trains a prefix (P-Tuning v2) and scores base and tuned model side by side.
#     bash train.sh                                      the shipped demo, minutes on a CPU
#     MODEL=THUDM/chatglm-6b bash train.sh               the real model, with the official settings
#     LR=1e-2 bash train.sh --max_steps 10               any variable below; further flags go to main.py
#     MODEL=chatglm-6b DEVICE_MEMORY=8 bash train.sh --plan      does it fit on a card with 8 GB? Nothing is downloaded
# shellcheck source-path=SCRIPTDIR
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"

MODEL=${MODEL:-demo}                                     # demo, demo3, a folder, a short name or a hub id
TRAIN_FILE=${TRAIN_FILE:-$ROOT/AdvertiseGen/train.json}  # your rows: files with commas between them, a folder or a glob
TRAIN_DATASETS=${TRAIN_DATASETS:-}                       # a folder that common/preprocess.sh made, instead of TRAIN_FILE
if [ -n "$TRAIN_DATASETS" ]; then TRAIN_FILE=; fi
# Empty, as they are unless you set them:
#     VALIDATION_FILE    the shipped rows are judged on AdvertiseGen/dev.json, other rows on VALIDATION_SPLIT of themselves
#     PROMPT_COLUMN, RESPONSE_COLUMN, HISTORY_COLUMN, CONVERSATION_COLUMN, TEXT_COLUMN    told by the keys of the rows
#     MIX                rows of each training file for one row of the first, as in 1,0.3
#     PACKING            true: several rows in one, which none of them sees; for lengths that differ much, on a GPU
#     SHOW_ANSWERS       0: don't answer 3 validation rows before the training and at each evaluation and save
#     LOG_FORMAT         json: each log is a JSON object, for programs
#     SKIP_BAD_ROWS, STRICT_DATA    true: go on without rows that can't be read; refuse fields that are not read
add_flags TRAIN_FILE TRAIN_DATASETS VALIDATION_FILE VALIDATION_SPLIT MIX SKIP_BAD_ROWS STRICT_DATA \
    PROMPT_COLUMN RESPONSE_COLUMN HISTORY_COLUMN CONVERSATION_COLUMN TEXT_COLUMN TEXT_UNIT PACKING \
    SHOW_ANSWERS LOG_FORMAT

EPOCHS=${EPOCHS:-}                                       # passes over the rows; empty: 3 over rows of your own
MAX_STEPS=${MAX_STEPS:-}                                 # or steps; empty: DEFAULT_STEPS over the shipped rows
EVAL_STEPS=${EVAL_STEPS:-0.2}                            # steps, or a share of all, between evaluations; 0: none
BEST_METRIC=${BEST_METRIC:-}                             # loss, rouge-l or bleu-4: keeps the checkpoint that is best in it
EARLY_STOPPING=${EARLY_STOPPING:-}                       # evaluations without a better value that end the training

# QUANTIZATION_BIT: the frozen base in 4 or 8 bit; empty: not quantized.
# ROWS_PER_STEP: rows of one step on each device; of BATCH_SIZE (rows of a batch), GRAD_ACCUM (batches of a step) and
# GRADIENT_CHECKPOINTING=auto what is not set is chosen to be fast and to fit, as predicted. BATCH_SIZE=auto: the largest
# batch that fits, whatever a step is then. TOKENS_PER_BATCH: instead of a number of rows, as many of like length as have
# so many slots, pads counted. CHECK_MEMORY=false: only warn if the training does not fit.
TOKENS_PER_BATCH=${TOKENS_PER_BATCH:-}
case $MODEL in
    demo | demo3)
        [ -n "$TOKENS_PER_BATCH" ] || BATCH_SIZE=${BATCH_SIZE:-16}
        PRE_SEQ_LEN=${PRE_SEQ_LEN:-32} LR=${LR:-2e-2} DEFAULT_STEPS=${DEFAULT_STEPS:-250} LOGGING_STEPS=${LOGGING_STEPS:-25}
        GRAD_ACCUM=${GRAD_ACCUM:-1} EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-50}
        GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-false} QUANTIZATION_BIT=${QUANTIZATION_BIT-} ;;
    *)
        PRE_SEQ_LEN=${PRE_SEQ_LEN:-128} LR=${LR:-2e-2} DEFAULT_STEPS=${DEFAULT_STEPS:-3000}
        [ -n "$TOKENS_PER_BATCH" ] || ROWS_PER_STEP=${ROWS_PER_STEP:-16}
        EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-auto}
        GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-auto} QUANTIZATION_BIT=${QUANTIZATION_BIT-4}
        PROBE_FILE=${PROBE_FILE-$ROOT/common/data/probe.jsonl} ;;                # general questions: what is forgotten?
esac
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-64}               # tokens of the question
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-64}               # tokens of the answer
SAVE_STEPS=${SAVE_STEPS:-1000}
LOGGING_STEPS=${LOGGING_STEPS:-10}                       # steps between two lines of the terminal and points of the report
OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/ptuning/output/${TASK:-$(data_name)}-$(basename "$MODEL")-pt-$PRE_SEQ_LEN-$LR}

# Continues an interrupted training in OUTPUT_DIR; --overwrite_output_dir starts over.
launch "$ROOT/ptuning/main.py" \
    --do_train \
    --do_predict \
    --evaluate_base \
    "${FLAGS[@]}" \
    --model_name_or_path "$MODEL" \
    --output_dir "$OUTPUT_DIR" \
    --max_source_length "$MAX_SOURCE_LENGTH" \
    --max_target_length "$MAX_TARGET_LENGTH" \
    ${BATCH_SIZE:+--per_device_train_batch_size "$BATCH_SIZE"} \
    --per_device_eval_batch_size "$EVAL_BATCH_SIZE" \
    ${GRAD_ACCUM:+--gradient_accumulation_steps "$GRAD_ACCUM"} \
    ${ROWS_PER_STEP:+--rows_per_step "$ROWS_PER_STEP"} \
    ${TOKENS_PER_BATCH:+--tokens_per_batch "$TOKENS_PER_BATCH"} \
    --activation_checkpointing "$GRADIENT_CHECKPOINTING" \
    ${EPOCHS:+--num_train_epochs "$EPOCHS"} \
    ${MAX_STEPS:+--max_steps "$MAX_STEPS"} \
    --default_steps "$DEFAULT_STEPS" \
    --eval_strategy steps \
    --eval_steps "$EVAL_STEPS" \
    ${BEST_METRIC:+--load_best_model_at_end --metric_for_best_model "$BEST_METRIC"} \
    ${EARLY_STOPPING:+--early_stopping "$EARLY_STOPPING"} \
    --logging_steps "$LOGGING_STEPS" \
    --save_steps "$SAVE_STEPS" \
    --learning_rate "$LR" \
    --pre_seq_len "$PRE_SEQ_LEN" \
    ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
    ${PROBE_FILE:+--probe_file "$PROBE_FILE"} \
    ${CHECK_MEMORY:+--check_memory "$CHECK_MEMORY"} \
    "$@"
