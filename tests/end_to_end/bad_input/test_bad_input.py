"""What becomes of a run with a mistake: what is dropped is counted, what stops says why, and it is the last on the screen."""

import os
import re
import subprocess
import sys

from bad_cases import GOOD, RANKED, contents, good_arguments
from commands import ROOT, run_example
from recipe import write_lines


def test_what_is_dropped_is_counted_and_the_rest_is_used(recipe, tmp_path):
    """Ties, and texts over a limit: not errors, but never cut or dropped silently."""
    long = {**RANKED, "responses": [" beta", " beta" * 40], "ranks": [0, 1]}
    good = [{**RANKED, "prompt": f"say {i}"} for i in range(6)]
    mixed = write_lines(tmp_path / "mixed.jsonl", [*good, *[{**RANKED, "ranks": [0, 0]}] * 2, long])
    arguments = recipe.reward_model(str(tmp_path / "run"), recipe.root / "sft", f"data.comparisons={mixed}")
    finished = run_example("train_reward_model", *arguments, "data.max_response_tokens=20")
    assert finished.codes == [0], finished.output
    assert "6 of 9 records kept; dropped: 2 all_tied, 1 response_too_long" in finished.output


def test_divergence_stops_with_its_cause_and_keeps_the_checkpoints(recipe, tmp_path):
    arguments = recipe.sft(str(tmp_path / "run"), "sft.epochs=8", "run.save_every=1", "policy.optimizer.lr=1e30")
    finished = run_example("train_sft", *arguments, "run.max_skipped_steps=2", "policy.optimizer.clip_norm=0")
    assert finished.codes == [1]
    assert re.search(r"2 updates in a row were skipped \(run\.max_skipped_steps=2\); policy: .*nan", finished.output)
    assert "update skipped" in finished.output
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file()


def test_resume_with_other_data_is_refused(recipe, tmp_path):
    arguments = recipe.sft(str(tmp_path / "run"), "run.stop_at_step=1")
    assert run_example("train_sft", *arguments).codes == [0]
    fewer = write_lines(tmp_path / "fewer.jsonl", [GOOD] * 5)
    before = contents(tmp_path / "run" / "checkpoints")
    finished = run_example("train_sft", *arguments, f"data.demonstrations={fewer}", "run.resume=true")
    assert finished.codes == [2]
    assert re.search(r"data\.demonstrations, .*with other demonstrations \(pieces 5, was 27;", finished.output)
    assert contents(tmp_path / "run" / "checkpoints") == before


def test_torchrun_shows_the_message_once_and_ends_with_it(recipe, tmp_path):
    arguments = recipe.sft(str(tmp_path / "run"), f"data.demonstrations={tmp_path / 'nothing.jsonl'}")
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/train_sft.py", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode != 0
    shown, _, torchruns = finished.stderr.partition("Root Cause")
    assert shown.count("nothing.jsonl: no such file or folder") == 1, finished.stderr
    assert re.search(r"exitcode *: 2", torchruns), finished.stderr
    *_, last, line = torchruns.strip().splitlines()
    assert "error: " in last and "nothing.jsonl: no such file or folder" in last and set(line) == {"="}, finished.stderr


def test_help_lists_every_key_with_its_meaning():
    finished = run_example("train_ppo", "--help")
    assert finished.codes == [0]
    assert "ppo.ptx_coef = 27.8" in finished.output
    assert "The paper's gamma" in finished.output


def test_cfg_prints_the_resolved_configuration_and_runs_nothing(recipe, tmp_path):
    finished = run_example("train_ppo", *good_arguments(recipe, "ppo", tmp_path / "run"), "--cfg")
    assert finished.codes == [0]
    assert "ptx_coef: 27.8" in finished.output
    assert not (tmp_path / "run").exists()
