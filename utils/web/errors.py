"""Errors of the servers, in the form that clients of the OpenAI API expect."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from utils.errors import SHOWN, UserError, cut
from utils.terminal.words import one_line

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """What was wrong with a request.

    type: the kind of error, which follows from the status.
    param: the field of the request.
    code: a name for programs.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


class ApiError(Exception):
    """Ends a request with this status and message."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers


def error_detail(error: ApiError) -> ErrorDetail:
    """Describe an error for the body of the response."""
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return ErrorDetail(message=one_line(str(error)), type=kind, param=error.param, code=error.code)


def error_response(error: ApiError) -> JSONResponse:
    """Make the response to a request that ended with an error."""
    return JSONResponse(ErrorBody(error=error_detail(error)).model_dump(), error.status, error.headers)


def answer_errors(app: FastAPI) -> None:
    """Let the app answer every error of a request with an ErrorBody."""

    @app.exception_handler(ApiError)
    async def _(_request: Request, error: ApiError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(UserError)
    async def _(_request: Request, error: UserError) -> JSONResponse:
        return error_response(ApiError(400, "; ".join(str(error).splitlines())))

    @app.exception_handler(RequestValidationError)
    async def _(_request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(validation_error(error))

    @app.exception_handler(HTTPException)
    async def _(_request: Request, error: HTTPException) -> JSONResponse:
        return error_response(ApiError(error.status_code, str(error.detail), headers=error.headers))


def validation_error(error: RequestValidationError) -> ApiError:
    """The first mistake of a request, in one line.

    A validator of several fields names the field to blame as `param` in the context of its PydanticCustomError.
    """
    detail = error.errors()[0]
    if "param" in detail.get("ctx", {}):
        return ApiError(400, detail["msg"], param=detail["ctx"]["param"])
    if detail["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {detail.get('ctx', {}).get('error', detail['msg'])}")
    place = [str(part) for part in detail["loc"] if part not in ("body", "query", "path", "header")]
    param = cut(one_line(".".join(place)), SHOWN) or None
    message = detail["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param)
