#!/usr/bin/env bash
# The CUDA build of PyTorch on a machine without a usable GPU, which is what pip installs for most users: every script of
# the README on a demo for two steps. Prints a table: exit code, seconds, command, last line. Fails if a code is not the
# expected one. Not a part of the tests: the environment takes 2.7 GB to download and 6 GB of disk.
#     bash tests/bench/cuda_wheel.sh
#     FOLDER=/data/wheel TORCH=2.14.1 bash tests/bench/cuda_wheel.sh       keeps the environment, with another version
#     ONLY=fsdp FOLDER=/data/wheel bash tests/bench/cuda_wheel.sh          commands with this in their names
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$ROOT"

TORCH=${TORCH:-$(sed -n 's/^torch==//p' requirements.txt)}
ONLY=${ONLY:-}
LIMIT=${LIMIT:-900}                                      # seconds that a command may take
if [ -z "${FOLDER:-}" ]; then
    FOLDER=$(mktemp -d)
    trap 'rm -rf "$FOLDER"' EXIT
fi
WORK=$FOLDER/work
if [ -z "$ONLY" ]; then rm -rf "$WORK"; fi               # of an earlier run
mkdir -p "$WORK"

if [ ! -x "$FOLDER/bin/python" ]; then python3 -m venv "$FOLDER"; fi
sed "s/^torch==.*/torch==$TORCH/" requirements.txt requirements-web.txt > "$WORK/requirements.txt"
"$FOLDER/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$WORK/requirements.txt"
export VIRTUAL_ENV=$FOLDER PATH=$FOLDER/bin:$PATH CHATGLM_CACHE=$WORK/cache HF_HUB_OFFLINE=1
python -c 'import torch; print("PyTorch", torch.__version__, "CUDA", torch.version.cuda, "usable:", torch.cuda.is_available())'
python -c 'import torch; raise SystemExit(torch.version.cuda is None)' || {
    echo "error: pip took a PyTorch without CUDA; TORCH=... chooses another version." >&2
    exit 2
}

UNEXPECTED=0
# try CODE NAME COMMAND...: runs a command, which must end with this code, and prints its row.
try() {
    local expected=$1 name=$2 code=0 start=$SECONDS mark=
    case $name in *"$ONLY"*) ;; *) return ;; esac
    timeout --signal=INT "$LIMIT" "${@:3}" < "$WORK/input" > "$WORK/log" 2>&1 || code=$?
    if [ "$code" != "$expected" ]; then
        mark="  (expected $expected)"
        UNEXPECTED=$((UNEXPECTED + 1))
        cp "$WORK/log" "$WORK/log-$UNEXPECTED"
    fi
    printf '%4s %5s s  %-42s %s%s\n' "$code" "$((SECONDS - start))" "$name" "$(tail -n 1 "$WORK/log" | cut -c 1-200)" "$mark"
    : > "$WORK/input"
}
: > "$WORK/input"

export MAX_STEPS=2 EVAL_STEPS=0
few=(--max_train_samples 32 --max_eval_samples 4 --max_predict_samples 4 --overwrite_output_dir)
for method in ptuning lora; do
    OUTPUT_DIR=$WORK/$method try 0 "$method/train.sh" bash $method/train.sh "${few[@]}"
    CHECKPOINT=$WORK/$method OUTPUT_DIR=$WORK/$method-scores \
        try 0 "$method/evaluate.sh" bash $method/evaluate.sh --max_predict_samples 4
    OUTPUT_DIR=$WORK/$method-chat try 0 "$method/train_chat.sh" bash $method/train_chat.sh "${few[@]}"
    OUTPUT_DIR=$WORK/$method-4 QUANTIZATION_BIT=4 try 0 "$method/train.sh, 4 bit" bash $method/train.sh "${few[@]}"
    OUTPUT_DIR=$WORK/$method-8 QUANTIZATION_BIT=8 try 0 "$method/train.sh, 8 bit" bash $method/train.sh "${few[@]}"
done
OUTPUT_DIR=$WORK/text try 0 lora/train_text.sh bash lora/train_text.sh --max_train_samples 32 --overwrite_output_dir
OUTPUT_DIR=$WORK/full EVALUATE=false try 0 full/train.sh bash full/train.sh --max_train_samples 32 --overwrite_output_dir
CHECKPOINT=$WORK/full TEST_FILE=AdvertiseGen/dev.json OUTPUT_DIR=$WORK/full-scores \
    try 0 full/evaluate_finetune.sh bash full/evaluate_finetune.sh --evaluate_base --max_predict_samples 4
for stage in 2 3; do
    OUTPUT_DIR=$WORK/zero$stage DEEPSPEED=full/ds_zero_$stage.json EVALUATE=false try 0 "full/ds_train_finetune.sh, ZeRO-$stage" \
        bash full/ds_train_finetune.sh --max_train_samples 32 --overwrite_output_dir
done
OUTPUT_DIR=$WORK/fsdp try 2 full/fsdp_train_finetune.sh bash full/fsdp_train_finetune.sh --max_train_samples 32
OUTPUT_DIR=$WORK/two NUM_PROCESSES=2 try 0 "lora/train.sh, two processes" bash lora/train.sh "${few[@]}"
OUTPUT_DIR=$WORK/fp16 try 2 "lora/train.sh --fp16" bash lora/train.sh "${few[@]}" --fp16
OUTPUT_DIR=$WORK/dry try 0 "lora/train.sh --dry_run" bash lora/train.sh "${few[@]}" --dry_run
MODEL=chatglm-6b DEVICE_MEMORY=8 OUTPUT_DIR=$WORK/plan try 0 "ptuning/train.sh --plan" bash ptuning/train.sh --plan
MODEL=chatglm2-6b DEVICE_MEMORY=80 NUM_GPUS=8 DEEPSPEED=full/ds_zero_3.json OUTPUT_DIR=$WORK/plan8 \
    try 0 "full/ds_train_finetune.sh --plan" bash full/ds_train_finetune.sh --plan
OUTPUT_DIR=$WORK/tokens try 0 common/preprocess.sh bash common/preprocess.sh
TRAIN_DATASETS=$WORK/tokens OUTPUT_DIR=$WORK/shards try 0 "lora/train.sh, TRAIN_DATASETS" bash lora/train.sh "${few[@]}"
for method in ptuning lora full; do
    printf '你好\nstop\n' > "$WORK/input"
    CHECKPOINT=$WORK/$method try 0 "$method/cli_demo.sh" bash $method/cli_demo.sh --max_new_tokens 8
    LIMIT=60 CHECKPOINT=$WORK/$method try 124 "$method/web_demo.sh, ended after 60 s" bash $method/web_demo.sh
done
CHECKPOINT=$WORK/lora OUTPUT_DIR=$WORK/merged-$$ try 0 lora/merge.sh bash lora/merge.sh
try 0 common/inference_hf.py python common/inference_hf.py "$WORK/lora" --prompt 你好 --max_new_tokens 8
for config in lora/lora ptuning/ptuning_v2 full/sft; do
    try 0 "common/finetune_hf.py $config.yaml" python common/finetune_hf.py AdvertiseGen demo3 $config.yaml no \
        --output_dir "$WORK/$(basename $config)" --max_steps 2 "${few[@]:0:6}"
done
echo "$UNEXPECTED commands ended with another code than expected; $WORK/log-* holds what they printed"
[ "$UNEXPECTED" = 0 ]
