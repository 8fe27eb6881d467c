#!/usr/bin/env bash
# Sets everything up and runs every test on the CPU. Further arguments go to pytest: bash tests/run.sh -k prefix
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(python3 common/launch/environment.py requirements.txt requirements-web.txt requirements-export.txt tests/requirements.txt)
# A worker a core, with one thread each: tests are many small processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "$PYTHON" -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@"
