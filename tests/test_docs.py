"""The pages of docs/: links lead somewhere, commands have keys that exist, the reference is that of the schemas."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_rlhf.cli import STAGES
from megatron_rlhf.config.keys import keys, unnamed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    **{"train_sft": "sft", "train_reward_model": "reward_model", "train_ppo": "ppo", "evaluate": "evaluate"},
    **{"sft": "sft", "reward-model": "reward_model", "ppo": "ppo"},
}


def commands(page: Path) -> list[str]:
    """Lines of a page's shell blocks, joined where they go on."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_commands_exist(page):
    for command in commands(page):
        found = re.search(r"(?:examples/|megatron[-_]rlhf )([\w-]+)(?:\.py)? (.*)", command)
        if found is None or found[1] not in SCRIPTS:
            continue
        schema = STAGES[SCRIPTS[found[1]]].schema
        known = keys(schema)
        for word in shlex.split(found[2], comments=True):
            key, equals, _ = word.partition("=")
            if equals and key.partition("@")[0] not in ("model", "recipe", "placement", "config"):
                assert unnamed(key, known) in known, f"{page.name}: {key} is no key of {SCRIPTS[found[1]]}: {command}"


def test_the_reference_is_that_of_the_schemas():
    made = subprocess.run(
        [sys.executable, "-c", "import reference; print(reference.page(), end='')"],
        cwd=ROOT / "tools",
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), "run tools/reference.py"


def test_every_page_is_in_the_menu():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(menu)) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_pages_build(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path], cwd=ROOT, check=True
    )
    assert "four_models.svg" in (tmp_path / "concepts" / "index.html").read_text()
