#!/usr/bin/env bash
# All tests, in two processes. Arguments go to pytest: bash tests/run.sh tests/algorithms -k gae
# -n 0 runs them in one, as a debugger wants it; -n 8 in more, where there are the cores.
# PYTHON=python3.12 bash tests/run.sh runs them on another Python (tools/venv.sh).
set -euo pipefail
source "$(dirname "$0")/../tools/venv.sh" requirements.lock requirements-dev.lock
# Transformer Engine's layers without their compiled parts, only for tests/models/test_transformer_engine.py: kept apart,
# because whatever imports this package without them fails.
engine="$VIRTUAL_ENV/transformer_engine"
if [ ! -d "$engine" ]; then
    python -m pip install --quiet --no-deps --target "$engine" --requirement tests/models/engine.lock
fi
exec python -m pytest --numprocesses 2 --dist loadfile "$@"
