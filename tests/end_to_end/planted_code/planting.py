"""Code that shows whether it ran."""

import os
from pathlib import Path


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)
