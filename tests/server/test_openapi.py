"""Requests made from the API's own description, valid and not: no 5xx, and no answer but those described."""

import asyncio

import hypothesis
import pytest

from vlm.server.app import create_app
from vlm.server.serving import open_service

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture
def described(index, model):
    """The description as it is served, with real names in place of made-up ones."""
    service = open_service({"index": index}, write_tokens=frozenset({"w"}), load=lambda _: model)
    uid = service.index("index").service.index.catalogue.entries([0])[0].uid
    app = create_app(service)
    schema = schemathesis.openapi.from_asgi("/api/v1/openapi.json", app)

    @schema.hook
    def map_path_parameters(context, path_parameters):
        return (
            {**path_parameters, "name": "index"} if path_parameters and "name" in path_parameters else path_parameters
        )

    @schema.hook
    def map_query(context, query):
        # half of the uids are real, so that images are read too
        if query and "uid" in query and len(str(query["uid"])) % 2:
            query["uid"] = uid
        return query

    yield schema
    asyncio.run(service.close())


def check_all(schema, *, examples, seed=0):
    """Number of answers by status; the first that breaks the description fails."""
    statuses = {}
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(case=operation.as_strategy())
        def check(case):
            answer = case.call(headers={"authorization": "Bearer w"})
            # what the description cannot say (a filter's language, a vector's length) may be refused
            case.validate_response(answer, excluded_checks=[schemathesis.checks.positive_data_acceptance])
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1

        check()
    assert not [status for status in statuses if status >= 500]
    return statuses


def test_made_up_requests_get_the_answers_that_are_described(described):
    statuses = check_all(described, examples=4)
    assert statuses[200] > 10
    assert statuses[400] > 5


@pytest.mark.slow
def test_many_made_up_requests_get_the_answers_that_are_described(described):
    assert check_all(described, examples=150, seed=1)[200] > 300
