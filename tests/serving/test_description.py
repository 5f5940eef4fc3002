"""Requests that schemathesis derives from the OpenAPI description of serve.py must not cause a server error."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from fake_runs import make_run, training_records
from hypothesis import HealthCheck, Phase, settings
from starlette.testclient import TestClient

from tests.tiny_export import TOKENIZER, tiny_model
from utils.inference.generator import Generator
from utils.serving.chat import QuestionTemplate
from utils.serving.served import Runs, Served
from utils.serving.server import serving_app

pytestmark = pytest.mark.slow

EXAMPLES = 15  # per route
RUNS = Path(tempfile.mkdtemp(prefix="described-"))
GENERATOR = Generator(tiny_model(), TOKENIZER, "first")
APP = serving_app(Runs([Served("first", GENERATOR, QuestionTemplate(GENERATOR), 0)]), 4, 8, RUNS, edit=True)
schema = schemathesis.openapi.from_dict(APP.openapi())


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    for name in ("first", "second"):
        make_run(RUNS, name, metrics=training_records([3.0, 2.0, 1.0]))
    with TestClient(APP, "http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client
    shutil.rmtree(RUNS)


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_causes_a_server_error(case: schemathesis.Case, client: TestClient) -> None:
    if isinstance(case.body, dict):
        case.body["model"] = "first"  # otherwise nearly all requests would name no model
        case.body.pop("max_completion_tokens", None)
        case.body["max_tokens"] = 5  # the default of 300 would take minutes
    if case.query and "run" in case.query:
        case.query["run"] = ["first", "second"] if isinstance(case.query["run"], list) else "first"
    response = client.request(**case.as_transport_kwargs(base_url="http://127.0.0.1:8000"))
    assert response.status_code < 500, response.text
