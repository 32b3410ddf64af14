"""What is wrong with a command, and what its message must say."""

from dataclasses import dataclass, field
from pathlib import Path

from recipe import Recipe

SCRIPTS = {"sft": "train_sft", "reward_model": "train_reward_model", "ppo": "train_ppo", "evaluate": "evaluate"}
PROMPT = {"prompt": "say beta:"}
GOOD = {**PROMPT, "response": " beta"}
CHAT = {"messages": [{"role": "user", "content": "say beta:"}, {"role": "assistant", "content": " beta"}]}
RANKED = {**PROMPT, "responses": [" beta", " beta beta"], "ranks": [0, 1]}


@dataclass(frozen=True)
class Case:
    """A stage's good arguments, what is wrong with them, and what the message must say (regular expressions)."""

    stage: str
    wrong: list[str]
    says: list[str]
    ranks: int = 1
    lines: list | None = None
    """Records, or raw lines, of the file that `wrong` calls {file}."""
    without: list[str] = field(default_factory=list)
    """Keys left out of the good arguments."""


def demonstrations(*lines, says):
    return Case("sft", ["data.demonstrations={file}"], says, lines=list(lines))


def comparisons(*lines, says, more=()):
    return Case("reward_model", ["data.comparisons={file}", *more], says, lines=list(lines))


def good_arguments(recipe: Recipe, stage: str, run: Path) -> list[str]:
    """Arguments that would run, into the folder `run`."""
    sft, reward_model = recipe.root / "sft", recipe.root / "reward_model"
    if stage == "sft":
        return recipe.sft(str(run))
    if stage == "reward_model":
        return recipe.reward_model(str(run), sft)
    if stage == "ppo":
        return recipe.ppo(str(run), sft, reward_model)
    return [f"run.dir={run}", *recipe.data, f"policy.init_from={sft}", f"data.prompts={recipe.root / 'prompts.jsonl'}"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
