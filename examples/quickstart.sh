#!/usr/bin/env bash
# The whole InstructGPT recipe in miniature, from a fresh clone, on what hardware there is; ends with a table and report.html.
#   bash examples/quickstart.sh [output folder] [key=value ...]
set -euo pipefail
source "$(dirname "$0")/../tools/venv.sh" requirements.lock

ranks="$(python -c 'import torch; print(torch.cuda.device_count() or 2)')"
exec torchrun --standalone --nproc-per-node "$ranks" examples/miniature/run.py "${@:-runs/miniature}"
