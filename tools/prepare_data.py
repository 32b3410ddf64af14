"""Data for megatron_rlhf, made and checked: `python tools/prepare_data.py --help`; docs/data.md."""

import sys

from megatron_rlhf.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
