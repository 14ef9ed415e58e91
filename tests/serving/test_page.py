"""The web page in a real browser, in front of a real server."""

import json
import re
import threading
import time
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serving.combined import CombinedRetriever
from serving.page import build_page, mount_page
from serving.security import Credentials
from serving.services import RetrievalServices
from tests.serving.browsed import PAGE, chromium, page_server
from tests.serving.served import live_services, make_generator, wait_until

LOGIN = ("reader", "a long enough password")
CREDENTIALS = Credentials(("first-token-0123456789",), LOGIN)
PROMPT = "the harbor light of the old town turns slowly over the water"
JSON_LINES = "#document-format input[value='JSON lines']"
ATTACK = (
    "<img src=x onerror='window.attacked=1'><script>window.attacked=2</script>"
    "</div></section> ${window.attacked=3} {{constructor}} `&amp; &lt;b&gt;"
)


class PacedDecoder:
    """A decoder whose steps wait while it is held."""

    def __init__(self, decoder):
        self._decoder, self.go = decoder, threading.Event()
        self.go.set()

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def step(self):
        if not self.go.is_set():
            time.sleep(0.05)
        return self._decoder.step()


@pytest.fixture(scope="module")
def paced():
    return []


@pytest.fixture(scope="module")
def generator(tokenizer_url, paced):
    """It has two services, so that there are weights."""

    def pace(decoder):
        paced.append(PacedDecoder(decoder))
        return paced[0]

    plain = make_generator(tokenizer_url)
    first, live = plain.services.dynamic, live_services(plain.tokenizer).dynamic
    combined = CombinedRetriever({"static": first, "dynamic": live})
    services = RetrievalServices(None, live, combined)
    return make_generator(tokenizer_url, services=services, decoder=pace)


@pytest.fixture(scope="module")
def url(generator):
    with page_server(generator, CREDENTIALS) as served:
        yield served


@pytest.fixture(scope="module")
def opened():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def logged_in(opened, url):
    opened.driver.get(url + PAGE)
    opened.find("input[type=password]")
    assert not opened.complaints()
    for password in ("a wrong but long one", LOGIN[1]):
        for kind, text in (("text", LOGIN[0]), ("password", password)):
            field = opened.find(f"input[type={kind}]")
            field.clear()
            field.send_keys(text)
        opened.find("button").click()
        if password != LOGIN[1]:
            opened.wait_for_text("Incorrect")
            assert not opened.has("prompt")
    opened.find("#prompt textarea")
    return opened


@pytest.fixture
def browser(logged_in, generator, url):
    """On the fresh page, and without live documents."""
    generator.services.dynamic.reset()
    logged_in.driver.get(url + PAGE)
    logged_in.wait_for("documents", "0 documents")
    logged_in.complaints()
    yield logged_in
    assert not foreign(logged_in.requested(), url)
    assert not logged_in.complaints()


def foreign(requests, url):
    return [sent for sent in requests if not sent.startswith((url, "data:", "blob:", "about:"))]


def add(browser, text, source="", title=""):
    for name, value in (("text", text), ("source", source), ("title", title)):
        browser.type(f"document-{name}", value)
    browser.click("add")
    return browser.wait_for("documents-message", "added")


def generate(browser, prompt=PROMPT):
    browser.type("prompt", prompt)
    browser.run("document.querySelector('#status .rm-note')?.replaceChildren()")
    browser.click("generate")
    return browser.wait_for("status", "done")


def gradio_routes(generator):
    """Every (method, path) of the page that is no part of the login form."""
    app = FastAPI()
    mount_page(app, generator, PAGE, Credentials())
    [page] = [route.app for route in app.routes if route.path == PAGE]
    paths = get_openapi(title="page", version="1", routes=page.routes)["paths"]
    form = {"/", "/login", "/login/", "/theme.css", "/assets/{path}", "/static/{path}"}
    listed = [(m, re.sub("{.*?}", "1", p)) for p in paths.keys() - form for m in paths[p]]
    assert ("post", "/gradio_api/cancel") in listed
    assert ("post", "/gradio_api/queue/join") in listed
    return listed


@pytest.mark.parametrize("login", [None, ("reader", "a wrong but long one"), ("", "")])
def test_nothing_of_the_page_is_open_without_login(url, generator, login):
    with httpx.Client(base_url=url + PAGE) as client:
        if login is not None:
            sent = {"username": login[0], "password": login[1]}
            assert client.post("/login", data=sent).status_code in (400, 422)
        start = client.get("/").text
        found = {
            (method, path): client.request(method, path, json={}).status_code
            for method, path in gradio_routes(generator)
        }
    assert set(found.values()) == {401}, found
    assert "Max new tokens" not in start
    assert "auth_required" in start


def test_login_opens_the_page_and_not_the_api(url):
    with httpx.Client(base_url=url) as client:
        sent = {"username": LOGIN[0], "password": LOGIN[1]}
        assert client.post(f"{PAGE}/login", data=sent).status_code == 200
        assert "Max new tokens" in client.get(f"{PAGE}/config").text
        assert client.get("/v1/models").status_code == 401


def test_pages_of_other_sites_cannot_act_for_who_is_logged_in(url, generator):
    """What a browser sends for them unasked is refused, what it asks for first not granted."""
    generator.services.dynamic.add([{"text": "to be kept"}])
    with httpx.Client(base_url=url + PAGE, headers={"origin": "http://other.example"}) as client:
        client.post("/login", data={"username": LOGIN[0], "password": LOGIN[1]})
        calls = client.get("/config").json()["dependencies"]
        [reset] = [call["id"] for call in calls if call["api_name"] == "reset"]
        body = json.dumps({"data": [], "fn_index": reset, "session_hash": "x"})
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            sent = {"content": body, "headers": {"content-type": kind}}
            assert client.post("/gradio_api/queue/join", **sent).status_code == 422
        asked = {"access-control-request-method": "POST"}
        answer = client.options("/gradio_api/queue/join", headers=asked)
        assert "access-control-allow-origin" not in answer.headers
    assert generator.services.dynamic.num_documents > 0


def test_added_document_is_shown_beside_the_text_that_it_influenced(browser):
    add(browser, "the old town sleeps and a harbor light turns slowly", "news/3.txt", "At night")
    assert "1 document," in browser.text("documents")
    assert "news/3.txt" in browser.text("documents")
    status = generate(browser)
    cards = browser.run(
        "return [...document.querySelectorAll('#transcript .rm-card')].map(card => "
        "['.rm-source', '.rm-badge', '.rm-chunk'].map(of => card.querySelector(of).innerText))"
    )
    assert ["news/3.txt, At night", "dynamic"] in [card[:2] for card in cards]
    assert ["harbor", "static", PROMPT] in cards
    assert "64 tokens" in status
    parts = browser.run(
        "return ['.rm-prompt', '.rm-generated'].map(of => "
        "[...document.querySelectorAll('#transcript ' + of)].map(e => e.textContent).join(''))"
    )
    assert parts[0] == PROMPT
    assert len(parts[1]) > 20
    marks = browser.run(
        "return [...document.querySelectorAll('#transcript mark')].map(e => e.innerText)"
    )
    assert PROMPT in marks
    assert "harbor light turns slowly" not in marks


def test_other_peoples_html_is_text_everywhere(browser):
    add(browser, f"{PROMPT} {ATTACK}", ATTACK, ATTACK)
    generate(browser, f"{ATTACK} {PROMPT}")
    for name in ("documents", "transcript"):
        assert ATTACK in browser.run(f"return document.querySelector('#{name}').textContent")
    chunks = browser.run(
        "return [...document.querySelectorAll('.rm-chunk')].map(e => e.textContent).join()"
    )
    assert "onerror" in chunks
    browser.find(JSON_LINES).click()
    browser.type("document-text", f'{{"text": {{"{ATTACK}": 1}}}}')
    browser.click("add")
    browser.wait_for("documents-message", "document 0")
    time.sleep(0.2)
    assert browser.run("return window.attacked === undefined")
    assert (
        browser.run("return document.querySelectorAll('#transcript img, #documents img').length")
        == 0
    )


def test_json_lines_are_added_and_a_bad_line_is_told(browser, generator):
    browser.find(JSON_LINES).click()
    browser.type("document-text", '{"text": "one"}\n\n{"text": 3}')
    browser.click("add")
    assert "document 1" in browser.wait_for("documents-message", "text")
    browser.type("document-text", '{"text": "one"}\n[]')
    browser.click("add")
    browser.wait_for("documents-message", "line 2")
    assert generator.services.dynamic.num_documents == 0
    add(browser, '{"text": "one", "src": "own"}\n{"text": "two"}', "given")
    assert [d.source for d in generator.services.dynamic.list()] == ["own", "given"]


def test_reset_removes_all_once_it_is_confirmed(browser, generator):
    add(browser, "some text to be removed")
    browser.click("reset")
    browser.click("keep")
    wait_until(lambda: not browser.sees("confirm"))
    assert generator.services.dynamic.num_documents == 1
    browser.click("reset")
    browser.click("confirm")
    browser.wait_for("documents", "0 documents")
    assert generator.services.dynamic.num_documents == 0
    assert generate(browser).startswith("64 tokens")
    assert "removed" not in browser.text("transcript")


def test_stop_frees_the_slot_and_keeps_what_there_is(browser, generator, paced):
    paced[0].go.clear()
    browser.type("prompt", PROMPT)
    browser.click("generate")
    browser.wait_for("status", "so far")
    assert generator.engine.num_running == 1
    browser.click("stop")
    wait_until(lambda: generator.engine.num_running == 0, 3)
    paced[0].go.set()
    browser.wait_for("status", "stopped")
    assert PROMPT in browser.text("transcript")
    generate(browser)


def test_closed_page_frees_the_slot(browser, generator, paced):
    paced[0].go.clear()
    browser.type("prompt", PROMPT)
    browser.click("generate")
    browser.wait_for("status", "so far")
    browser.driver.get("about:blank")
    wait_until(lambda: generator.engine.num_running == 0, 3)
    paced[0].go.set()
    browser.complaints()  # of the page that was left about its open requests


def test_text_appears_while_it_is_generated(browser, paced):
    paced[0].go.clear()
    browser.type("prompt", PROMPT)
    browser.click("generate")
    seen = {browser.wait_for("status", "so far")}
    wait_until(lambda: seen.add(browser.text("status")) or len(seen) > 4)
    paced[0].go.set()
    browser.wait_for("status", "done")


def test_what_cannot_be_done_is_told(browser, generator):
    browser.type("prompt", "")
    browser.click("generate")
    browser.wait_for("status", "no tokens")
    browser.type("max-new-tokens", str(generator.limits.max_new_tokens + 1))
    browser.type("prompt", PROMPT)
    browser.click("generate")
    browser.wait_for("status", "max_new_tokens")
    browser.type("max-new-tokens", "")
    browser.click("generate")
    browser.wait_for("status", "empty")


def test_drawn_seed_is_told_and_repeats_the_text(browser):
    browser.type("temperature", "1")
    seed = generate(browser).rpartition("seed ")[2]
    first = browser.text("transcript")
    generate(browser)
    assert browser.text("transcript") != first
    browser.type("seed", seed)
    assert generate(browser).endswith(f"seed {seed}")
    assert browser.text("transcript") == first


def test_retrieval_can_be_turned_off(browser):
    browser.find("#retrieval input").click()
    wait_until(lambda: not browser.sees("neighbors"))
    assert "0 retrievals" in generate(browser)


def test_weights_are_set_for_the_server(browser, generator):
    browser.type("weight-static", "0")
    wait_until(lambda: generator.services.combined.weights == {"static": 0.0, "dynamic": 1.0})
    add(browser, "the only one that is asked")
    generate(browser)
    badges = browser.run(
        "return [...document.querySelectorAll('.rm-badge')].map(badge => badge.innerText)"
    )
    generator.services.combined.set_weights({"static": 1.0})
    assert set(badges) == {"dynamic"}


@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (390, 1)], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_screen(browser, width, columns):
    browser.resize(width)
    try:
        add(browser, f"{PROMPT} {'w' * 300}", "s" * 300)
        generate(browser, f"{PROMPT} {'p' * 100}")
        wide, lefts = browser.run(
            "return [document.documentElement.scrollWidth, new Set([...document"
            ".querySelectorAll('.rm-text, .rm-neighbors')].filter(e => e.nextSibling || "
            "e.previousSibling).map(e => Math.round(e.getBoundingClientRect().left))).size]"
        )
    finally:
        browser.resize(1280)
    assert wide <= width
    assert lefts == columns


def labels(generator):
    components = build_page(generator).config["components"]
    return {part["props"].get("label") for part in components} - {None}


def test_controls_are_those_of_the_server(tokenizer_url, generator):
    base = {"Prompt", "Max new tokens", "Temperature", "Top k", "Top p", "Seed", "Stop strings"}
    retrieval = {"Retrieve neighbors", "Neighbors", "Interval", "Pad the prompt"}
    documents, weights = {"Document", "Source", "Title"}, {"Index (static)"}
    live_only = make_generator(tokenizer_url)
    none = make_generator(tokenizer_url, services=None)
    no_neighbors = make_generator(
        tokenizer_url, services=None, limits=replace(none.limits, max_neighbors=0)
    )
    everything = base | retrieval | documents | weights
    for made, expected in [
        (generator, everything),
        (live_only, base | retrieval | documents),
        (none, base),
        (no_neighbors, base),
    ]:
        assert labels(made) & everything == expected
