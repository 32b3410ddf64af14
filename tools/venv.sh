# Sourced by examples/quickstart.sh and tests/run.sh: makes or reuses .venv and installs the pinned versions.
#   source tools/venv.sh requirements.lock [requirements-dev.lock ...]
# PYTHON=python3.12 chooses the Python (python3 otherwise; an existing environment keeps its own), VENV=.venv the folder.
# A changed lock file is installed again; otherwise a second call takes no time.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1

minor() { "$1" -c 'import sys; print("3.%d" % sys.version_info[1])' 2>/dev/null; }

require_supported() { # PYTHON, before anything is removed or made for it
    case "$(minor "$1")" in
    3.10 | 3.11 | 3.12 | 3.13) return ;;
    esac
    echo "error: Python 3.10 to 3.13 is needed, $1 is $("$1" --version 2>/dev/null || echo not to be found);" \
        "PYTHON=python3.12 in front of the command names another" >&2
    exit 2
}

venv="${VENV:-.venv}"
if [ -x "$venv/bin/python" ] && [ -n "${PYTHON:-}" ] && [ "$(minor "$venv/bin/python")" != "$(minor "$PYTHON")" ]; then
    require_supported "$PYTHON"
    echo "making $venv anew: its Python is $(minor "$venv/bin/python"), PYTHON=$PYTHON is $(minor "$PYTHON")"
    rm -rf "$venv"
fi
if [ ! -x "$venv/bin/python" ]; then
    python="${PYTHON:-python3}"
    require_supported "$python"
    if ! "$python" -m venv "$venv"; then
        echo "error: $python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
        rm -rf "$venv"
        exit 2
    fi
fi
# A copy of each file that the environment was made from: file by file, since calls differ in which ones they name.
is_installed() { # FILES
    local file
    for file in "$@"; do cmp -s "$file" "$venv/installed/$file" || return 1; done
}

if ! is_installed "$@" setup.py; then
    echo "installing the pinned versions into $venv (once, some minutes) ..."
    requirements=()
    for file in "$@"; do requirements+=(-r "$file"); done
    mkdir -p "$venv/installed"
    (cd "$venv/installed" && rm -f "$@" setup.py) # an installation that breaks off counts as none
    "$venv/bin/python" -m pip install --quiet "${requirements[@]}" || exit 1
    "$venv/bin/python" -m pip install --quiet --no-deps --editable . || exit 1
    cp "$@" setup.py "$venv/installed"
fi
source "$venv/bin/activate"
# Two ranks on two cores: one thread each, otherwise they compete for both.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
