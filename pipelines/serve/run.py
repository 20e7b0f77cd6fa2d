"""The server's life: sockets, start, and a stop that gives everyone their finals."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import uvicorn
from starlette.types import ASGIApp

from asr.errors import AsrError, ConfigError
from asr.recognizer import Recognizer
from asr.streams import busy_process
from pipelines.serve.access import Access
from pipelines.serve.app import by_port, main_app, sherpa_app, vosk_app
from pipelines.serve.connections import connection_classes
from pipelines.serve.limits import Limits
from pipelines.serve.log import event, open_log
from pipelines.serve.service import Service
from pipelines.serve.transcriptions import Transcriptions

_RECEIVE_BYTES = 128 << 10  # of a connection, that the system may hold
_PING_SECONDS = 20.0  # so that proxies keep the connection


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `asr serve` lets its user choose, the model aside; port 0 takes a free one."""

    port: int = 8000
    vosk_port: int | None = None
    sherpa_port: int | None = None
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    two_pass: bool = False
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)  # of the live sessions together
    log_text: bool = False

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("TLS needs both a certificate and its key (--tls-cert and --tls-key)")


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where the server listens: URLs."""

    main: str
    vosk: str | None = None
    sherpa: str | None = None


def run(recognizer: Recognizer, settings: Settings, started: Callable[[Addresses], None]) -> None:
    """Serve until SIGTERM or SIGINT. If a recording is still being recognized then, the process ends here.

    Raises:
        AsrError: a setting that cannot be had, such as a port that is taken.
    """

    async def until_signalled() -> bool:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        return await serve(recognizer, settings, started, stop)

    with busy_process():
        idle = asyncio.run(until_signalled())
    if not idle:  # Python would wait for its threads, for minutes perhaps
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


async def serve(
    recognizer: Recognizer, settings: Settings, started: Callable[[Addresses], None], stop: asyncio.Event
) -> bool:
    """Serve until `stop` is set; `started` is called once everything listens.

    Returns:
        Whether all work has ended; a recording that took too long may still be recognized, in a thread.

    Raises:
        AsrError: as `run`.
    """
    for network in recognizer.networks:  # what is broken is told now, and the first client need not wait
        recognizer.transcribe(np.zeros(1600, np.float32), network=network)
    log = open_log()
    service = Service(
        recognizer,
        limits=settings.limits,
        access=settings.access,
        log=log,
        two_pass=settings.two_pass,
        threads=settings.threads,
        log_text=settings.log_text,
    )
    transcriptions = Transcriptions(service)
    apps = {
        "main": (settings.port, main_app(service, transcriptions)),
        "vosk": (settings.vosk_port, vosk_app(service)),
        "sherpa": (settings.sherpa_port, sherpa_app(service)),
    }
    with contextlib.ExitStack() as opened:
        opened.callback(service.close)
        opened.callback(transcriptions.close)
        listeners = {
            name: opened.enter_context(_listen(settings.access.host, port))
            for name, (port, _) in apps.items()
            if port is not None
        }
        ports = {name: listener.getsockname()[1] for name, listener in listeners.items()}
        app = by_port({port: apps[name][1] for name, port in ports.items()})
        server = _Server(_config(app, settings), service, transcriptions)

        async def tell_and_wait() -> None:
            while not server.started:
                await asyncio.sleep(0.01)
            addresses = _addresses(settings, ports)
            event(log, "started", **asdict(addresses))
            started(addresses)
            await stop.wait()
            event(log, "stopping", sessions=len(service))
            server.should_exit = True

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(tell_and_wait())
            tasks.create_task(server.serve(list(listeners.values())))
        event(log, "stopped")
    return not transcriptions.is_busy


def _config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """uvicorn's settings, checked.

    Raises:
        AsrError: the certificate or its key cannot be read.
    """
    http, websocket = connection_classes(settings.limits)
    config = uvicorn.Config(
        app,
        http=http,
        ws=websocket,
        ws_max_size=settings.limits.message_bytes,
        ws_ping_interval=_PING_SECONDS,
        ws_ping_timeout=None,  # an answer waits behind audio that waits; who is gone is told by his silence
        ws_per_message_deflate=False,  # so a small message cannot unpack to a large one
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,  # what could drain, has by then
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise AsrError(f"{settings.tls_cert}, {settings.tls_key}: not a certificate with its key ({error})") from None
    return config


class _Server(uvicorn.Server):
    """Stops in order: no new connections, finals for those that are here, then the end. Signals are `run`'s."""

    def __init__(self, config: uvicorn.Config, service: Service, transcriptions: Transcriptions) -> None:
        super().__init__(config)
        self._service, self._transcriptions = service, transcriptions

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        self._service.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._service.limits.stop_seconds):
                while len(self._service) or len(self._transcriptions):
                    await asyncio.sleep(0.02)
        self._transcriptions.end()
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server((str(address[0]), port), family=family, backlog=2048)
        # Who sends faster than is read has seconds of audio on its way, not minutes: its pings come through.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        return listener
    except (OSError, OverflowError) as error:
        raise AsrError(f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}") from None


def _addresses(settings: Settings, ports: dict[str, int]) -> Addresses:
    host = f"[{settings.access.host}]" if ":" in settings.access.host else settings.access.host
    secure = "s" if settings.tls_cert else ""
    schemes = {"main": "http", "vosk": "ws", "sherpa": "ws"}
    return Addresses(**{name: f"{schemes[name]}{secure}://{host}:{port}" for name, port in ports.items()})
