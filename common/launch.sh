# Sourced by every script: the environment, and the start of a program on all devices.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$(python3 "$ROOT/common/environment.py" requirements.txt)

# launch PROGRAM FLAGS...: one process a device, NUM_GPUS of them (default: all that are visible); on CPUs NUM_PROCESSES
# (default: one). Several machines: NUM_MACHINES, MACHINE_RANK, MAIN_IP, MAIN_PORT, RDZV_TIMEOUT; see launcher.py.
launch() {
    "$PYTHON" "$ROOT/common/launcher.py" "$@"
}
