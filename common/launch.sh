# Sourced by every script: environment, devices, and the start of a program on all of them.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$(python3 "$ROOT/common/environment.py" requirements.txt)

fail() {
    echo "error: $1" >&2
    exit 2
}

# NUM_GPUS devices, or all that are visible; none means the CPU with all its cores.
count_devices() {
    local found
    found=$("$PYTHON" -c 'import torch; print(torch.accelerator.device_count())')
    if [ "${NUM_GPUS:-$found}" -gt "$found" ]; then
        fail "NUM_GPUS=$NUM_GPUS, but $found devices are visible here."
    fi
    echo "${NUM_GPUS:-$found}"
}

# launch PROGRAM FLAGS...: one process a device. A single process is started directly, so that its exit code is ours;
# several are started by accelerate, with everything said, so that no configuration in the user's home matters.
launch() {
    local devices=${DEVICES:-$(count_devices)} cores
    cores=$(getconf _NPROCESSORS_ONLN)
    export EXPECTED_PROCESSES=$((devices > 1 ? devices : 1)) TOKENIZERS_PARALLELISM=false
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / EXPECTED_PROCESSES > 0 ? cores / EXPECTED_PROCESSES : 1))}
    if [ "$EXPECTED_PROCESSES" -eq 1 ]; then
        exec "$PYTHON" "$@"
    fi
    exec "$PYTHON" -m accelerate.commands.launch --multi_gpu --num_processes "$devices" --num_machines 1 \
        --machine_rank 0 --main_process_port 0 --mixed_precision no --dynamo_backend no "$@"
}
