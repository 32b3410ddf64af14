"""Memory, time and cost of a run, before a GPU is requested: `python tools/plan.py --help`."""

import sys

from megatron_rlhf.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
