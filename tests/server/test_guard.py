"""Tokens, limits and the shape of every answer."""

import asyncio
import json

import pytest

from tests.server.conftest import Caller
from vlm.server.app import PAGE_FILES, create_app
from vlm.server.guard import Guard, Limits, RateLimiter, Tokens
from vlm.server.serving import open_service

WRITING = {"/api/v1/indexes/{name}/add", "/api/v1/indexes/{name}/delete"}
OPEN = {"/health", "/ready"}


@pytest.fixture
def guarded(index, model):
    """Callers with no token, a wrong one, one to read, one to write."""
    service = open_service(
        {"index": index}, read_tokens=frozenset({"r"}), write_tokens=frozenset({"w"}), load=lambda _: model
    )
    app = create_app(service)
    secrets = {"none": "", "wrong": "x", "read": "r", "write": "w"}
    return {
        who: Caller(app, {"authorization": f"Bearer {secret}"} if secret else {}) for who, secret in secrets.items()
    }


def routes(caller):
    described = caller.get("/api/v1/openapi.json").json()["paths"]
    for path, methods in described.items():
        for method in methods:
            yield path, method.upper()


def test_every_route_asks_for_the_right_it_needs(guarded):
    paths = list(routes(guarded["read"]))
    assert len(paths) > 12
    for path, method in paths:
        address = path.replace("{name}", "index")
        status = {who: caller(method, address).status_code for who, caller in guarded.items()}
        if path in OPEN:
            assert 401 not in status.values()
            continue
        assert (status["none"], status["wrong"]) == (401, 401), path
        assert status["read"] == 403 if path in WRITING else status["read"] not in (401, 403), path
        assert status["write"] not in (401, 403), path


def test_without_tokens_all_may_read_and_none_may_write(caller):
    for path, method in routes(caller):
        status = caller(method, path.replace("{name}", "index")).status_code
        assert (status == 403) == (path in WRITING), path


@pytest.mark.parametrize("ending", ["%0A", "%0D", "%00", "%C2%85"])
def test_a_line_break_behind_a_path_gives_no_right(guarded, ending):
    for path in ("/api/v1/indexes/index/delete", "/api/v1/indexes/index/add", "/api/v1/indexes/index/search"):
        answer = guarded["read"].post(path + ending, {"where": "number >= 0"})
        assert (answer.status_code, answer.json()["kind"]) == (400, "bad_request"), path
    assert guarded["read"].get("/api/v1/indexes").json()["indexes"][0]["generation"] == 1


def test_the_page_itself_needs_no_token(guarded):
    assert guarded["none"].get("/").status_code == 200
    refused = guarded["none"].get("/api/v1/indexes")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["kind"] == "unauthorized"


def test_a_body_is_refused_by_its_length_and_by_its_size(index, model):
    app = create_app(open_service({"index": index}, max_body_bytes=1000, load=lambda _: model))
    caller = Caller(app, {})
    big = {"texts": ["a" * 1100]}
    assert caller.post("/api/v1/indexes/index/search", big).status_code == 413

    async def parts():
        for _ in range(100):
            yield b" " * 100

    streamed = caller("POST", "/api/v1/indexes/index/search", content=parts())
    assert (streamed.status_code, streamed.json()["kind"]) == (413, "too_large")


def run_guard(app, *, limits, receive=None, headers=()):
    """Status, body and headers that a guard sends."""
    sent = []

    async def send(message):
        sent.append(message)

    async def nothing():
        return {"type": "http.request", "body": b"", "more_body": False}

    guard = Guard(
        app=app,
        limits=limits,
        tokens=Tokens(),
        is_open=lambda path: True,
        is_counted=lambda path: True,
        needs_write=lambda method, path: False,
        observe=lambda *_: None,
    )
    scope = {"type": "http", "method": "POST", "path": "/", "headers": list(headers), "client": ("1.2.3.4", 1)}
    asyncio.run(guard(scope, receive or nothing, send))
    answer = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], json.loads(sent[1]["body"]), answer


async def never(scope, receive, send):
    await asyncio.sleep(3600)


async def failing(scope, receive, send):
    raise RuntimeError("a secret of the inside")


def test_a_body_that_does_not_arrive_is_given_up():
    async def silent():
        await asyncio.sleep(3600)

    status, problem, headers = run_guard(
        never, limits=Limits(body_seconds=0.05), receive=silent, headers=[(b"content-length", b"10")]
    )
    assert (status, problem["kind"], headers["connection"]) == (408, "slow_body", "close")


def test_a_request_that_takes_too_long_ends():
    status, problem, headers = run_guard(never, limits=Limits(request_seconds=0.05))
    assert (status, problem["kind"], headers["retry-after"]) == (503, "timeout", "1")


def test_a_fault_of_the_server_shows_nothing_of_the_inside(caplog):
    status, problem, headers = run_guard(failing, limits=Limits(), headers=[(b"x-request-id", b"mine-7")])
    assert status == 500
    assert "secret" not in json.dumps(problem)
    assert problem["request_id"] == headers["x-request-id"] == "mine-7"
    assert "a secret of the inside" in caplog.text


def test_an_id_that_could_forge_a_log_line_is_replaced():
    _, problem, _ = run_guard(failing, limits=Limits(), headers=[(b"x-request-id", b"a b\r\nc")])
    assert problem["request_id"] != "a b\r\nc"


def test_one_address_is_limited_and_another_is_not():
    limiter = RateLimiter(2.0)
    assert [limiter.allows("a", 0.0) for _ in range(5)] == [True] * 4 + [False]
    assert limiter.allows("b", 0.0)
    assert limiter.allows("a", 0.5)
    assert not limiter.allows("a", 0.5)
    assert RateLimiter(0.0).allows("a", 0.0)


def test_the_limit_reaches_the_client(index, model):
    caller = Caller(create_app(open_service({"index": index}, requests_per_second=1, load=lambda _: model)), {})
    statuses = [caller.get("/health").status_code for _ in range(4)]
    assert statuses == [200, 200, 429, 429]
    # the page loads several files at once, which cost next to nothing
    assert [caller.get(path).status_code for path in PAGE_FILES] == [200] * len(PAGE_FILES)


def test_every_answer_carries_the_security_headers(caller):
    for path in ("/", "/health", "/nowhere", "/api/v1/indexes"):
        headers = caller.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_browsers_of_a_named_origin_may_ask_for_permission_without_a_token(index, model):
    service = open_service(
        {"index": index}, cors_origins=("https://a.org",), read_tokens=frozenset({"r"}), load=lambda _: model
    )
    caller = Caller(create_app(service), {})
    asking = {"origin": "https://a.org", "access-control-request-method": "POST"}
    asking["access-control-request-headers"] = "authorization"
    allowed = caller("OPTIONS", "/api/v1/indexes/index/search", headers=asking)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://a.org")
    refused = caller.get("/api/v1/indexes", headers={"origin": "https://a.org"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.org")


def test_other_origins_are_let_in_only_where_named(index, model):
    caller = Caller(
        create_app(open_service({"index": index}, cors_origins=("https://a.org",), load=lambda _: model)), {}
    )
    allowed = caller.get("/api/v1/indexes", headers={"origin": "https://a.org"})
    assert allowed.headers["access-control-allow-origin"] == "https://a.org"
    assert (
        "access-control-allow-origin" not in caller.get("/api/v1/indexes", headers={"origin": "https://b.org"}).headers
    )
