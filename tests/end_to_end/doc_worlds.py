"""The files and runs that the commands of docs/ name: small, and made of the toy recipe's."""

import shutil
import sys
from pathlib import Path

from commands import ROOT
from ranks import run_ranks
from recipe import WORDS, Recipe, run_stage, write_lines

sys.path.insert(0, str(ROOT / "tests" / "evaluation"))

from benchmark_files import FILES

FUNCTIONS = """
def score(prompts, responses, records):
    return [float(len(record.get("answer", "")) + len(response)) for response, record in zip(responses, records)]


def shortness(prompts, responses, records):
    return [-float(len(response)) for response in responses]
"""


def make_world(root: Path, recipe: Recipe) -> Path:
    """Every name that a page takes for granted; what a page makes itself is removed before it does."""
    run_ranks(1, run_stage, "ppo", recipe.ppo("docs_ppo", recipe.root / "sft", recipe.root / "reward_model", *BRIEF))
    for name, run in {"sft": "sft", "rm": "reward_model", "ppo": "docs_ppo", "ppo_ptx": "docs_ppo"}.items():
        shutil.copytree(recipe.root / run, root / "runs" / name)
    prompts = [f"say {word} {n}:" for word in WORDS for n in range(3)]
    asked = [{"prompt": prompt, "answer": "beta", "user": prompt[4]} for prompt in prompts]
    for name in ("prompts.jsonl", "test.jsonl", "api.jsonl"):
        write_lines(root / name, asked)
    write_lines(root / "demos.jsonl", [{"prompt": prompt, "response": " alpha beta"} for prompt in prompts])
    answers = {"responses": [" alpha", " beta gamma", " delta"], "ranks": [0, 1, 2]}
    for name in ("ranked.jsonl", "first.jsonl", "held_out.jsonl"):
        write_lines(root / name, [{"prompt": prompt, **answers} for prompt in prompts])
    by_people = [{"prompt": prompt, "ranks": [1, 0], "sources": ["sft", "ppo"]} for prompt in prompts]
    write_lines(root / "ranked_by_people.jsonl", by_people)
    shutil.copy(recipe.root / "text.txt", root / "corpus.txt")
    for name in ("rules.py", "my_rewards.py", "toxicity.py"):
        (root / name).write_text(FUNCTIONS)
    (root / "benchmarks").mkdir()
    for name, text in FILES.items():
        (root / "benchmarks" / name).write_text(text, encoding="utf-8")
    write_models(root, recipe)
    return root


BRIEF = ("ppo.iterations=1", "ppo.warmup_iterations=1", "ppo.ema_decay=0.9")


def write_models(root: Path, recipe: Recipe) -> None:
    """Folders of transformers: gpt2/, and llama/ of as many layers as a page counts."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ends = {"vocab_size": 301, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=2048, **ends)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
    llama = LlamaConfig(num_hidden_layers=26, **sizes, **ends)
    for name, model in (("gpt2", GPT2LMHeadModel(gpt2)), ("llama", LlamaForCausalLM(llama))):
        shutil.copytree(recipe.root / "tokenizer", root / name)
        model.save_pretrained(root / name)
