# Every script sources this file, after a line that starts it again with bash where sh is another shell. It finds the
# environment and defines how a program starts on all devices.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# EXTRA_REQUIREMENTS: one more requirements file, for a script that needs more packages than the others.
PYTHON=$(python3 "$ROOT/common/launch/environment.py" requirements.txt ${EXTRA_REQUIREMENTS:+"$EXTRA_REQUIREMENTS"})

# launch PROGRAM FLAGS...: starts one process per GPU, NUM_GPUS of them (default: all that are visible); on CPUs
# NUM_PROCESSES (default: one). Several machines: NUM_MACHINES, MACHINE_RANK, MAIN_IP, MAIN_PORT, RDZV_TIMEOUT,
# PEER_TIMEOUT; see launch/launcher.py. It takes the place of this shell, so that its signals and exit code are the
# script's. Last flags --then COMMAND...: what follows if the program has ended well, and not because of a signal.
launch() {
    exec "$PYTHON" "$ROOT/common/launch/launcher.py" "$@"
}

# RESUME_COMMAND: this command with the variables that it was given, which a training prints when it was told to end.
RESUME_COMMAND="cd $(printf %q "$(pwd)") &&"
for name in $(comm -12 <(compgen -e | sort) <(grep -ohsE '[A-Z][A-Z_]+' "$0" "${BASH_SOURCE[0]}" | sort -u)); do
    RESUME_COMMAND+=" $name=$(printf %q "${!name}")"
done
RESUME_COMMAND+=" bash $(printf '%q ' "$0" "$@")"
export RESUME_COMMAND

FLAGS=()
# add_flags NAME...: adds --name VALUE to FLAGS for each variable that is not empty.
add_flags() {
    local name
    for name; do
        if [ -n "${!name:-}" ]; then FLAGS+=("--${name,,}" "${!name}"); fi
    done
}

# data_name: the word for the training rows in OUTPUT_DIR: adgen for the shipped ones, else the name of their file.
data_name() {
    local file=${TRAIN_FILE:-$TRAIN_DATASETS}
    case $file in "$ROOT/AdvertiseGen/"*) echo adgen; return ;; esac
    file=${file%%,*} file=${file%/}
    case ${file##*/} in *[*?]*) file=$(dirname "$file") ;; esac
    file=$(basename "$file") file=${file%.*}
    echo "${file//[[:space:]]/_}"
}

# A --train_file after the script's name counts as TRAIN_FILE, which names OUTPUT_DIR too.
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
        --train_file | --train-file) TRAIN_FILE=${*:i+1:1} ;;
        --train_file=* | --train-file=*) TRAIN_FILE=${!i#*=} ;;
    esac
done
