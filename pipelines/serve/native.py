"""The server's own websocket protocol, /v1/stream; docs/server.md describes it."""

import json
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket

from asr.endpoint import EndpointConfig
from asr.errors import ConfigError
from pipelines.formats import final_message, partial_message
from pipelines.serve.limits import Refused
from pipelines.serve.pcm import FORMATS, Format, PcmReader
from pipelines.serve.session import Channel

if TYPE_CHECKING:
    from pipelines.serve.service import Service


@dataclass(frozen=True, kw_only=True)
class Start:
    """The start message: how the audio comes and how it is to be read; None: as the server was told."""

    sample_rate: int = 16_000
    format: Format = "s16le"
    endpoint: EndpointConfig | None = None
    two_pass: bool | None = None
    token: str | None = None


def parse_start(message: str | bytes, usual: EndpointConfig = EndpointConfig()) -> Start:  # noqa: B008 (frozen)
    """Read a start message; what it leaves out of its endpoint settings is as in `usual`.

    Raises:
        Refused: names what is wrong with it.
    """
    given = _without_null(parse_object(message))
    if given.pop("type", None) != "start":
        raise _wrong('the first message must be {"type": "start", ...}')
    known = {field.name for field in fields(Start)}
    for name in given.keys() - known:
        raise _wrong(f"{name[:40]!r} is no setting of the start message; there are {', '.join(sorted(known))}")
    check(given, "sample_rate", int)
    check(given, "two_pass", bool)
    check(given, "token", str)
    if given.get("format", "s16le") not in FORMATS:
        raise _wrong(f"format must be {' or '.join(FORMATS)}")
    if "endpoint" in given:
        given["endpoint"] = parse_endpoint(given["endpoint"], usual)
    return Start(**given)


def parse_endpoint(given: Any, usual: EndpointConfig) -> EndpointConfig:
    """Endpoint settings out of JSON; what is left out is as in `usual`.

    Raises:
        Refused: names what is wrong with them.
    """
    if not isinstance(given, dict):
        raise _wrong("endpoint must be an object")
    given = _without_null(given)
    kinds = {field.name: type(field.default) for field in fields(EndpointConfig)}
    for name in given.keys() - kinds.keys():
        raise _wrong(f"endpoint has no setting {name[:40]!r}; there are {', '.join(kinds)}")
    for name, kind in kinds.items():
        check(given, name, kind, "endpoint.")
    try:
        return replace(usual, **given)
    except ConfigError as error:
        raise Refused(str(error), code="bad_settings") from None


def parse_object(message: str | bytes) -> dict[str, Any]:
    """A message as a JSON object.

    Raises:
        Refused: it is none.
    """
    try:
        given = json.loads(message)
    except (ValueError, RecursionError):
        raise _wrong("not JSON") from None
    if not isinstance(given, dict):
        raise _wrong("not a JSON object")
    return given


def check(given: dict[str, Any], name: str, kind: type, prefix: str = "") -> None:
    """Refuse a value of another type; None, and an integer for a float, will do.

    Raises:
        Refused: names the value.
    """
    value = given.get(name)
    if value is None:
        return
    right = isinstance(value, (int, float) if kind is float else kind)
    if not right or (isinstance(value, bool) and kind is not bool):
        raise _wrong(f"{prefix}{name} must be {_SPOKEN[kind]}")


_SPOKEN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


async def talk(channel: Channel, service: "Service", websocket: WebSocket) -> None:
    """Serve one client from its start message to its last final.

    Raises:
        Refused: it broke a rule.
        ClientGone: it left.
    """
    message = await channel.receive(within=service.limits.start_seconds)
    if message is None:
        raise channel.ending or Refused("no start message came", code="idle")
    start = parse_start(message, service.endpoint)
    websocket.state.known = websocket.state.known or service.access.knows(start.token)
    with service.session(channel, "native", websocket) as live:
        live.open(start.sample_rate, start.endpoint, start.two_pass)
        reader = PcmReader(start.format)
        await channel.send({"type": "ready", "networks": service.recognizer.networks})
        while (message := await channel.receive()) is not None:
            if isinstance(message, str):
                if parse_object(message).get("type") != "finish":
                    raise _wrong('after the start message, text messages are {"type": "finish"}')
                break
            update = await live.feed(reader.read(message))
            for segment in update.final:
                await channel.send(final_message(segment))
            await channel.send(partial_message(update.partial, live.seconds))
        for segment in await live.finish():
            await channel.send(final_message(segment))
        await channel.send({"type": "done", "duration": round(live.seconds, 3)})


def _without_null(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _wrong(message: str) -> Refused:
    return Refused(message, code="bad_message", close=1007)
