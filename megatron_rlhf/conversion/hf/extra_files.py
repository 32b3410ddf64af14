"""Files that accompany a Hugging Face model's weights: tokenizer, chat template, generation settings, config.json."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_rlhf.checkpoint.naming import TOKENIZER
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import model_differences
from megatron_rlhf.conversion.architecture import Head
from megatron_rlhf.conversion.hf import config as hf_config
from megatron_rlhf.conversion.hf.folder import CONFIG, read_json
from megatron_rlhf.conversion.hf.weights import Described
from megatron_rlhf.data.special_tokens import GENERATION
from megatron_rlhf.data.tokenizer import FILES, TEMPLATES

KEPT = "huggingface"
"""Folder inside a checkpoint with the extra files of the model that it was imported from."""
REWARD_CODE = "modeling_reward.py"
_REWARD_CODE = '''"""A reward model whose score has a bias, which {base} has no place for."""

import torch
from transformers import {base}


class RewardModel({base}):
    """Load it by AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)."""

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()
'''


@dataclass
class ExtraFiles:
    """Where the extra files of an export are, and the tokenizer's special tokens."""

    config: Path | None = None
    """Folder with the config.json and generation settings of the model that this one was trained from."""
    tokenizer: Path | None = None
    """Folder with the tokenizer's files."""
    special_tokens: dict[str, int | None] = field(default_factory=dict)
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, for a newly written config.json."""

    @classmethod
    def find(cls, checkpoint: Path, like: Path | None) -> "ExtraFiles":
        """Look in the folder that the user names; without one, in the checkpoint, then where its run started from."""
        if like is not None and not like.is_dir():
            raise UserError(f"--like {like}: no such folder")
        folders = [like] if like is not None else list(_lineage(checkpoint, set()))
        return cls(
            config=next((folder for folder in folders if (folder / CONFIG).is_file()), None),
            tokenizer=next(filter(holds_tokenizer, folders), None),
        )

    @property
    def model_type(self) -> str | None:
        """Of the model that this one was trained from."""
        return None if self.config is None else read_json(self.config / CONFIG).get("model_type")

    def copy_to(self, folder: Path, generation: bool = True) -> None:
        """Copy tokenizer, chat template and generation settings."""
        for name in FILES:
            if self.tokenizer is not None and (self.tokenizer / name).is_file():
                shutil.copyfile(self.tokenizer / name, folder / name)
        if self.tokenizer is not None and (self.tokenizer / TEMPLATES).is_dir():
            shutil.copytree(self.tokenizer / TEMPLATES, folder / TEMPLATES, copy_function=shutil.copyfile)
        if generation:
            self._copy_generation_settings(folder)

    def _copy_generation_settings(self, folder: Path) -> None:
        """The original model's, with the end tokens of the tokenizer that this one was trained with."""
        sources = [source for source in (self.config, self.tokenizer) if source is not None]
        found = [path for source in dict.fromkeys(sources) if (path := source / GENERATION).is_file()]
        if len(found) == 1:
            shutil.copyfile(found[0], folder / GENERATION)
        elif found:
            settings = {**read_json(found[0]), "eos_token_id": read_json(found[1]).get("eos_token_id")}
            (folder / GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def holds_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer file."""
    return any((folder / name).is_file() for name in FILES)


def keep(source: Path, checkpoint: Path) -> None:
    """Put the extra files of a Hugging Face folder into a checkpoint that is imported from it."""
    target = checkpoint / KEPT
    target.mkdir()
    ExtraFiles(source, source).copy_to(target)
    shutil.copyfile(source / CONFIG, target / CONFIG)


def write_config(
    folder: Path, described: Described, dtype: torch.dtype, extra: ExtraFiles, needs_code: bool = False
) -> None:
    """Write config.json, last of all: a folder without it does not count as a model."""
    content = _own_config(described, extra)
    content["architectures"] = [described.architecture.class_name(described.head)]
    content["dtype" if "dtype" in content else "torch_dtype"] = str(dtype).removeprefix("torch.")
    for key in ("id2label", "label2id", "num_labels", "auto_map"):
        content.pop(key, None)
    if described.scalar:
        content |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        if content.get("pad_token_id") == content.get("eos_token_id"):
            # transformers reads the score at the last token that is not padding: the end of text must not be padding.
            # Without a padding token it refuses batches of several texts, rather than scoring them wrongly.
            content["pad_token_id"] = None
    if needs_code:
        content["auto_map"] = {"AutoModelForSequenceClassification": f"{Path(REWARD_CODE).stem}.RewardModel"}
        base = described.architecture.class_name(Head.score)
        (folder / REWARD_CODE).write_text(_REWARD_CODE.format(base=base), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _own_config(described: Described, extra: ExtraFiles) -> dict[str, Any]:
    """The original model's config.json, where it still describes the model; else a new one."""
    if extra.config is not None:
        content = read_json(extra.config / CONFIG)
        if content.get("model_type") == described.architecture.model_type:
            found = hf_config.to_model_config(content, described.architecture, str(extra.config / CONFIG))
            if not model_differences(described.model, found):
                return content
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **extra.special_tokens}
    return hf_config.from_model_config(described.model, described.architecture) | ids


def _lineage(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Folders where extra files may be: the checkpoint's, then what its run's config.yaml names, and so on back."""
    folder = folder.resolve()
    if folder in seen or not folder.is_dir():
        return
    seen.add(folder)
    yield from (folder / TOKENIZER, folder / KEPT, folder)
    for run in (folder, folder.parent.parent):  # a run folder, or run/checkpoints/step_N
        if (run / "config.yaml").is_file():
            try:
                config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
            except (yaml.YAMLError, ValueError, RecursionError) as error:
                raise UserError(f"{run / 'config.yaml'}: not plain YAML: {str(error).splitlines()[0]}") from error
            groups = config if isinstance(config, dict) else {}
            parts = [groups.get(part) for part in ("data", "policy", "reward", "value")]
            named = [part for part in parts if isinstance(part, dict)]
            for name in (part.get(key) for key in ("tokenizer", "init_from") for part in named):
                if isinstance(name, str):
                    yield from _lineage(Path(name), seen)
