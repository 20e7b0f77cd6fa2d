"""Refusals as HTTP replies, in the shape that OpenAI's clients read."""

from starlette.responses import JSONResponse

from pipelines.serve.limits import Refused

_KINDS = {401: "authentication_error", 429: "rate_limit_error", 503: "overloaded_error", 500: "server_error"}


def refusal(error: Refused) -> JSONResponse:
    """The error as JSON; 401 and 503 carry the header that tells what to do."""
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "5"}}.get(error.status, {})
    kind = _KINDS.get(error.status, "invalid_request_error")
    body = {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}
    return JSONResponse(body, error.status, headers)
