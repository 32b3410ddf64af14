"""Folder names may contain any character that people use."""

import shutil

from commands import run_example

ODD = "a & b, #1 (c)=[d] 'e' \"f\" 100% $HOME {g} ü"


def test_a_run_below_a_folder_of_any_name(recipe, tmp_path):
    odd = tmp_path / ODD
    odd.mkdir()
    for name in ("tokenizer", "demonstrations.jsonl", "text.txt", "prompts.jsonl"):
        source = recipe.root / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, odd / name)
    here = [argument.replace(str(recipe.root), str(odd)) for argument in recipe.sft("sft")]
    trained = run_example("train_sft", *here)
    assert trained.codes == [0], trained.output
    evaluated = run_example(
        "evaluate",
        f"run.dir={odd / 'evaluation'}",
        f"data.tokenizer={odd / 'tokenizer'}",
        f"policy.init_from={odd / 'sft'}",
        f"data.prompts={odd / 'prompts.jsonl'}",
        "data.max_prompt_tokens=32",
        "sampling.max_response_tokens=8",
        "evaluate.samples=4",
    )
    assert evaluated.codes == [0], evaluated.output
    assert len((odd / "evaluation" / "evaluation.jsonl").read_text().splitlines()) == 4
