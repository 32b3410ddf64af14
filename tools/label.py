"""Rankings and demonstrations by people, on a web page: python tools/label.py --help; docs/labeling.md."""

import sys
from collections.abc import Mapping

from megatron_rlhf.evaluation.agreement import Agreement, Judgement, agreement
from megatron_rlhf.labeling.answers import dense
from megatron_rlhf.labeling.command import main
from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import HELD_OUT, RANKINGS, TRAINING


def agreement_by_team(project: Project) -> Mapping[str, Agreement]:
    """Agreement among training labelers, and among held-out ones."""
    if project.settings.kind != RANKINGS:
        return {}
    return {
        team: agreement(
            Judgement(answer.number, answer.labeler, dense(answer.content["ranks"]), answer.content["ratings"])
            for answer in project.answers([team])
        )
        for team in (TRAINING, HELD_OUT)
    }


if __name__ == "__main__":
    sys.exit(main(agreement_by_team))
