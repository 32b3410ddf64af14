"""The page: complete for every kind of run, safe to open, and self-contained."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring.report import write_comparison, write_report
from megatron_rlhf.monitoring.samples import MAX_CHARACTERS, MAX_STEPS, ROWS_A_STEP

MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """What a browser would find: chart titles, text, tags, links."""

    def __init__(self, path: Path):
        super().__init__()
        self.charts: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.links += [given[name] or "" for name in ("href", "src", "xlink:href", "action") if name in given]
        if tag == "svg":
            self.charts.append((given["aria-label"] or "").split(":")[0])

    def handle_data(self, data: str) -> None:
        self.text += data


def run_of(tmp_path: Path, records: list[dict]) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_a_ppo_run_is_drawn_whole(ppo_run: MakeRun) -> None:
    path = write_report(ppo_run(steps=30))
    page = Page(path)
    assert path.name == "report.html"
    assert {
        "Reward score",
        "KL from the reference",
        "KL coefficient",
        "Policy entropy",
        "Held-out pretraining loss",
    } <= {*page.charts}
    assert {
        "Policy loss",
        "Value loss",
        "Gradient norm",
        "Learning rate",
        "Time of a step, by phase",
        "Peak memory",
    } <= {*page.charts}
    assert "Other" not in page.text
    assert "step 30" in page.text
    assert "15.36k samples" in page.text
    assert "Answer 30." in page.text
    assert "learning_rate: 1.0e-06" in page.text
    assert page.tags.count("option") == 2 * 4


def test_the_page_needs_no_network_and_is_small(ppo_run: MakeRun) -> None:
    path = write_report(ppo_run(steps=700))
    assert all(link.startswith("#") for link in Page(path).links)
    assert not re.search(r"url\(|@import|//[a-z]+\.", path.read_text())
    assert path.stat().st_size < 1_000_000


def test_samples_and_config_cannot_inject_markup(ppo_run: MakeRun) -> None:
    run_dir = ppo_run(steps=2)
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    row = {"step": 1, "prompt": evil, "response": evil, evil: evil}
    (run_dir / "samples.jsonl").write_text(json.dumps(row) + "\n")
    (run_dir / "config.yaml").write_text(f"</pre>{evil}")
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, f'"{evil}': 1.0}) + "\n")
    page = Page(write_report(run_dir))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.text.count("onerror=alert(2)") >= 5


def test_a_single_step_is_drawn(tmp_path: Path) -> None:
    page = Page(write_report(run_of(tmp_path, [{"step": 1, "sft/loss": 2.5, "time/step_s": 1.0}])))
    assert page.charts == ["SFT loss", "Time of a step, by phase"]
    assert "circle" in page.tags


def test_reward_model_run(tmp_path: Path) -> None:
    records = [{"step": step, "rm/loss": 0.7 / step, "rm/accuracy": 0.5 + step / 20} for step in range(1, 6)]
    records[-1]["rm/validation_accuracy"] = 0.7
    page = Page(write_report(run_of(tmp_path, records)))
    assert page.charts == ["Ranking loss", "Ranking accuracy"]
    assert "Ranking accuracy, validation0.7" in page.text.replace("\n", "")
    assert "Reward model" in page.text


def test_values_that_were_not_finite_are_marked(tmp_path: Path) -> None:
    records: list[dict] = [
        {"step": 1, "policy/loss": 1.0},
        {"step": 2, "policy/loss": None},
        {"step": 3, "policy/loss": None},
    ]
    path = write_report(run_of(tmp_path, records))
    assert path.read_text().count('class="mark"') == 2
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "policy/loss": null}\n')
    assert Page(write_report(tmp_path)).charts == ["Policy loss"]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert page.charts == []
    assert "no steps yet" in page.text
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")


def test_many_long_samples_are_clipped(tmp_path: Path) -> None:
    rows: list[dict] = [
        {"step": s, "prompt": "p" * 3000, "response": f"row {i}"} for s in range(1, 101) for i in range(20)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(tmp_path))
    assert page.tags.count("article") == MAX_STEPS * ROWS_A_STEP
    assert "p" * MAX_CHARACTERS in page.text
    assert "p" * (MAX_CHARACTERS + 1) not in page.text
    assert "1,500 more characters" in page.text
    assert {"step 1", "step 100"} <= {*re.findall(r"step \d+", page.text)}


def test_comparison(ppo_run: MakeRun, tmp_path: Path) -> None:
    runs = {"PPO": ppo_run(20, "ppo"), "PPO-ptx": ppo_run(30, "ptx", seed=1)}
    rows: list[dict] = [
        {"model": "PPO", "accuracy": (0.71234, 0.0123), "note": "<b>"},
        {"model": "PPO-ptx", "accuracy": "0.8", "steps": 30},
    ]
    path = write_comparison(rows, runs, tmp_path / "out/compare.html", "In miniature", text="One.\n\nTwo.")
    page = Page(path)
    dash = "\N{EN DASH}"
    cells = re.findall(r"<t[hd](?: scope=\"row\")?>(.*?)</t[hd]>", path.read_text())
    assert cells == ["PPO", "0.712 ± 0.012", "&lt;b&gt;", dash, "PPO-ptx", "0.8", dash, "30"]
    assert "Reward score, the reward's own" in page.charts
    assert 'data-label="PPO-ptx"' in path.read_text()
    assert "Answer 20." in page.text
    assert "Answer 30." in page.text


def test_comparison_of_chosen_metrics_without_a_table(ppo_run: MakeRun, tmp_path: Path) -> None:
    path = write_comparison([], {"PPO": ppo_run(5)}, tmp_path / "c.html", "c", metrics=["kl/mean", "not/there"])
    assert Page(path).charts == ["KL from the reference, k1"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed (apt-get install chromium)")
def test_a_browser_draws_and_reacts(ppo_run: MakeRun, tmp_path: Path) -> None:
    path = write_report(ppo_run(steps=30))
    act = """<script>
      document.querySelector(".chart svg").dispatchEvent(new PointerEvent("pointermove", {clientX: 5000}));
      const [left] = document.querySelectorAll(".pick select");
      left.value = "1"; left.dispatchEvent(new Event("change"));
    </script></body>"""
    path.write_text(path.read_text().replace("</body>", act))
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    command = ["chromium", *flags.split(), "--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path}/profile"]
    result = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=60)
    dom = result.stdout
    assert dom.count("<svg") == len(Page(path).charts) > 15
    assert re.search(r'<div class="tip" style="[^"]*">\s*<div>step 30</div>', dom), "no tooltip at the last step"
    hidden = re.findall(r'<section class="column"( hidden="")?', dom)
    assert hidden == [' hidden=""', "", ' hidden=""', ""]


def test_samples_of_held_out_prompts_are_shown_where_there_are_some(tmp_path: Path) -> None:
    """They are the same prompts at each step, so that answers stand side by side."""
    run = tmp_path / "run"
    run.mkdir()
    run_of(run, [{"step": step, "evaluation/score_mean": float(step)} for step in (2, 4)])
    rows = [{"step": step, "prompt": "trained on", "response": "x", "score": 0.0} for step in (1, 2, 3, 4)]
    fixed = [{"step": s, "held_out": True, "prompt": "fixed", "response": f"answer {s}", "score": 1.0} for s in (2, 4)]
    lines = sorted(rows + fixed, key=lambda row: row["step"])
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(run))
    assert "Score on held-out prompts" in page.charts
    assert "answer 2" in page.text and "answer 4" in page.text
    assert "trained on" not in page.text
    assert "held_out" not in page.text
