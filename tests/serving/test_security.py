"""Who gets in, and where a server may listen."""

import asyncio
import os
from dataclasses import replace

import pytest

from serving.guard import HEALTH
from serving.security import (
    Credentials,
    SecurityConfig,
    SecurityError,
    check_exposure,
    is_loopback,
    load_credentials,
)
from tests.serving.served import client, make_generator, running

TOKENS = ("first-token-0123456789", "other-token-0123456789")
LOGIN = ("reader", "a long enough password")
GUARDED = Credentials(TOKENS)


@pytest.fixture(scope="module")
def generator(tokenizer_url):
    with running(make_generator(tokenizer_url)) as made:
        yield made


def statuses(generator, credentials, requests, **options):
    async def send():
        async with client(generator, credentials, **options) as to:
            return [(await to.request(*request)).status_code for request in requests]

    return asyncio.run(send())


def routes(generator):
    """Every (method, path) of the schema, and some that are not there."""

    async def schema():
        async with client(generator) as to:
            return (await to.get("/openapi.json")).json()["paths"]

    listed = [(m.upper(), path) for path, own in asyncio.run(schema()).items() for m in own]
    assert len(listed) >= 11
    return [*listed, ("GET", "/openapi.json"), ("GET", "/nothing"), ("GET", "/healthz/x")]


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer ",
        "Bearer wrong-token-0123456789",
        f"Bearer {TOKENS[0][:-1]}",
        f"Bearer {TOKENS[0]}x",
        f"Basic {TOKENS[0]}",
        TOKENS[0],
        f"Bearer {TOKENS[0]}, {TOKENS[1]}",
    ],
)
def test_nothing_but_health_is_open_without_a_token(generator, header):
    headers = {} if header is None else {"authorization": header}
    paths = routes(generator)
    found = statuses(generator, GUARDED, paths, headers=headers)
    assert dict(zip(paths, found)) == {
        path: 200 if path == ("GET", HEALTH) else 401 for path in paths
    }


@pytest.mark.parametrize("token", TOKENS)
def test_each_token_opens_everything(generator, token):
    headers = {"authorization": f"Bearer {token}"}
    found = statuses(generator, GUARDED, routes(generator), headers=headers)
    assert not {401, 403, 500} & set(found)


def test_who_is_refused_has_not_been_read(generator):
    """A body above the limit is not even looked at."""
    big = {"content": b"x" * 10**6}

    async def send():
        async with client(generator, GUARDED) as to:
            answer = await to.post("/v1/completions", **big)
            return answer.status_code, answer.headers["www-authenticate"]

    assert asyncio.run(send()) == (401, "Bearer")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost", 200),
        ("localhost:81", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("10.0.0.1", 421),
        ("", 421),
    ],
)
def test_without_tokens_only_this_machines_names_are_answered(generator, host, status):
    headers, paths = {"host": host}, [("GET", "/v1/models")]
    assert statuses(generator, Credentials(), paths, headers=headers) == [status]


def test_secrets_come_from_the_environment_or_from_private_files(tmp_path):
    tokens, page = tmp_path / "tokens", tmp_path / "page"
    tokens.write_text("\n".join(TOKENS) + "\n")
    page.write_text(":".join(LOGIN))
    files = SecurityConfig(str(tokens), str(page))
    for path in (tokens, page):
        path.chmod(0o600)
    variables = {
        "RETROMILL_API_TOKENS": ", ".join(TOKENS),
        "RETROMILL_PAGE_USER": LOGIN[0],
        "RETROMILL_PAGE_PASSWORD": LOGIN[1],
    }
    expected = Credentials(TOKENS, LOGIN)
    assert load_credentials(files, {}) == expected
    assert load_credentials(SecurityConfig(), variables) == expected
    assert load_credentials(SecurityConfig(), {}) == Credentials()
    with pytest.raises(SecurityError, match="both"):
        load_credentials(files, variables)
    assert not any(secret in repr(expected) for secret in (*TOKENS, *LOGIN))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_files_that_others_can_touch_are_refused(tmp_path, mode):
    path = tmp_path / "tokens"
    path.write_text(TOKENS[0])
    os.chmod(path, mode)
    with pytest.raises(SecurityError, match="chmod 600"):
        load_credentials(SecurityConfig(tokens_file=str(path)), {})


@pytest.mark.parametrize(
    "variables",
    [
        {"RETROMILL_API_TOKENS": "short"},
        {"RETROMILL_API_TOKENS": f"{TOKENS[0]} käse-käse-käse-käse"},
        {"RETROMILL_PAGE_USER": "reader"},
        {"RETROMILL_PAGE_USER": "reader", "RETROMILL_PAGE_PASSWORD": "short"},
        {"RETROMILL_PAGE_PASSWORD": LOGIN[1]},
    ],
)
def test_weak_and_half_secrets_are_refused_without_being_shown(variables):
    with pytest.raises(SecurityError) as refused:
        load_credentials(SecurityConfig(), variables)
    assert not any(secret in str(refused.value) for secret in variables.values())


OPEN, BOTH = Credentials(), replace(GUARDED, page_login=LOGIN)


@pytest.mark.parametrize(
    ("host", "credentials", "page", "fits"),
    [
        ("127.0.0.1", OPEN, True, True),
        ("::1", OPEN, True, True),
        ("0.0.0.0", OPEN, False, False),
        ("::", OPEN, False, False),
        ("192.168.1.5", OPEN, False, False),
        ("gpu-box", OPEN, False, False),
        ("0.0.0.0", GUARDED, False, True),
        ("0.0.0.0", GUARDED, True, False),
        ("127.0.0.1", GUARDED, True, False),
        ("0.0.0.0", BOTH, True, True),
        ("0.0.0.0", Credentials((), LOGIN), True, False),
    ],
)
def test_what_others_can_reach_needs_secrets(host, credentials, page, fits):
    if fits:
        check_exposure(host, credentials, page)
    else:
        with pytest.raises(SecurityError):
            check_exposure(host, credentials, page)


def test_loopback_is_told_by_address_not_by_looks():
    hosts = ("127.0.0.1", "127.9.9.9", "::1", "localhost", "127.0.0.1.nip.io", "0.0.0.0", "")
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 3
