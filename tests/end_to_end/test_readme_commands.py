"""The README's commands for one's own models and data, word by word, with `recipe=first_try` behind each."""

import json
import re
import shlex
from pathlib import Path

import pytest
from commands import ROOT, run_example
from recipe import WORDS, write_lines

from megatron_rlhf.data.tokenizer import train_tokenizer

SHRUNK = "recipe=first_try"
STAGES = ["train_sft", "train_reward_model", "train_ppo", "evaluate"]


def commands() -> list[tuple[str, int, list[str]]]:
    """Script, number of ranks and arguments of each command of the section."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## Your own models and data\n.*?```bash\n(.*?)```", readme, re.DOTALL)
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] != "source":
            at = next(i for i, word in enumerate(words) if re.fullmatch(r"examples/\w+\.py", word))
            launcher, ranks = words[:at], 1
            if launcher != ["python"]:
                assert launcher[:2] == ["torchrun", "--nproc-per-node"], launcher
                ranks = int(launcher[2])
            found.append((Path(words[at]).stem, ranks, words[at + 1 :]))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt2/ of the real one's shape except for its sizes, and the files that the commands name."""
    from transformers import GPT2Config, GPT2LMHeadModel

    root = tmp_path_factory.mktemp("readme")
    documents = [" ".join(WORDS[i % 7 :: 1 + i % 3]) for i in range(300)]
    train_tokenizer(documents, 300, root / "gpt2")
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 300, "n_positions": 1024}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(root / "gpt2")
    prompts = [f"say {word} {n}:" for word in WORDS for n in range(3)]
    write_lines(root / "demos.jsonl", [{"prompt": prompt, "response": " alpha beta"} for prompt in prompts])
    responses = [" alpha", " beta gamma", " delta"]
    ranked = [{"prompt": prompt, "responses": responses, "ranks": [0, 1, 2]} for prompt in prompts]
    write_lines(root / "ranked.jsonl", ranked)
    write_lines(root / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    (root / "corpus.txt").write_text("\n\n".join(documents))
    return root


def test_they_run_one_after_the_other(folder):
    named = commands()
    assert [script for script, *_ in named] == STAGES
    for script, ranks, arguments in named:
        finished = run_example(script, *arguments, SHRUNK, ranks=ranks, folder=folder)
        assert finished.codes == [0] * ranks, f"{script}:\n{finished.output}"
    steps = {run: (folder / "runs" / run / "metrics.jsonl").read_text().splitlines() for run in ("sft", "rm", "ppo")}
    assert [len(lines) for lines in steps.values()] == [20, 20, 8]
    assert {"reward/score_mean", "ptx/loss"} <= set(json.loads(steps["ppo"][-1]))
    rows = (folder / "runs/eval/evaluation.jsonl").read_text().splitlines()
    assert len(rows) == 16 and all("score" in json.loads(row) for row in rows)
