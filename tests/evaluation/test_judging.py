"""Figures of a reward model on people's comparisons, and the groups that they are divided into."""

import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.evaluation.judging import figures, group_of


@pytest.mark.parametrize(
    ("fields", "group"),
    [
        ({}, None),
        ({"subset": None}, None),
        ({"team": "", "subset": "chat"}, "chat"),
        ({"team": "training", "subset": "chat"}, "training"),
        ({"subset": 1}, "1"),
        ({"subset": 0.0}, "0"),
    ],
)
def test_a_group_is_a_name(fields, group):
    assert group_of(Record("line 1", fields)) == group


@pytest.mark.parametrize("value", [["x", 0], {"a": 1}])
def test_what_is_no_group(value):
    with pytest.raises(UserError, match="line 1: column 'subset' must hold the name of a group"):
        group_of(Record("line 1", {"subset": value}))


def test_groups_have_figures_of_their_own():
    def row(group: str | None, right: bool) -> dict:
        scores = [1.0, 0.0] if right else [0.0, 1.0]
        return {"prompt": str(group), "ranks": [0, 1], "scores": scores, "lengths": [1, 1], "group": group}

    found = figures([row("k2", True), row("error", False), row("chat", True), row(None, False)])
    assert found["rm/accuracy"] == found["rm/accuracy_k2"] == 0.5 and found["rm/accuracy_error"] > 0
    of_groups = {name: found[f"rm/accuracy_{name}"] for name in ("group_k2", "group_error", "chat", "all")}
    assert of_groups == {"group_k2": 1, "group_error": 0, "chat": 1, "all": 0}
