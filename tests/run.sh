#!/usr/bin/env bash
# All tests. Arguments go to pytest: bash tests/run.sh tests/algorithms -k gae
set -euo pipefail
source "$(dirname "$0")/../tools/venv.sh" requirements.lock requirements-dev.lock
exec python -m pytest "$@"
