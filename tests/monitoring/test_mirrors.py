"""Services that get a copy of the metrics, as stand-ins."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring.metrics import MetricsLogger, SamplesLogger, read_metrics
from megatron_rlhf.monitoring.mirrors import Services


class FakeWandb(ModuleType):
    """Stands in for the package: records what it is given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.inits: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished = False

    def init(self, **arguments: object) -> "FakeWandb":
        self.inits.append(arguments)
        return self

    def log(self, metrics: dict, step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished = True

    def Table(self, columns: list[str], data: list[list]) -> dict:
        return {"columns": columns, "data": data}


def test_wandb_continues_the_same_run_at_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (1, 2):
        logger = MetricsLogger(tmp_path, enabled=True, tensorboard=False, services=Services("rlhf"))
        logger.log(step, {"loss": 1.0, "broken": float("inf")})
        logger.close()
    first, second = wandb.inits
    assert first["project"] == "rlhf"
    assert first["id"] == second["id"]
    assert wandb.logged == [(1, {"loss": 1.0}), (2, {"loss": 1.0})]
    assert wandb.finished


def test_a_service_that_refuses_is_a_mistake_with_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoKey(Exception):
        pass

    def refuses(**arguments: object) -> None:
        raise NoKey("api_key not configured (no-tty). call\nwandb.login(key=[your_api_key])")

    wandb = FakeWandb()
    wandb.init = refuses  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UserError, match=r"run\.wandb_project=p: the service cannot be used: api_key not configured"):
        MetricsLogger(tmp_path, enabled=True, services=Services(wandb_project="p"))
    MetricsLogger(tmp_path, enabled=False, services=Services(wandb_project="p"))


@pytest.mark.parametrize("enabled", [True, False])
def test_missing_wandb_says_how_to_install_it_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install megatron_rlhf\[wandb\]"):
        MetricsLogger(tmp_path, enabled=enabled, services=Services("rlhf"))


ROWS = [{"prompt": "a", "response": "b", "score": 1.0}, {"prompt": "c", "response": "d", "score": 2.0, "kl": 0.5}]


def test_wandb_gets_config_entity_tags_and_tables_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    services = Services("rlhf", "us", ["first", "tiny"], config={"ppo": {"clip": 0.2}})
    metrics = MetricsLogger(tmp_path, enabled=True, tensorboard=False, services=services)
    samples = SamplesLogger(tmp_path, True, metrics.mirrors)
    samples.log(3, ROWS)
    samples.log(3, [{**row, "held_out": True} for row in ROWS])
    samples.log(4, [])
    assert {name: wandb.inits[0][name] for name in ("entity", "tags", "config")} == {
        "entity": "us",
        "tags": ["first", "tiny"],
        "config": {"ppo": {"clip": 0.2}},
    }
    (step, first), (_, second) = wandb.logged
    table = {"columns": ["prompt", "response", "score", "kl"], "data": [["a", "b", 1.0, None], ["c", "d", 2.0, 0.5]]}
    assert (step, first) == (3, {"samples": table})
    assert list(second) == ["held_out_samples"]


def test_a_tracker_that_does_not_answer_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Silent:
        def log(self, step, metrics):
            raise OSError("no route to host")

        log_samples = log

    metrics = MetricsLogger(tmp_path, enabled=True, tensorboard=False)
    metrics.mirrors.append(Silent())
    metrics.log(1, {"loss": 1.0})
    SamplesLogger(tmp_path, True, metrics.mirrors).log(1, ROWS)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    assert caplog.text.count("step 1 is missing in Silent: no route to host") == 2


def test_tags_without_a_project_are_an_error(tmp_path: Path) -> None:
    for services in (Services(wandb_entity="us"), Services(wandb_tags=["x"])):
        with pytest.raises(UserError, match=r"run\.wandb_(entity|tags).* is for W&B: give run\.wandb_project too"):
            MetricsLogger(tmp_path, enabled=False, services=services)


class FakeClient:
    """Stands in for MLflow's: keeps what it is given, by run."""

    def __init__(self) -> None:
        self.runs: dict[str, dict] = {}
        self.broken = False

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return f"experiment {name}"

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        number = str(len(self.runs))
        self.runs[number] = {"of": experiment, "name": run_name, "params": {}, "metrics": [], "texts": {}, "status": ""}
        return SimpleNamespace(info=SimpleNamespace(run_id=number))

    def log_param(self, run: str, name: str, value: str) -> None:
        self.runs[run]["params"][name] = value

    def update_run(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status

    def log_batch(self, run: str, metrics: list) -> None:
        if self.broken:
            raise FailedThere("502 from the server")
        self.runs[run]["metrics"] += [(m.key, m.value, m.step) for m in metrics]

    def log_text(self, run: str, text: str, file: str) -> None:
        self.runs[run]["texts"][file] = json.loads(text)

    def set_terminated(self, run: str) -> None:
        self.runs[run]["status"] = "FINISHED"


class FailedThere(Exception):
    pass


def test_mlflow_gets_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, mlflow = FakeClient(), ModuleType("mlflow")
    mlflow.__spec__ = ModuleSpec("mlflow", None)
    mlflow.MlflowClient, mlflow.MlflowException = lambda: client, FailedThere
    mlflow.entities = SimpleNamespace(
        Metric=lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    services = Services(mlflow_experiment="rlhf", config={"ppo": {"clip": 0.2}, "model": None})
    for step in (1, 2):  # stopped and resumed
        metrics = MetricsLogger(tmp_path, enabled=True, tensorboard=False, services=services)
        metrics.log(step, {"loss": 1.0, "broken": float("nan")})
        SamplesLogger(tmp_path, True, metrics.mirrors).log(step, ROWS)
        client.broken = step == 2
        metrics.log(step + 10, {"loss": 3.0})
        metrics.close()
    (run,) = client.runs.values()
    assert run["of"] == "experiment rlhf"
    assert run["name"] == tmp_path.name
    assert run["params"] == {"ppo.clip": "0.2", "model": "None"}
    assert run["metrics"] == [("loss", 1.0, 1), ("loss", 3.0, 11), ("loss", 1.0, 2)]
    assert run["texts"] == {"samples/step_1.json": ROWS, "samples/step_2.json": ROWS}
    assert run["status"] == "FINISHED"
    assert "step 12 is missing in MLflow: 502 from the server" in caplog.text
