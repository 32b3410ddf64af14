"""Rankings and demonstrations by people, on a web page: `python tools/label.py --help`; docs/labeling.md."""

import sys

from megatron_rlhf.commands.label import main

if __name__ == "__main__":
    sys.exit(main())
