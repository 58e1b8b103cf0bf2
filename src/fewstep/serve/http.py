"""The server: samples over HTTP, as one picture, as JSON, as an array, or as a stream of events with previews on the way.

`make_app` puts an engine behind FastAPI. A request names a solver, a grid, a plan that was loaded before, seeds, classes, prompts; never a
file, and nothing of it is executed. What a request may ask is bounded by `Settings`. Every answer but samples is one line of JSON,
``{"detail": "..."}``; the statuses are in the description under ``/openapi.json`` and in ``docs/serve_http.md``.
"""

from __future__ import annotations

import logging
import secrets
from importlib import resources
from typing import Annotated, Any

from fewstep.errors import MissingExtraError
from fewstep.grids import grid_names
from fewstep.serve.answers import Events, answer
from fewstep.serve.faults import fault
from fewstep.serve.gate import Gate
from fewstep.serve.messages import Failure, ModelCard, Nodes, Pictures, PlanAsk, SamplesAsk, State, StreamAsk
from fewstep.serve.metrics import Metrics
from fewstep.serve.served import ServedModel, short_line
from fewstep.serve.service import RefusedError, Service
from fewstep.serve.settings import Settings
from fewstep.solvers import solver_names
from fewstep.version import __version__

try:
    from fastapi import FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise MissingExtraError("FastAPI", "serve", "The server") from error

__all__ = ["make_app"]

FILES = {"index.html": "text/html", "page.js": "text/javascript", "plan.js": "text/javascript", "page.css": "text/css"}
"""The files of the page."""
SAID = {
    401: "without the token of the server",
    404: "there is no such request",
    408: "the body did not come in time",
    409: "cancelled by another request",
    413: "the body is too large",
    422: "the request cannot be: one line says what to change",
    429: "too many requests of this client run; Retry-After says when to try again",
    500: "the network failed for this request",
    503: "the queue is full, or the server ends; Retry-After says when to try again",
    504: "not done in time",
}
SAMPLES = {
    "description": "the samples",
    "content": {
        "image/png": {"schema": {"type": "string", "format": "binary"}},
        "application/x-npy": {"schema": {"type": "string", "format": "binary"}},
    },
}
NOT = {"model": State, "description": "it does not"}
EVENTS = {
    "description": "events: accepted, preview (as often as asked for), then done or failed; lines that begin with a colon keep it open",
    "content": {
        "text/event-stream": {
            "itemSchema": {
                "type": "object",
                "required": ["event", "data"],
                "properties": {
                    "event": {"enum": ["accepted", "preview", "done", "failed"]},
                    "data": {"type": "string", "contentMediaType": "application/json"},
                },
            },
        }
    },
}

log = logging.getLogger("fewstep.serve")


def make_app(
    engine: Any, settings: Settings | None = None, *, model: ServedModel | None = None, metrics: Metrics | None = None
) -> FastAPI:
    """The server of an engine, an ASGI application.

    Args:
        engine: see `fewstep.serve.Engine`; who made it closes it.
        settings: plans, token and limits.
        model: what requests are translated with; left out, that of the engine's denoiser.
        metrics: where figures go, if something else puts figures there as well.

    Returns:
        the application; ``app.state.service`` is the `Service` behind it.

    Raises:
        MissingExtraError: if a library of the extra ``serve`` is not installed.
        PlanError: for a plan of another noise schedule than the model's.
        FewstepError: for a model that does not say the shape of its samples.
    """
    settings = settings or Settings()
    service = Service(engine, model or ServedModel(engine.denoiser, engine.null), settings, metrics or Metrics())
    app = FastAPI(
        title="fewstep",
        version=__version__,
        description=f"Samples of {service.model.info.name} in few network calls.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    _add_samples(app, service)
    _add_questions(app, service)
    _add_state(app, service)
    _add_page(app)
    _add_failures(app, service)
    service.routes = frozenset(route.path for route in app.routes if "{" not in route.path)  # type: ignore[attr-defined]
    app.add_middleware(Gate, settings=settings, watch=service)
    return app


def _failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Failure, "description": SAID[status]} for status in statuses}


def _add_samples(app: FastAPI, service: Service) -> None:
    able = _failures(401, 408, 409, 413, 422, 429, 500, 503, 504)

    @app.post("/samples", summary="Samples in one answer", responses={200: SAMPLES, **able}, response_model=Pictures)
    async def samples(ask: SamplesAsk, request: Request) -> Response:
        """Waits until the samples are done. If you hang up, the request is cancelled."""
        return await answer(service, ask, request)

    @app.post("/samples/stream", summary="Samples as events", responses={200: EVENTS, **able}, response_class=StreamingResponse)
    async def stream(ask: StreamAsk) -> Response:
        """Server-sent events: `accepted` with the id, `preview` with the data prediction on the way, `done` with the samples. If you hang
        up, the request is cancelled.
        """
        return Events(service, ask)

    @app.delete("/samples/{own}", summary="Cancel", status_code=204, responses=_failures(401, 404, 413, 422))
    async def cancel(own: str) -> Response:
        """Cancels the request of this id, which its answer or its event `accepted` tells."""
        if not service.cancel(own):
            raise RefusedError(404, "no request with this id is running.")
        return Response(status_code=204)


def _add_questions(app: FastAPI, service: Service) -> None:
    @app.get("/model", summary="What is served, and the limits", responses=_failures(401, 413))
    def model() -> ModelCard:
        """The model, the names that requests may use, and the limits."""
        return service.card(solver_names(), grid_names())

    @app.get("/plan", summary="A plan, to be drawn", responses=_failures(401, 413, 422))
    def plan(ask: Annotated[PlanAsk, Query()]) -> Nodes:
        """The noise levels and the times of the calls of a plan, as a request for samples names it."""
        return service.nodes(service.plan_of(ask))


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", summary="Whether it lives", responses={**_failures(413), 503: NOT})
    async def health(response: Response) -> State:
        """Whether the engine's thread runs, and is not stuck: `stalled` where it has work and has not moved for the time that is set."""
        response.status_code = 200 if service.alive else 503
        return State(status=service.state)

    @app.get(
        "/ready",
        summary="Whether it takes requests",
        responses={**_failures(413), 503: NOT},
    )
    async def ready(response: Response) -> State:
        """Whether the server takes requests: not while it ends."""
        if service.alive and not service.draining:
            return State(status="ready")
        response.status_code = 503
        return State(status="draining" if service.draining else service.state)

    @app.get(
        "/metrics",
        summary="Figures for Prometheus",
        response_class=PlainTextResponse,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_failures(401, 413)},
    )
    def figures() -> Response:
        """Counters, histograms and gauges."""
        return Response(service.metrics.text(service.engine.statistics()), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    folder = resources.files("fewstep.serve") / "page"
    contents = {name: (folder / name).read_bytes() for name in FILES}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(contents["index.html"], media_type="text/html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in contents:
            raise RefusedError(404, "no such file.")
        return Response(contents[name], media_type=FILES[name])


def _add_failures(app: FastAPI, service: Service) -> None:
    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return JSONResponse({"detail": error.detail}, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        route = getattr(request.scope.get("route"), "path", "")
        return JSONResponse({"detail": short_line(fault(error.errors(), route, request.headers.get("content-type")))}, 422)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        status = 422 if error.status_code == 400 else error.status_code
        return JSONResponse({"detail": short_line(error.detail)}, status, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        own = secrets.token_hex(8)
        log.error("an answer failed; %s", own, exc_info=error)
        service.answered(request.url.path, request.method, 500)
        return JSONResponse({"detail": f"the server failed on this request; its id in the log is {own}."}, 500)
