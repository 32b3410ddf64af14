"""Write docs/reference.md, all keys of all stages, from the schemas.

python tools/reference.py
"""

import dataclasses
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from megatron_rlhf.cli import STAGES
from megatron_rlhf.config.keys import Key, keys

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
HEAD = """# All keys

Made by `python tools/reference.py` from the dataclasses in `megatron_rlhf/config/`; `--help` of a command says the same. A key is
given as `KEY=VALUE` on the command line. The first table holds what all stages share.
"""


def page() -> str:
    """The whole page, in Markdown."""
    stages = {name: keys(stage.schema) for name, stage in STAGES.items()}
    first, *others = stages.values()
    shared = {path for path in first if all(_same(first[path], other.get(path)) for other in others)}
    sections = [HEAD, "## Every stage\n", *_table({path: first[path] for path in first if path in shared})]
    for name, found in stages.items():
        sections += [f"\n## {name}\n", *_table({path: key for path, key in found.items() if path not in shared})]
    return "\n".join(sections) + "\n"


def _same(key: Key, other: Key | None) -> bool:
    return other is not None and (key.doc, _default(key)) == (other.doc, _default(other))


def _table(found: dict[str, Key]) -> Iterator[str]:
    yield "| key | default | meaning |\n| --- | --- | --- |"
    for path, key in found.items():
        if key.schema is None:
            yield f"| `{path}` | {_default(key)} | {key.doc.replace('|', chr(92) + '|').replace('<', '&lt;')} |"


def _default(key: Key) -> str:
    field = key.field
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "**needed**"
        value = field.default_factory()
    if isinstance(value, Enum):
        value = value.value
    return "" if value is None or value in ([], {}, ()) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
