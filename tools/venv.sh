# Sourced by examples/quickstart.sh and tests/run.sh: makes or reuses .venv and installs the pinned versions.
#   source tools/venv.sh requirements.lock [requirements-dev.lock ...]
# A change of a lock file installs again; otherwise a second call takes no time.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: Python 3.10 or newer is needed; found $(python3 --version 2>&1)" >&2
    exit 2
fi
if [ ! -x .venv/bin/python ] && ! python3 -m venv .venv; then
    echo "error: python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
    rm -rf .venv
    exit 2
fi
stamp=".venv/installed-$(cat "$@" setup.py | sha256sum | cut -c1-16)"
if [ ! -f "$stamp" ]; then
    echo "installing the pinned versions into .venv (once, some minutes) ..."
    requirements=()
    for file in "$@"; do requirements+=(-r "$file"); done
    .venv/bin/python -m pip install --quiet "${requirements[@]}" || exit 1
    .venv/bin/python -m pip install --quiet --no-deps --editable . || exit 1
    touch "$stamp"
fi
source .venv/bin/activate
# Two ranks on two cores: one thread each, or they take turns on both.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
