"""The server's log: a JSON object a line, with nobody's audio or text in it unless that was asked for."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO


class _JsonLines(logging.Formatter):
    """A record as one line; the fields of `event` beside time, level and event."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def open_log(out: TextIO | None = None) -> logging.Logger:
    """The server's logger; the libraries under it write their warnings through it as well."""
    handler = logging.StreamHandler(out or sys.stderr)
    handler.setFormatter(_JsonLines())
    for name, level in (("asr.serve", logging.INFO), ("uvicorn.error", logging.WARNING), ("asr", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)
    return logging.getLogger("asr.serve")


def event(log: logging.Logger, name: str, **fields: Any) -> None:
    """Write one event with its fields; those that are None are left out."""
    log.info(name, extra={"fields": {key: value for key, value in fields.items() if value is not None}})
