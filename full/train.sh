#!/usr/bin/env bash
# Trains every weight of a model, then scores base and tuned model side by side.
#     bash train.sh                                      the shipped demo, minutes on a CPU
#     MODEL=THUDM/chatglm3-6b bash ds_train_finetune.sh  a real model needs several GPUs and an engine that shards it:
#                                                        ds_train_finetune.sh (DeepSpeed), fsdp_train_finetune.sh (FSDP2)
#     LR=1e-5 bash train.sh --max_steps 10               any variable below; further flags go to main.py
#     MODEL=chatglm2-6b DEVICE_MEMORY=80 NUM_GPUS=8 bash ds_train_finetune.sh --plan     does it fit? Nothing is downloaded
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

PRECISION=${PRECISION:-auto}                             # bf16, fp16, fp32; auto: half on a GPU, fp32 on a CPU
SAVE_FORMAT=${SAVE_FORMAT:-safetensors}                  # bin: the format that the original code reads
QUANTIZATION_BIT=${QUANTIZATION_BIT:-}                   # refused with a message: quantized weights can't be trained
# ROWS_PER_STEP: rows of one step on each device; of BATCH_SIZE (rows of a batch), GRAD_ACCUM (batches of a step) and
# GRADIENT_CHECKPOINTING=auto what is not set is chosen to be fast and to fit, as predicted. BATCH_SIZE=auto: the largest
# batch that fits, whatever a step is then. TOKENS_PER_BATCH: instead of a number of rows, as many of like length as have
# so many slots, pads counted. CHECK_MEMORY=false: only warn if the training does not fit.
TOKENS_PER_BATCH=${TOKENS_PER_BATCH:-}
case $MODEL in
    demo | demo3)
        [ -n "$TOKENS_PER_BATCH" ] || BATCH_SIZE=${BATCH_SIZE:-16}
        LR=${LR:-1e-3} DEFAULT_STEPS=${DEFAULT_STEPS:-250} LOGGING_STEPS=${LOGGING_STEPS:-25}
        GRAD_ACCUM=${GRAD_ACCUM:-1}
        GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-false} EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-16} ;;
    *)
        LR=${LR:-1e-4} DEFAULT_STEPS=${DEFAULT_STEPS:-5000}
        [ -n "$TOKENS_PER_BATCH" ] || ROWS_PER_STEP=${ROWS_PER_STEP:-4}
        GRADIENT_CHECKPOINTING=${GRADIENT_CHECKPOINTING:-auto}
        PROBE_FILE=${PROBE_FILE-$ROOT/common/data/probe.jsonl} ;;                # general questions: what is forgotten?
esac
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-64}
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-64}
SAVE_STEPS=${SAVE_STEPS:-1000}
LOGGING_STEPS=${LOGGING_STEPS:-10}                       # steps between two lines of the terminal and points of the report
SAVE_TOTAL_LIMIT=${SAVE_TOTAL_LIMIT:-2}                  # checkpoints to keep; one of a 6B model takes 25 to 100 GB
OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/full/output/${TASK:-$(data_name)}-$(basename "$MODEL")-full-$LR}
EVALUATE=${EVALUATE:-true}                               # false: score no answers afterwards

case " $* " in
    *" --output_dir"*) echo "error: set OUTPUT_DIR=... for the training and its evaluation, not --output_dir." >&2; exit 2 ;;
    *" --plan "* | *" --dry_run "* | *" --help "*) EVALUATE=false ;;
esac

# Rows of your own without validation rows leave nothing to score.
if [ "$TRAIN_FILE" != "$ROOT/AdvertiseGen/train.json" ] && [ "${VALIDATION_SPLIT:-}${VALIDATION_FILE:-}" = 0 ]; then
    EVALUATE=false
fi

# What follows the training: the saved model is scored; of several machines only the first does that.
THEN=()
if [ "$EVALUATE" = true ] && [ "${MACHINE_RANK:-${SLURM_NODEID:-0}}" = 0 ]; then
    THEN=(--then env CHECKPOINT="$OUTPUT_DIR" NUM_MACHINES=1 EVAL_BATCH_SIZE="${EVAL_BATCH_SIZE:-auto}"
        bash "$ROOT/full/evaluate_finetune.sh" --evaluate_base)
fi

# Continues an interrupted training in OUTPUT_DIR; --overwrite_output_dir starts over.
launch "$ROOT/full/main.py" \
    --do_train \
    --do_eval "$EVALUATE" \
    "${FLAGS[@]}" \
    --model_name_or_path "$MODEL" \
    --output_dir "$OUTPUT_DIR" \
    --max_source_length "$MAX_SOURCE_LENGTH" \
    --max_target_length "$MAX_TARGET_LENGTH" \
    ${BATCH_SIZE:+--per_device_train_batch_size "$BATCH_SIZE"} \
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
    --save_total_limit "$SAVE_TOTAL_LIMIT" \
    --save_format "$SAVE_FORMAT" \
    --learning_rate "$LR" \
    --precision "$PRECISION" \
    ${QUANTIZATION_BIT:+--quantization_bit "$QUANTIZATION_BIT"} \
    ${PROBE_FILE:+--probe_file "$PROBE_FILE"} \
    ${CHECK_MEMORY:+--check_memory "$CHECK_MEMORY"} \
    "$@" "${THEN[@]}"
