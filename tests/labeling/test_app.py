"""The page over HTTP, without a browser and without its script: what it shows, refuses and keeps."""

import re
from itertools import count

import pytest
from labeling.projects import make_project
from starlette.testclient import TestClient

from megatron_rlhf.labeling.access import ADMIN, MAX_BODY, Access, Allowance
from megatron_rlhf.labeling.answers import cards
from megatron_rlhf.labeling.app import create_app
from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import DEMONSTRATIONS, TRAINING, Settings, Task

TOKEN = "a token of some length"
NONCES = (f"nonce {i:04d}" for i in count())


def client_of(project: Project, token: str | None = None) -> TestClient:
    access = Access(token, project.settings.secret)
    return TestClient(create_app(project, access, lambda project: {}), base_url="http://127.0.0.1:8420")


def csrf_of(page: str) -> str:
    return re.search(r'data-csrf="([^"]+)"', page)[1]


def log_in(client: TestClient, name: str) -> str:
    """The page that the labeler gets."""
    client.post(f"/login/{name}", data={"csrf": csrf_of(client.get("/").text)})
    return client.get("/").text


def send(client: TestClient, url: str, page: str, **fields):
    return client.post(url, data={"csrf": csrf_of(page), "nonce": next(NONCES), **fields})


@pytest.fixture
def project(tmp_path) -> Project:
    return make_project(tmp_path / "p.sqlite", labels_per_prompt=2)


def test_a_ranking_by_forms_alone(project):
    client = client_of(project)
    page = log_in(client, "ann")
    shown = cards(project.task(1).outputs, f"{project.settings.secret} 1 ann")
    half = send(client, "/task/1/submit", page, rank_A="1", rank_B="2", rank_C="2")
    assert half.status_code == 422 and "Not ranked yet: D." in half.text
    assert 'name="rank_B" value="2" checked' in half.text, "what was entered is kept"
    ranks = {f"rank_{card.letter}": str(card.places[0] + 1) for card in shown}
    done = send(client, "/task/1/submit", page, **ranks, rating_A="6", is_A=["opinion", "hallucination"])
    assert done.url.path == "/task/2"
    (answer,) = project.answers()
    first = shown[0].places[0]
    assert answer.content["ranks"] == [1, 2, 3, 4]
    assert answer.content["ratings"][first] == 6
    assert answer.content["metadata"][first] == ["hallucination", "opinion"]
    back = send(client, "/undo", page)
    assert back.url.path == "/task/1" and 'name="rating_A" value="6" checked' in back.text


def test_labelers_are_blind_and_see_orders_of_their_own(project):
    orders = []
    for name in ("ann", "bob"):
        page = log_in(client_of(project), name)
        assert "policy-" not in page
        found = re.findall(r"output (\d) to 0<", page)
        assert sorted(found) == ["0", "1", "2", "3"]
        orders.append(found)
    expected = [
        [str(card.places[0]) for card in cards(project.task(1).outputs, f"{project.settings.secret} 1 {name}")]
        for name in ("ann", "bob")
    ]
    assert orders == expected


def test_everything_is_text(tmp_path):
    evil = "<script>alert(1)</script>\"'&amp;"
    project = Project.create(tmp_path / "p.sqlite", Settings(title=evil, instructions=evil))
    project.add_tasks([Task(evil, (evil, "b"))])
    project.add_labelers(["ann"], TRAINING)
    client = client_of(project)
    page = log_in(client, "ann")
    noted = send(client, "/task/1/submit", page, note=evil)
    for text in (page, noted.text):
        assert "<script>alert" not in text
        assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;amp;") >= 5
    policy = client.get("/").headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    send(client, "/task/1/skip", page, reason="other", skip_note=evil)
    assert "<script>alert" not in client.get("/agreement").text


def test_forms_of_other_pages_are_refused(project):
    client = client_of(project)
    page = log_in(client, "ann")
    for url in ("/task/1/draft", "/task/1/submit", "/task/1/skip", "/undo", "/logout", "/login/bob"):
        for csrf in ({}, {"csrf": "guessed"}, {"csrf": csrf_of(client_of(project).get("/").text)}):
            assert client.post(url, data={"nonce": next(NONCES), "rank_A": "1", **csrf}).status_code == 403, url
        assert client.get(url).status_code in (403, 404, 405), "nothing changes by following a link"
    assert project.content("ann", 1) == {}
    assert send(client, "/task/1/draft", page, rank_A="1").status_code == 200


def test_another_site_cannot_reach_a_page_without_a_token(project):
    rebound = TestClient(create_app(project, Access(None, "s"), lambda project: {}), base_url="http://evil.example")
    assert rebound.get("/").status_code == 400


def test_with_a_token_only_a_link_lets_in(project):
    access = Access(TOKEN, project.settings.secret)
    client = client_of(project, TOKEN)
    page = client.get("/")
    assert page.status_code == 401 and "ann" not in page.text
    assert client.post("/login/ann", data={"csrf": csrf_of(page.text)}).status_code == 403
    assert client.get("/task/1").status_code == 401
    for wrong in (
        "/login/ann/guess",
        access.link("bob").replace("bob", "ann"),
        "/admin/guess",
        Access("another token here", "").link("ann"),
    ):
        assert client.get(wrong).status_code == 403
    assert client.get(access.link("ann")).url.path == "/task/1"
    assert client.get("/agreement").status_code == 403, "labelers do not see agreement"
    admin = client_of(project, TOKEN)
    assert admin.get(access.link(ADMIN)).url.path == "/agreement"
    assert admin.get("/task/1").status_code == 401
    cookie = client.cookies.get("labeling")
    changed = client_of(project, "another token, longer")
    changed.cookies.set("labeling", cookie)
    assert changed.get("/task/1").status_code == 401, "cookies of the old token are worthless"


def test_a_labeler_cannot_touch_anothers_task(project):
    client = client_of(project)
    log_in(client, "ann")
    other = client_of(project)
    page = log_in(other, "cy")
    assert project.current("bob") == 1 and project.current("cy") == 1
    assert send(other, "/task/2/submit", page, rank_A="1").status_code == 409
    assert other.get("/task/2").status_code == 409
    assert other.get("/task/99").status_code == 409


def test_unknown_labelers_and_bad_fields(project):
    client = client_of(project)
    assert client.post("/login/eve", data={"csrf": csrf_of(client.get("/").text)}).status_code == 404
    page = log_in(client, "ann")
    assert send(client, "/task/1/draft", page, rank_A="99").status_code == 409
    assert send(client, "/task/1/skip", page, reason="bored").status_code == 409
    assert client.post("/task/1/draft", data={"csrf": csrf_of(page)}).status_code == 409
    assert send(client, "/task/1/draft", page, note="x" * MAX_BODY).status_code == 413
    assert project.content("ann", 1) == {}


def test_the_script_gets_json(project):
    client = client_of(project)
    page = log_in(client, "ann")
    headers = {"accept": "application/json", "x-csrf": csrf_of(page)}
    draft = client.post("/task/1/draft", data={"nonce": next(NONCES), "rank_A": "2"}, headers=headers)
    assert draft.json() == {"next": "/task/1"}
    assert client.post("/task/1/submit", data={"nonce": next(NONCES)}, headers=headers).json()["problem"]
    refused = client.post("/task/3/draft", data={"nonce": next(NONCES)}, headers=headers)
    assert (refused.status_code, refused.json()) == (409, {"problem": "task 3 is not one of yours"})


def test_demonstrations(tmp_path):
    project = Project.create(tmp_path / "d.sqlite", Settings(kind=DEMONSTRATIONS))
    project.add_tasks([Task("write"), Task("more")])
    project.add_labelers(["ann"], TRAINING)
    client = client_of(project)
    page = log_in(client, "ann")
    assert send(client, "/task/1/submit", page, response=" \n").status_code == 422
    assert send(client, "/task/1/submit", page, response="\nwell\r\nwritten").url.path == "/task/2"
    assert project.answers()[0].content == {"response": "\nwell\nwritten"}
    again = send(client, "/undo", page)
    assert "\n\nwell\nwritten</textarea>" in again.text, "the first line end after the tag is not part of the text"


def test_too_many_requests_are_put_off():
    now = [0.0]
    allowance = Allowance(burst=3, per_second=2, clock=lambda: now[0])
    assert [allowance.take("a") for _ in range(4)] == [True, True, True, False]
    assert allowance.take("b")
    now[0] = 0.5
    assert [allowance.take("a") for _ in range(2)] == [True, False]
    now[0] = 100
    assert [allowance.take("a") for _ in range(4)] == [True, True, True, False]


def test_the_page_limits_requests_and_logins(project):
    client = client_of(project, TOKEN)
    codes = [client.get("/login/ann/guess").status_code for _ in range(25)]
    assert codes[0] == 403 and codes[-1] == 429
    few = create_app(project, Access(None, "s"), lambda project: {}, allowance=Allowance(burst=5, per_second=0.01))
    codes = [TestClient(few, base_url="http://localhost").get("/").status_code for _ in range(6)]
    assert codes == [200] * 5 + [429]


def test_there_is_no_such_task(project):
    client = client_of(project)
    page = log_in(client, "ann")
    for number, status in ((99, 409), (2**63 - 1, 409), (2**63, 404), (10**30, 404)):
        assert client.get(f"/task/{number}").status_code == status
        assert send(client, f"/task/{number}/submit", page).status_code == status
