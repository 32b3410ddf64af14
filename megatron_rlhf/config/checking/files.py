"""Where the files of conf/ are."""

from pathlib import Path

PACKAGE = Path(__file__).parents[2]
CONF = next(
    (folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir()), PACKAGE.parent / "conf"
)
"""Inside the package where a wheel is installed, else at the top of the repository."""
