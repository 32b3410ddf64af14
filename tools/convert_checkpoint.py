"""Convert models between Hugging Face folders and checkpoints of megatron_rlhf: `python tools/convert_checkpoint.py --help`."""

import sys

from megatron_rlhf.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
