#!/usr/bin/env bash
# Trainings on machines that fail: kills, damaged checkpoints, full disks, wrong clocks, two users at once. Each must end,
# by the same command given again, with the weights of a training that nobody disturbed.
#     bash tests/bench/soak.sh 10                        10 minutes of everything
#     bash tests/bench/soak.sh                           KILLS=200 DAMAGES=60 DISKS=20 CLOCKS=6 USERS=2 of each
#     ONLY="kills damages disks clocks users time" SEED=1 bash tests/bench/soak.sh       some of these words
# Exit code 1: something was lost, wrong, left over or stuck; the table says what. As root it tries two users, and fills
# disks in memory; see soak.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${PYTHON:-}" ]; then                            # the active environment, else that of the scripts
    PYTHON=python3
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$ROOT/.venv/bin/python" ]; then PYTHON=$ROOT/.venv/bin/python; fi
fi
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$PYTHON" "$ROOT/tests/bench/soak.py" "$@"
