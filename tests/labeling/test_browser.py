"""The page in a real Chromium: ranking by keys and by dragging, and kills of server and browser between any two clicks."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import free_port
from labeling.projects import ROOT, make_project, ranked
from playwright.sync_api import BrowserContext, Page, Playwright, expect, sync_playwright

from megatron_rlhf.labeling.answers import cards
from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import DEMONSTRATIONS, TRAINING, Settings, Task

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


class Server:
    """tools/label.py serve, which can be killed and started again at the same address."""

    def __init__(self, path: Path):
        self.path, self.port = path, free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> "Server":
        command = [sys.executable, ROOT / "tools" / "label.py", "serve", self.path, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        assert self.url in self.process.stdout.readline()
        return self

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as started:
        yield started


def launch(playwright: Playwright, profile: Path, **options) -> BrowserContext:
    """A browser with a profile on the disk."""
    context = playwright.chromium.launch_persistent_context(
        profile, executable_path=CHROMIUM, args=FLAGS, headless=True, **options
    )
    context.set_default_timeout(15_000)
    return context


@contextmanager
def browsing(playwright: Playwright, profile: Path, **options) -> Iterator[Page]:
    """A page that must not report a mistake of the script."""
    context = launch(playwright, profile, **options)
    mistakes: list[str] = []
    context.pages[0].on("pageerror", lambda mistake: mistakes.append(str(mistake)))
    try:
        yield context.pages[0]
    finally:
        context.close()
    assert not mistakes


@contextmanager
def serving(path: Path) -> Iterator[Server]:
    server = Server(path).start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    make_project(tmp_path / "p.sqlite", tasks=30, labels_per_prompt=2).close()
    with serving(tmp_path / "p.sqlite") as started:
        yield started


def log_in(page: Page, server: Server, name: str = "ann") -> None:
    page.goto(server.url)
    page.get_by_role("button", name=name).click()
    page.wait_for_url("**/task/*")


def press(page: Page, keys: str) -> None:
    for key in keys.split():
        page.keyboard.press(key)


def is_saved(page: Page) -> None:
    page.wait_for_selector('body[data-unsent="0"]', state="attached")


def shown_order(path: Path, task: int, labeler: str) -> list[int]:
    """Which output each letter is."""
    project = Project.open(path)
    outputs = cards(project.task(task).outputs, f"{project.settings.secret} {task} {labeler}")
    project.close()
    return [card.places[0] for card in outputs]


def entered(path: Path, task: int, labeler: str = "ann") -> dict:
    project = Project.open(path)
    content = project.content(labeler, task)
    project.close()
    return content


def test_keys_alone(playwright, server, tmp_path):
    with browsing(playwright, tmp_path / "profile") as page:
        log_in(page, server)
        press(page, "2 1 2 4 B Shift+7 L ArrowDown Shift+1 X X A Backspace 3 Enter")
        page.wait_for_url("**/task/2")
        press(page, "S")
        expect(page.locator("#skip [type=radio]").first).to_be_focused()
        press(page, "ArrowDown Enter")
        page.wait_for_url("**/task/3")
        press(page, "U")
        page.wait_for_url("**/task/2")
        press(page, "U")
        page.wait_for_url("**/task/1")
        expect(page.locator("[data-place=A]")).to_have_text("rank 3")
        press(page, "A 4 Enter")
        page.wait_for_url("**/task/2")
        assert page.locator("#done").text_content() == "1"
    order = shown_order(server.path, 1, "ann")
    expected = ranked(*[dict(zip(order, (4, 1, 2, 4), strict=True))[i] for i in range(4)])
    expected["ratings"][order[1]], expected["ratings"][order[2]] = 7, 1
    expected["metadata"][order[1]] = ["hallucination"]
    project = Project.open(server.path)
    (answer,) = project.answers()
    assert answer.content == expected


def test_dragging_with_a_mouse_and_ties(playwright, server, tmp_path):
    with browsing(playwright, tmp_path / "profile", viewport={"width": 1000, "height": 700}) as page:
        log_in(page, server)
        for letter, rank in zip("ABCD", (2, 1, 2, 1), strict=True):
            page.locator(f".chip[data-letter={letter}]").drag_to(page.locator(f'.tier[data-rank="{rank}"]'))
        assert page.locator('.tier[data-rank="1"] .chip').all_text_contents() == ["B", "D"]
        page.locator(".chip[data-letter=D]").drag_to(page.locator('.tier[data-rank=""]'))
        page.get_by_role("button", name="Submit").click()
        expect(page.locator("#status")).to_have_text("Not ranked yet: D.")
        page.locator(".chip[data-letter=D]").drag_to(page.locator('.tier[data-rank="4"]'))
        page.get_by_role("button", name="Submit").click()
        page.wait_for_url("**/task/2")
    order = shown_order(server.path, 1, "ann")
    assert [entered(server.path, 1)["ranks"][place] for place in order] == [2, 1, 2, 4]


def test_thirty_rankings_while_server_and_browser_are_killed(playwright, server, tmp_path):
    """Every fifth ranking is interrupted after another click; what was there before is there after."""
    digits = "1324"
    profile = tmp_path / "profile"
    kills = iter(range(1, 100))

    def interrupt(page: Page, kill: int) -> bool:
        """Whether it was the browser that was killed."""
        if kill % 2:
            server.kill()
            server.start()
            return False
        is_saved(page)
        os.kill(browser_process(profile), signal.SIGKILL)
        return True

    page = launch(playwright, profile).pages[0]
    log_in(page, server)
    for task in range(1, 31):
        page.wait_for_url(f"**/task/{task}")
        for click, digit in enumerate(digits):
            if task % 5 == 0 and click == (task // 5) % 4 and interrupt(page, next(kills)):
                page = launch(playwright, profile).pages[0]
                page.goto(server.url)
                if "/task/" not in page.url:  # Chromium writes a new cookie to its disk after half a minute
                    log_in(page, server)
                page.wait_for_url(f"**/task/{task}")
            page.keyboard.press(digit)
        page.keyboard.press("Enter")
    expect(page.get_by_text("Nothing left to do")).to_be_visible()
    page.context.close()
    project = Project.open(server.path)
    answers = project.answers()
    assert [answer.number for answer in answers] == list(range(1, 31))
    for answer in answers:
        order = shown_order(server.path, answer.number, "ann")
        assert [answer.content["ranks"][place] for place in order] == [1, 3, 2, 4]


def browser_process(profile: Path) -> int:
    """The browser's own process: the one whose parent is not of the same profile."""
    wanted = f"--user-data-dir={profile}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "cmdline").read_bytes():
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    (top,) = [process for process, parent in found.items() if parent not in found]
    return top


def test_clicks_while_the_server_is_away_arrive_when_it_is_back(playwright, server, tmp_path):
    with browsing(playwright, tmp_path / "profile") as page:
        log_in(page, server)
        press(page, "1 2")
        is_saved(page)
        server.kill()
        press(page, "3 4 A Shift+6 Enter")
        expect(page.locator("#status")).to_contain_text("kept here")
        assert page.locator("body").get_attribute("data-unsent") == "4"
        server.start()
        page.wait_for_url("**/task/2")
    content = entered(server.path, 1)
    order = shown_order(server.path, 1, "ann")
    assert [content["ranks"][place] for place in order] == [1, 2, 3, 4] and content["ratings"][order[0]] == 6


def test_a_demonstration_is_kept_as_it_is_written(playwright, tmp_path):
    project = Project.create(tmp_path / "d.sqlite", Settings(kind=DEMONSTRATIONS))
    project.add_tasks([Task("write"), Task("more")])
    project.add_labelers(["ann"], TRAINING)
    with serving(tmp_path / "d.sqlite") as server, browsing(playwright, tmp_path / "profile") as page:
        log_in(page, server)
        page.keyboard.type("us123 <b>")
        page.wait_for_timeout(200)
        is_saved(page)
        page.reload()
        page.keyboard.press("Control+End")
        page.keyboard.type("\nmore")
        page.keyboard.press("Control+Enter")
        page.wait_for_url("**/task/2")
    assert project.answers()[0].content == {"response": "us123 <b>\nmore"}


def test_readable_on_a_phone_and_blind(playwright, tmp_path):
    evil = "<script>document.title = 'run'</script>" + "long " * 300 + "w" * 300
    project = Project.create(tmp_path / "p.sqlite", Settings())
    project.add_tasks([Task("p" * 200, tuple(f"{evil} {i}" for i in range(9)), tuple(f"policy-{i}" for i in range(9)))])
    project.add_labelers(["ann"], TRAINING)
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    path = tmp_path / "p.sqlite"
    with serving(path) as server, browsing(playwright, tmp_path / "profile", **phone) as page:
        log_in(page, server)
        assert page.locator(".card").count() == 9
        assert page.title() == "Labels" and "policy-" not in page.content()
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360, "nothing to scroll sideways"
        for chip in page.locator(".chip").all():
            box = chip.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["width"] >= 26
        page.locator("#output-C .scale input[value='3']").first.check(force=True)
        is_saved(page)
    assert sorted(rank for rank in entered(path, 1)["ranks"] if rank) == [3]
