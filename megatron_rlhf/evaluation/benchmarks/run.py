"""Benchmarks by lm-evaluation-harness: its own tasks, the paper's that lie in tasks/, and the user's."""

import contextlib
import difflib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rlhf.config.errors import RunFailed, UserError
from megatron_rlhf.evaluation.statistics import mean_and_error
from megatron_rlhf.monitoring.files import replacing, write_lines
from megatron_rlhf.rewards import functions

if TYPE_CHECKING:  # it takes seconds to import, and is an extra
    from megatron_rlhf.evaluation.benchmarks.harness import HarnessModel

log = logging.getLogger(__name__)

TASKS = Path(__file__).parent / "tasks"
RESAMPLES = 1000
"""For standard errors of what is no mean."""

Scorer = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]
"""Prompts, responses and the rows of the data -> a number for each response."""


@dataclass(frozen=True)
class Benchmarks:
    """Tasks whose data is loaded."""

    tasks: dict[str, Any]
    """Name -> the harness's task."""
    limit: int | None
    """Rows of each task; None: all."""
    shots: int | None
    """Solved examples in front of each row; None: as the task says."""
    chat: bool
    """Prompts in the tokenizer's chat template."""
    scorer: Scorer | None

    @classmethod
    def load(
        cls,
        names: Sequence[str],
        folder: str | None,
        data: str | None,
        limit: int | None = None,
        shots: int | None = None,
        chat: bool = False,
        scorer: Scorer | None = None,
    ) -> "Benchmarks":
        """Finds the tasks and loads their data.

        Args:
            names: tasks, or tags of several.
            folder: more task files, the user's own.
            data: where the files of the paper's tasks lie.

        Raises:
            UserError: the harness is not installed, there is no such task, its file or data cannot be read, or it needs
                a scorer.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                "evaluate.tasks needs lm_eval, which is not installed: pip install 'megatron_rlhf[benchmarks]'"
            )
        if folder is not None and not Path(folder).expanduser().is_dir():
            raise UserError(f"evaluate.task_path={folder}: no such folder")
        tasks: dict[str, Any] = {}
        manager = _manager(names, folder, data)
        for name in names:
            tasks.update(_load(manager, name))
        for name, task in tasks.items():
            if is_scored(task) and scorer is None:
                raise UserError(
                    f"evaluate.tasks: {name} needs evaluate.scorer, a function that says how toxic a text is "
                    "(path/to/file.py:function)"
                )
        return cls(tasks, limit, shots, chat, scorer)

    def run(self, model: "HarnessModel", output: Path, is_first: bool) -> dict[str, float]:
        """Every task's figures, `<task>/<figure>`, and `<task>/<figure>_stderr`.

        On the first rank: they are also in `output`/results.json, and the answers to each task in `output`/<task>.jsonl.
        The other ranks get an empty dictionary.
        """
        from lm_eval.evaluator import simple_evaluate

        with _quiet():
            results: Any = simple_evaluate(
                model=model,
                tasks=list(self.tasks.values()),
                num_fewshot=self.shots,
                limit=self.limit,
                apply_chat_template=self.chat,
                bootstrap_iters=RESAMPLES if is_first else 0,
            )
        if not is_first:
            return {}
        figures: dict[str, float] = {}
        output.mkdir(parents=True, exist_ok=True)
        for name in sorted(self.tasks, key=lambda name: is_scored(self.tasks[name])):
            answers = [_answer(sample) for sample in results["samples"][name]]
            write_lines(output / f"{name}.jsonl", answers)  # not lost if the scorer fails
            found = _figures(results["results"][name])
            if is_scored(self.tasks[name]):
                found |= self._score(answers)
                write_lines(output / f"{name}.jsonl", answers)
            figures |= {f"{name}/{figure}": value for figure, value in found.items()}
            with replacing(output / "results.json") as file:
                file.write((json.dumps(figures, indent=2) + "\n").encode())
        return figures

    def _score(self, answers: list[dict[str, Any]]) -> dict[str, float]:
        assert self.scorer is not None
        scores = self.scorer(
            [answer["prompt"] for answer in answers],
            [answer["response"] for answer in answers],
            [answer["row"] for answer in answers],
        )
        for answer, score in zip(answers, scores, strict=True):
            answer["score"] = score
        mean, error = mean_and_error(scores)
        return {"score": mean, "score_stderr": error}


def load_scorer(spec: str) -> Scorer:
    """The function that `evaluate.scorer` names; what it returns is checked.

    Raises:
        UserError: there is no such function, or its file cannot be imported.
    """
    key = f"evaluate.scorer={spec}"
    try:
        function = functions.load(spec)
    except functions.Mistake as mistake:
        raise UserError(f"{key} {mistake}") from mistake
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise UserError(f"{key}: its file raised {type(error).__name__}: {error}") from error

    def score(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        try:
            returned = function(prompts, responses, rows)
        except (Exception, SystemExit) as error:  # whatever the user's function raises
            raise RunFailed(
                f"{key} raised {type(error).__name__}: {error}; the answers are in the run's folder"
            ) from error
        try:
            return functions.numbers_of(returned, [f"response {i}" for i in range(len(responses))])
        except functions.Mistake as mistake:
            raise RunFailed(f"{key} {mistake}; the answers are in the run's folder") from mistake

    return score


def is_scored(task: Any) -> bool:
    """Its answers are judged by `evaluate.scorer`."""
    return bool((task.config.metadata or {}).get("scored"))


def _manager(names: Sequence[str], folder: str | None, data: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    paths = [str(TASKS), *([str(Path(folder).expanduser())] if folder else [])]
    metadata: dict[str, Any] = {"data": data}
    with _quiet():
        shipped = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
        if set(names) <= set(shipped.all_tasks):
            return shipped
        return TaskManager(include_path=paths, metadata=metadata)  # reads the names of thousands: seconds


def _load(manager: Any, name: str) -> dict[str, Any]:
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"evaluate.tasks: no task {name}{hint}")
    try:
        with _quiet():
            return manager.load([name])["tasks"]
    except UserError:
        raise
    except Exception as error:  # of whatever the task's own code and the libraries that load its data raise
        raise UserError(
            f"evaluate.tasks: {name} cannot be loaded: {type(error).__name__}: {error}; tasks that read local files: "
            "instructgpt_*, with evaluate.task_data=FOLDER"
        ) from error


def _figures(results: dict[str, Any]) -> dict[str, float]:
    """The harness names a figure `name,filter`; filters that change nothing are left out of the name."""
    found = {}
    for key, value in results.items():
        name, _, how = key.partition(",")
        if isinstance(value, int | float) and how and name not in ("bypass", "bypass_stderr"):
            found[name if how == "none" else f"{name}_{how}"] = float(value)
    return found


def _answer(sample: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row: its prompt, and the text or the likelihoods that were answered."""
    responses = [response[0] if len(response) == 1 else response for response in sample["resps"]]
    figures = {name: sample[name] for name in sample["metrics"] if name != "bypass" and _is_plain(sample[name])}
    return {
        "row": sample["doc"],
        "prompt": sample["arguments"][0][0],
        "response": responses[0] if len(responses) == 1 else responses,
        **figures,
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness's advice on its own command line, and its bars, stay out of the log; it starts no processes."""
    logger = logging.getLogger("lm_eval")
    level, alone = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
