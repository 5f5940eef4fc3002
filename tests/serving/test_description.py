"""Requests that schemathesis makes from the OpenAPI description of serve.py: none may be an error of the server."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from starlette.testclient import TestClient

from tests.tiny_export import TOKENIZER, tiny_model
from utils.inference.generator import Generator
from utils.serving.chat import QuestionTemplate
from utils.serving.served import Runs, Served
from utils.serving.server import serving_app

pytestmark = pytest.mark.slow

EXAMPLES = 15  # of each route
GENERATOR = Generator(tiny_model(), TOKENIZER, "first")
APP = serving_app(Runs([Served("first", GENERATOR, QuestionTemplate(GENERATOR), 0)]), 4, 8)
schema = schemathesis.openapi.from_dict(APP.openapi())


@pytest.fixture(scope="module")
def client() -> TestClient:
    with TestClient(APP, "http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_is_an_error_of_the_server(case: schemathesis.Case, client: TestClient) -> None:
    if isinstance(case.body, dict):
        case.body["model"] = "first"  # else nearly all are for no model
        case.body.pop("max_completion_tokens", None)
        case.body["max_tokens"] = 5  # the default of 300 would take minutes
    response = client.request(**case.as_transport_kwargs(base_url="http://127.0.0.1:8000"))
    assert response.status_code < 500, response.text
