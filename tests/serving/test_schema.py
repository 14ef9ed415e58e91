"""Any request that the OpenAPI schema allows, and many that it does not, against what the schema
says about answers."""

import os
from dataclasses import replace

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode, checks

from serving.security import Credentials
from tests.serving.served import LIMITS, app_of, make_generator, running

TOKEN = "a-token-of-the-schema-tests"
EXAMPLES = int(os.environ.get("RETROMILL_SCHEMA_EXAMPLES", "25"))
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
SMALL = replace(LIMITS, max_new_tokens=8, max_prompt_tokens=64, max_choices=4, max_documents=4)

checks.load_all_checks()
CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "ignored_auth",
)


@pytest.fixture(scope="module")
def schema(tokenizer_url):
    generator = make_generator(tokenizer_url, SMALL)
    app = app_of(generator, Credentials((TOKEN,)))
    with running(generator):
        yield schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)
        assert generator.engine.is_serving


def operations(schema):
    return [result.ok() for result in schema.get_all_operations()]


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_answers_are_as_the_schema_says_and_never_a_fault(schema, mode):
    checked = checks.CHECKS.get_by_names(list(CHECKED))
    for operation in operations(schema):
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case):
            case.call_and_validate(headers=HEADERS, checks=checked)

        check()


def test_every_route_is_in_the_schema(schema):
    labels = {operation.label for operation in operations(schema)}
    assert labels == {
        "POST /v1/completions",
        "POST /v1/retrieve",
        "POST /v1/documents",
        "GET /v1/documents",
        "DELETE /v1/documents",
        "GET /v1/retrieval/weights",
        "PUT /v1/retrieval/weights",
        "PUT /generate",
        "PUT /knn",
        "GET /v1/models",
        "GET /healthz",
        "GET /metrics",
    }
