"""Is this machine fit to train on? `python tools/doctor.py --help`."""

import sys
from pathlib import Path

# A machine where nothing is installed is a case for the doctor.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rlhf.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
