#!/usr/bin/env bash
# The whole InstructGPT recipe in miniature, from a fresh clone, on the available hardware; ends with a table and report.html.
#   bash examples/quickstart.sh [output folder] [key=value ...]     each stage takes the keys that it has
set -euo pipefail
source "$(dirname "$0")/../tools/venv.sh" requirements.lock

output="runs/miniature-$(date +%Y%m%d-%H%M%S)"
if [ $# -gt 0 ] && [[ "$1" != *=* ]]; then
    output="$1"
    shift
fi
ranks="$(python -c 'import torch; print(torch.cuda.device_count() or 2)')"
exec torchrun --standalone --nproc-per-node "$ranks" examples/miniature/run.py "$output" "$@"
