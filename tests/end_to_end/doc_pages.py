"""The shell commands of docs/: as bash reads them, what is marked as needing more than this machine, what each would start."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from commands import INSTALLED, ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
NEEDS = re.compile(r"# needs (a cluster|a GPU|a network|Docker)\b")
"""What a comment says of a block (its first line) or of one command (its last words) that cannot run on any machine."""
PROGRAMS = (INSTALLED, "python", "torchrun", "bash")
# Writes what it was called with, instead of doing it.
RECORD = """#!/bin/bash
{ env -u PATH -u RECORDED -u PWD -u OLDPWD -u SHLVL -u _ -0; printf '%s\\0' "${0##*/}" "$@"; printf '\\n\\0'; } >> "$RECORDED"
"""


@dataclass(frozen=True)
class Block:
    """A block of shell commands of a page."""

    page: str
    text: str

    @property
    def runnable(self) -> str:
        """The block less what is marked as needing more than this machine; empty where all of it is."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if lines and lines[0].startswith("#") and NEEDS.search(lines[0]):
            return ""
        return "\n".join(line for line in lines if not NEEDS.search(line))


@dataclass(frozen=True)
class Command:
    """What is started: `script` as `commands.run_example` takes it."""

    script: str
    ranks: int
    arguments: list[str]
    environment: dict[str, str]

    @classmethod
    def of(cls, words: list[str]) -> "Command":
        start = next(i for i, word in enumerate(words) if word in PROGRAMS)
        environment = dict(word.split("=", 1) for word in words[:start])
        program, rest, ranks = words[start], words[start + 1 :], 1
        if program == "torchrun":
            assert rest[0] == "--nproc-per-node", words
            ranks, rest = int(rest[1]), rest[2:]
        if program == INSTALLED:
            return cls(INSTALLED, ranks, rest, environment)
        if rest[:2] == ["-m", "megatron_rlhf"]:
            return cls(INSTALLED, ranks, rest[2:], environment)
        assert rest[0].startswith(("examples/", "tools/", "tests/")), words
        return cls(f"../{rest[0].removesuffix('.py')}", ranks, rest[1:], environment)

    @property
    def stage(self) -> str:
        """`sft`, `reward-model`, ..., or the name of the script."""
        name = Path(self.script).name
        return self.arguments[0] if name == INSTALLED else name


def blocks(page: Path) -> list[Block]:
    """The page's blocks of shell commands."""
    found = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [Block(page.stem, text) for text in found]


def recorded(script: str, folder: Path) -> list[Command]:
    """The commands that bash would start for a script, in their order; nothing is done."""
    programs, record = folder / "programs", folder / "recorded"
    programs.mkdir(exist_ok=True)
    record.write_text("")
    for name in PROGRAMS:
        (programs / name).write_text(RECORD)
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "RECORDED": str(record)}
    done = subprocess.run(["/bin/bash", "-euc", script], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stderr}"
    calls = record.read_text().split("\n\0")[:-1]
    return [Command.of(call.split("\0")[:-1]) for call in calls]
