"""examples/tinystories: where one story ends and the next begins, and the study of gamma in its short form."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT

sys.path.insert(0, str(ROOT / "examples" / "tinystories"))

from stories import rows_of, split_stories, write_stories

TEXT = """One day, a girl found a needle.

She smiled.

Once upon a time, there was a car.

One day, it drove to the park.

It came home.

One day, a fish swam near the shore.

One sunny day, the sun set.

The end.

Once there was a bear."""


def test_stories_begin_where_stories_begin():
    assert [story.split("\n\n") for story in split_stories(TEXT)] == [
        ["One day, a girl found a needle.", "She smiled."],
        ["Once upon a time, there was a car.", "One day, it drove to the park.", "It came home."],
        ["One day, a fish swam near the shore.", "One sunny day, the sun set.", "The end."],
        ["Once there was a bear."],
    ]


def test_rows_begin_with_a_story_and_every_story_is_whole_in_one():
    stories = [[0, 1, 2], [0, 3], [0, 4, 5, 6], [0, 7, 8, 9, 10, 11, 12], [0, 13]]
    assert list(rows_of(stories, 5)) == [[0, 1, 2, 0, 3], [0, 4, 5, 6, 0], [0, 7, 8, 9, 10]]


def test_the_models_own_text(shared_data, tmp_path):
    """As token files: rows of the model's context, starting with the beginning of text, without tokens new to the model."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_rlhf.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shared_data / "tinystories_260k")
    text = (shared_data / "tinystories.txt").read_text()
    assert len(split_stories(text)) > 200
    write_stories(text, tokenizer, 512, tmp_path / "stories")
    documents = IndexedDataset(str(tmp_path / "stories"))
    rows = np.stack([np.array(documents[i]) for i in range(len(documents))])
    assert rows.shape[0] > 150 and rows.shape[1] == 512
    assert (rows[:, 0] == tokenizer.bos_id).all()
    assert not (rows == tokenizer.eos_id).any()
    assert tokenizer.decode(rows[0].tolist()).strip().startswith(split_stories(text)[0])


@pytest.mark.slow
def test_the_study_in_its_short_form(shared_data, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "tinystories" / "gamma_study.py")]
    names = ["base", "gamma_0", "gamma_27.8", "kl_0.1", "auto_1"]
    paths = [str(shared_data / "tinystories_260k"), str(shared_data / "tinystories.txt"), str(tmp_path)]
    for _again in (False, True):  # the second time everything is there already
        subprocess.run([*command, *paths, "short", *names], check=True, timeout=300, capture_output=True)
        rows = {row["run"]: row for row in json.loads((tmp_path / "gamma.json").read_text())}
        assert list(rows) == names
        assert (tmp_path / "gamma.png").read_bytes().startswith(b"\x89PNG")
    assert rows["base"]["held-out loss"] == pytest.approx(1.35, abs=0.15)  # the entropy of its own samples
    assert rows["gamma_27.8"]["text's gradient over PPO's"] > 0 == rows["gamma_0"]["text's gradient over PPO's"]
    assert rows["auto_1"]["gamma at the end"] not in (1.0, 27.8)
    assert Path(tmp_path / "auto_1" / "report.html").is_file()
