# Sourced by every script: environment, devices, and the start of a program on all of them.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$(python3 "$ROOT/common/environment.py" requirements.txt)

# One process a device: NUM_GPUS of them, or all that are visible; without any, one process on the CPU.
count_processes() {
    local found
    found=$("$PYTHON" -c 'import torch; print(torch.accelerator.device_count())')
    if [ "${NUM_GPUS:-0}" -gt "$found" ]; then
        echo "error: NUM_GPUS=$NUM_GPUS, but $found GPUs are visible here." >&2
        exit 2
    fi
    found=${NUM_GPUS:-$found}
    echo "$((found > 0 ? found : 1))"
}

# run_one PROGRAM FLAGS...: in one process, which sees one GPU.
run_one() {
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*} "$PYTHON" "$@"
}

# launch PROGRAM FLAGS...: one process is started directly, so that its exit code is ours; several are started by
# accelerate, with everything said, so that no configuration in the user's home matters. Before that, one process checks
# the input and prepares the data, so that bad input is said once and starts nothing.
launch() {
    local cores threads
    NUM_PROCESSES=${NUM_PROCESSES:-$(count_processes)}
    cores=$(getconf _NPROCESSORS_ONLN)
    threads=$((cores / NUM_PROCESSES))
    export NUM_PROCESSES TOKENIZERS_PARALLELISM=false
    # Threads that spin while they wait take the cores from other jobs: a step of 1.5 s would take 10 on a busy machine.
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    if [ "$NUM_PROCESSES" -eq 1 ]; then
        run_one "$@"
        return
    fi
    run_one "$@" --dry_run
    "$PYTHON" -m accelerate.commands.launch --multi_gpu --num_processes "$NUM_PROCESSES" --num_machines 1 \
        --machine_rank 0 --main_process_port 0 --mixed_precision no --dynamo_backend no "$@"
}
