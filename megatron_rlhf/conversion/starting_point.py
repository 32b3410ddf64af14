"""Where a role's first weights come from: one of our checkpoints or a Hugging Face folder, told apart by content."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_rlhf.checkpoint import integrity, sharded
from megatron_rlhf.checkpoint.naming import TOKENIZER
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lora import Adapter
from megatron_rlhf.config.model import ModelConfig, model_differences
from megatron_rlhf.conversion.hf import load as hf_load
from megatron_rlhf.conversion.hf.extra_files import KEPT, holds_tokenizer
from megatron_rlhf.conversion.hf.folder import CONFIG
from megatron_rlhf.conversion.peft import PeftFolder, is_peft_folder
from megatron_rlhf.conversion.peft_settings import SETTINGS
from megatron_rlhf.data.files import hub
from megatron_rlhf.models.roles import Role

HEAD_BYTES = 2**20
"""Bytes of each file of a Hugging Face folder that identify it: its header, and some weights."""


@dataclass(frozen=True)
class Wanted:
    """What a role can be loaded from."""

    roles: tuple[str, ...]
    """Saved roles, the best fit first."""
    scalar: bool
    """The role has a scalar head."""
    fresh_head: bool = False
    """A language model is enough for a scalar role that is trained: its head is newly initialized."""

    def describe(self) -> str:
        """What to specify instead, for a message."""
        if not self.scalar:
            return "a language model"
        return "a language model or a model with a scalar head" if self.fresh_head else "a model with a scalar head"


POLICY = Wanted(("policy",), scalar=False)
AVERAGE = Wanted(("policy_ema",), scalar=False)
REWARD = Wanted(("reward",), scalar=True)
"""A frozen reward model: a new random head would be noise, and a value model predicts something else."""
TRAINED_REWARD = Wanted(("reward", "value", "policy"), scalar=True, fresh_head=True)
VALUE = Wanted(("value", "reward", "policy"), scalar=True, fresh_head=True)


@dataclass(frozen=True)
class StartingPoint:
    """Weights on disk that a role can start from."""

    path: Path
    model: ModelConfig
    scalar: bool
    """It has a scalar head (reward or value model)."""
    saved_role: str | None
    """Folder inside one of our checkpoints; None for a Hugging Face folder."""
    adapter: Adapter | None = None
    """The adapters that come with the weights."""
    peft: PeftFolder | None = None
    """Where they are, if they have a folder of their own; `path` is then their base's."""

    @classmethod
    def find(cls, path: str, key: str, wanted: Wanted) -> "StartingPoint":
        """Inspect `path`, given by the configuration key `key`.

        Raises:
            UserError: if the path holds nothing to start from, or something that does not fit the role.
        """
        folder = Path(path).expanduser()
        if not folder.exists():
            folder = hub.fetch(path, key, hub.MODEL_FILES) or folder
        peft = PeftFolder.open(folder, key) if is_peft_folder(folder) else None
        if peft is not None:
            folder = peft.base
        if hf_load.is_hf_folder(folder):
            found = cls(folder, *hf_load.read_model_config(folder), None, peft.adapter if peft else None, peft)
            if wanted is AVERAGE:
                raise UserError(f"{key}={path}: a Hugging Face folder holds no moving average; needed is a run of PPO")
        else:
            folder = sharded.find_checkpoint(folder, key)
            roles = sharded.read_meta(folder)["roles"]
            name = next((name for name in wanted.roles if name in roles), None)
            if name is None:
                needed = " or ".join(wanted.roles)
                raise UserError(f"{key}={path}: {folder} holds {', '.join(roles)}; needed is {needed}")
            model, adapter = roles[name]["model"], sharded.adapter_from_json(roles[name].get("adapter"))
            found = cls(folder, sharded.model_from_json(model), roles[name]["scalar"], name, adapter)
        if found.scalar != wanted.scalar and not wanted.fresh_head:
            holds = "a model with a scalar head" if found.scalar else "a language model, without a scalar head"
            raise UserError(f"{key}={path}: {folder} holds {holds}; needed is {wanted.describe()}")
        return found

    @property
    def tokenizer(self) -> Path | None:
        """The folder with the tokenizer that came with these weights."""
        folders = [self.path] if self.saved_role is None else [self.path / TOKENIZER, self.path / KEPT]
        if self.peft is not None:
            folders = [self.peft.folder, *folders]
        return next(filter(holds_tokenizer, folders), None)

    def require_shape(self, model: ModelConfig | None, key: str) -> None:
        """Raise UserError when the configuration asks for a different shape from that of these weights."""
        if model is not None and (differences := model_differences(model, self.model)):
            raise UserError(
                f"{key} does not fit {self.path}: {'; '.join(differences)}. Leave {key} out to take the checkpoint's shape."
            )

    def require_undamaged(self, key: str, scalar: bool) -> None:
        """Raise UserError, naming the file, when a checkpoint is not what was written, or holds code, or a Hugging Face
        folder does not hold what its config.json describes. Collective. `scalar`: the role has a scalar head.
        """
        if self.saved_role is None:
            hf_load.require_whole(self.path, scalar)
            return
        if problem := integrity.find_damage(self.path, self.saved_role):
            raise UserError(f"{key}: {self.path} is damaged: {problem}; name another checkpoint")
        sharded.require_plain(self.path, [self.saved_role])

    @cached_property
    def digest(self) -> str:
        """An identifier of these weights, wherever they are: from checksums, or the head of each Hugging Face file."""
        if self.saved_role is not None:
            return integrity.digest_of(self.path, self.saved_role)
        total = hashlib.sha256()
        folders = [self.path] if self.peft is None else [self.path, self.peft.folder]
        files = [path for folder in folders for path in folder.iterdir()]
        kinds = (CONFIG, SETTINGS)
        for path in sorted(p for p in files if p.name in kinds or p.suffix in (".safetensors", ".bin")):
            with path.open("rb") as file:
                total.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(HEAD_BYTES))
        return total.hexdigest()[:16]

    def load_into(self, role: Role) -> None:
        """Fill the role's weights. A scalar role loaded from a language model keeps its new head.

        The role must have the adapters of this starting point, or, where it has none, may have any new ones.
        """
        if self.saved_role is None:
            hf_load.load_into(role, self.path)
            if self.peft is not None:
                self.peft.load_into(role)
        else:
            sharded.load_weights(self.path, role, self.saved_role, keep_head=role.scalar and not self.scalar)
