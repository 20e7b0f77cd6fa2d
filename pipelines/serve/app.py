"""The server's addresses: which path, on which port, leads where."""

import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from pipelines.serve import native, sherpa, vosk
from pipelines.serve.access import Guard, Lock
from pipelines.serve.limits import ClientGone, Refused
from pipelines.serve.replies import refusal
from pipelines.serve.service import Service
from pipelines.serve.session import Channel
from pipelines.serve.transcriptions import Transcriptions, listed_models

PAGE = Path(__file__).parent / "page"
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Talk = Callable[..., Awaitable[None]]
_log = logging.getLogger("asr.serve")


def main_app(service: Service, transcriptions: Transcriptions) -> ASGIApp:
    """What the main port serves: the page, the native websocket, OpenAI's endpoints, health and metrics."""

    async def health(request: Request) -> Response:
        state = "stopping" if service.stopping else "ok"
        return JSONResponse({"status": state, "sessions": len(service)}, 503 if service.stopping else 200)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.render(), media_type=_METRICS_TYPE)

    async def models(request: Request) -> Response:
        listed = listed_models(service.recognizer.networks)
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": listed})
        for model in listed:
            if model["id"] == request.path_params["name"]:
                return JSONResponse(model)
        return refusal(Refused("there is no such model", code="model_not_found", status=404))

    async def failed(request: Request, error: Exception) -> Response:
        return refusal(Refused("the server failed; its log tells more", code="internal", status=500))

    async def not_there(request: Request, error: Exception) -> Response:
        return refusal(Refused("there is nothing here", code="not_found", status=404))

    async def not_so(request: Request, error: Exception) -> Response:
        return refusal(Refused(f"{request.method} is not for this address", code="method_not_allowed", status=405))

    page = StaticFiles(directory=PAGE, html=True)
    routes = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name}", models),
        Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
        WebSocketRoute("/v1/stream", websocket(service, native.talk)),
        WebSocketRoute("/{path:path}", _nowhere),
        # Each file has its route: a mount takes every path, and 405 is its answer to a POST where there is nothing.
        *(Route(f"/{name}", page, methods=["GET"]) for name in ("", *sorted(os.listdir(PAGE)))),
    ]
    handlers: dict[Any, Any] = {500: failed, 404: not_there, 405: not_so}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # /health/ is not there, as any other
    shared = CORSMiddleware(
        Lock(app),
        allow_origins=service.access.origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's client for JavaScript sends a dozen of its own
    )
    return Guard(shared, service.access)


def vosk_app(service: Service) -> ASGIApp:
    """What the Vosk port serves."""
    return Guard(Starlette(routes=[WebSocketRoute("/{path:path}", websocket(service, vosk.talk))]), service.access)


def sherpa_app(service: Service) -> ASGIApp:
    """What the sherpa-onnx port serves."""
    return Guard(Starlette(routes=[WebSocketRoute("/{path:path}", websocket(service, sherpa.talk))]), service.access)


def by_port(apps: dict[int, ASGIApp]) -> ASGIApp:
    """One application for several ports."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await apps[scope["server"][1]](scope, receive, send)

    return app


def websocket(service: Service, talk: Talk) -> Callable[[WebSocket], Awaitable[None]]:
    """An endpoint that talks one protocol and ends every conversation in order."""

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        channel = Channel(websocket, service.limits.idle_seconds)
        try:
            await talk(channel, service, websocket)
            if channel.ending is not None:
                service.metrics.dropped.labels(channel.ending.code).inc()
            await channel.close(channel.ending)
        except ClientGone:
            pass
        except Refused as error:
            service.metrics.dropped.labels(error.code).inc()
            await channel.close(error)
        except Exception:
            _log.exception("session failed")
            await channel.close(Refused("the server failed; its log tells more", code="internal", close=1011))

    return endpoint


async def _nowhere(websocket: WebSocket) -> None:
    await websocket.close()
