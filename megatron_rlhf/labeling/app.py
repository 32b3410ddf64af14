"""The page itself: server-rendered, one small script, every click a request that is on the disk before it is answered."""

import hmac
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from megatron_rlhf.labeling import answers, questions
from megatron_rlhf.labeling.access import ADMIN, Access, Allowance, Guard
from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import RANKINGS, Refused

HERE = Path(__file__).parent
SESSION_SECONDS = 14 * 24 * 3600
LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]"]


class Page:
    """The handlers, around one project."""

    def __init__(self, project: Project, access: Access, agreement: Callable[[Project], Mapping[str, Any]]):
        self.project, self.access, self.agreement_of = project, access, agreement
        self.templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self.logins = Allowance(burst=20, per_second=0.2)

    # Who it is.

    async def login(self, request: Request) -> Response:
        """By a link, where there is a token; by a button, on this machine."""
        name, key = request.path_params["name"], request.path_params.get("key", "")
        if request.method == "GET":
            if not self.logins.take(request.client.host if request.client else ""):
                raise HTTPException(429, "too many logins; wait a minute")
            if not self.access.is_key(name, key):
                raise HTTPException(403, "this login link is not valid; ask for a new one")
        else:
            await self._form(request)
            if self.access.token is not None:
                raise HTTPException(403, "open your login link")
        if name != ADMIN and name not in self.project.labelers():
            raise HTTPException(404, f"there is no labeler {name}; ask who runs this project to add you")
        request.session.clear()
        request.session["labeler"] = name
        return RedirectResponse("/agreement" if name == ADMIN else "/", 303)

    async def admin(self, request: Request) -> Response:
        request.path_params["name"] = ADMIN
        return await self.login(request)

    async def logout(self, request: Request) -> Response:
        await self._form(request)
        request.session.clear()
        return RedirectResponse("/", 303)

    def _labeler(self, request: Request) -> str:
        labeler = request.session.get("labeler")
        if not labeler or labeler not in self.project.labelers():
            raise HTTPException(401, "you are not logged in")
        return str(labeler)

    async def _form(self, request: Request) -> Any:
        """The request's form, which must come from one of our pages."""
        form = await request.form()
        sent = request.headers.get("x-csrf") or form.get("csrf")
        if not isinstance(sent, str) or not hmac.compare_digest(sent.encode(), _csrf(request).encode()):
            raise HTTPException(403, "this page is out of date; reload it")
        return form

    # What is labeled.

    async def home(self, request: Request) -> Response:
        labeler = request.session.get("labeler")
        if labeler == ADMIN:
            return RedirectResponse("/agreement", 303)
        if labeler not in self.project.labelers():
            names = [] if self.access.token is not None else self.project.labelers()
            return self._render(request, "login", 200 if names else 401, names=names)
        task = self.project.current(labeler)
        if task is None:
            return self._render(request, "done")
        return RedirectResponse(f"/task/{task}", 303)

    async def task(self, request: Request) -> Response:
        labeler, number = self._labeler(request), _task_number(request)
        if self.project.status(labeler, number) != "open":
            return RedirectResponse("/", 303)
        return self._task_page(request, labeler, number, "")

    def _task_page(self, request: Request, labeler: str, number: int, problem: str) -> Response:
        status = 422 if problem else 200
        content, task = self.project.content(labeler, number), self.project.task(number)
        common = {"number": number, "task": task, "content": content, "problem": problem}
        if self.project.settings.kind != RANKINGS:
            return self._render(request, "demonstrate", status, **common)
        return self._render(request, "rank", status, cards=self._cards(labeler, number, task.outputs), **common)

    def _cards(self, labeler: str, number: int, outputs: tuple[str, ...]) -> list[answers.Card]:
        return answers.cards(outputs, f"{self.project.settings.secret} {number} {labeler}")

    async def click(self, request: Request) -> Response:
        """`draft`, `submit` or `skip`: kept, then answered."""
        labeler, number, action = self._labeler(request), _task_number(request), request.path_params["action"]
        form = await self._form(request)
        self.project.status(labeler, number)  # before anything else is told about the task
        shown = self._cards(labeler, number, self.project.task(number).outputs)
        ranking = self.project.settings.kind == RANKINGS
        content = answers.read_ranking(form, shown) if ranking else answers.read_demonstration(form)
        if action == "skip":
            content = answers.read_skip(form)
        elif action == "submit":
            problem = answers.missing(content, shown, self.project.settings.require_ratings)
            if problem:
                self.project.record(labeler, number, "draft", content, _nonce(form))
                if _wants_json(request):
                    return JSONResponse({"problem": problem}, 422)
                return self._task_page(request, labeler, number, problem)
        self.project.record(labeler, number, action, content, _nonce(form))
        return _after(request, f"/task/{number}" if action == "draft" else "/")

    async def undo(self, request: Request) -> Response:
        labeler, form = self._labeler(request), await self._form(request)
        task = self.project.undo(labeler, _nonce(form))
        return _after(request, "/" if task is None else f"/task/{task}")

    # What has come of it.

    async def agreement(self, request: Request) -> Response:
        """For whoever runs the project: labelers would be led by it."""
        if self.access.token is not None and request.session.get("labeler") != ADMIN:
            raise HTTPException(403, "this page needs the link of whoever runs the project")
        return self._render(request, "agreement", teams=self.agreement_of(self.project), skips=self.project.skips())

    def _render(self, request: Request, name: str, status: int = 200, **values: Any) -> Response:
        labeler = request.session.get("labeler")
        progress = self.project.progress()
        page = self.templates.get_template(f"{name}.html.j2").render(
            settings=self.project.settings,
            questions=questions,
            labeler=labeler if labeler in self.project.labelers() else "",
            is_admin=labeler == ADMIN or self.access.token is None,
            mine=next((entry for entry in progress if entry.labeler == labeler), None),
            left=self.project.left(labeler) if labeler in self.project.labelers() else 0,
            progress=progress,
            prompts=self.project.size(),
            csrf=_csrf(request),
            nonce=secrets.token_urlsafe(12),
            **values,
        )
        return HTMLResponse(page, status)

    async def problem(self, request: Request, error: Exception) -> Response:
        """A refusal as a page, or as JSON for the script."""
        status = error.status_code if isinstance(error, HTTPException) else 409
        text = error.detail if isinstance(error, HTTPException) else str(error)
        if _wants_json(request):
            return JSONResponse({"problem": text}, status)
        return self._render(request, "problem", status, text=text)


def create_app(
    project: Project,
    access: Access,
    agreement: Callable[[Project], Mapping[str, Any]],
    https: bool = False,
    allowance: Allowance | None = None,
) -> Starlette:
    """The page as an ASGI application.

    Args:
        agreement: Makes the figures of the agreement page: team -> an object such as `evaluation.agreement.Agreement`.
        https: The browser sees https, so that cookies are kept from anything else.
        allowance: How many requests a client may make.
    """
    page = Page(project, access, agreement)
    middleware = [
        Middleware(Guard, allowance=allowance or Allowance(burst=300, per_second=60)),
        Middleware(
            SessionMiddleware,
            secret_key=access.cookie_key,
            session_cookie="labeling",
            max_age=SESSION_SECONDS,
            same_site="lax",
            https_only=https,
        ),
    ]
    if access.token is None:  # another site's name that resolves to this machine must not reach it
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES))
    number = "/task/{number:int}"
    return Starlette(
        routes=[
            Route("/", page.home),
            Route("/login/{name}/{key}", page.login),
            Route("/login/{name}", page.login, methods=["POST"]),
            Route("/admin/{key}", page.admin),
            Route("/logout", page.logout, methods=["POST"]),
            Route(number, page.task),
            *(
                Route(f"{number}/{action}", _click(page, action), methods=["POST"])
                for action in ("draft", "submit", "skip")
            ),
            Route("/undo", page.undo, methods=["POST"]),
            Route("/agreement", page.agreement),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        middleware=middleware,
        exception_handlers={Refused: page.problem, HTTPException: page.problem},
    )


def _click(page: Page, action: str) -> Callable[[Request], Any]:
    async def handle(request: Request) -> Response:
        request.path_params["action"] = action
        return await page.click(request)

    return handle


def _task_number(request: Request) -> int:
    number = int(request.path_params["number"])
    if number >= 2**63:  # more than the database has numbers
        raise HTTPException(404, f"there is no task {number}")
    return number


def _csrf(request: Request) -> str:
    return str(request.session.setdefault("csrf", secrets.token_urlsafe(24)))


def _nonce(form: Any) -> str:
    nonce = form.get("nonce")
    if not isinstance(nonce, str) or not 8 <= len(nonce) <= 64:
        raise Refused("a click without a number of its own; reload the page")
    return nonce


def _wants_json(request: Request) -> bool:
    return request.headers.get("accept") == "application/json"


def _after(request: Request, place: str) -> Response:
    return JSONResponse({"next": place}) if _wants_json(request) else RedirectResponse(place, 303)
