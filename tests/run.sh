#!/usr/bin/env bash
# Sets everything up and runs every test on the CPU. Further arguments go to pytest: bash tests/run.sh -k prefix
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(python3 common/environment.py requirements.txt tests/requirements.txt)
exec "$PYTHON" -m pytest "$@"
