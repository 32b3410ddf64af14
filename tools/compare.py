"""One page for evaluations: `python tools/compare.py --help`; docs/evaluation.md."""

import sys

from megatron_rlhf.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
