# Every script sources this file, after a line that starts it again with bash where sh is another shell. It finds the
# environment and defines how a program starts on all devices.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# EXTRA_REQUIREMENTS: one more requirements file, for a script that needs more packages than the others.
PYTHON=$(python3 "$ROOT/common/launch/environment.py" requirements.txt ${EXTRA_REQUIREMENTS:+"$EXTRA_REQUIREMENTS"})

# launch PROGRAM FLAGS...: starts one process per GPU, NUM_GPUS of them (default: all that are visible); on CPUs
# NUM_PROCESSES (default: one). Several machines: NUM_MACHINES, MACHINE_RANK, MAIN_IP, MAIN_PORT, RDZV_TIMEOUT,
# PEER_TIMEOUT; see launch/launcher.py.
launch() {
    "$PYTHON" "$ROOT/common/launch/launcher.py" "$@"
}
