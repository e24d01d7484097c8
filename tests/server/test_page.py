"""The chat page in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.running import Server, scripted

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tried with playwright, which is not there")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tried in Chromium, which is not there")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with scripted() as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    found = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("request", lambda request: asked.append(request.url))
    found.goto(server.url)
    yield found
    context.close()
    assert not complaints
    assert all(url.startswith(server.url) for url in asked)  # nothing is loaded from elsewhere


def send(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def last(page: Any) -> Any:
    return page.locator(".message.assistant .body").last


def done(page: Any) -> None:
    playwright.expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_markdown_streams(page: Any) -> None:
    send(
        page,
        "<<# Head\n\nSome **bold** and `code`, 1 < 2.\n\n- one\n- two\n\n"
        "```python\nprint('<b>')\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |>>",
    )
    expect = playwright.expect
    expect(last(page).locator("h3")).to_have_text("Head")
    expect(last(page).locator("strong")).to_have_text("bold")
    expect(last(page).locator("li")).to_have_text(["one", "two"])
    expect(last(page).locator("pre code")).to_have_text("print('<b>')")
    expect(last(page).locator("td")).to_have_text(["1", "2"])
    expect(page.locator("#speed")).to_have_text(re.compile(r"^[\d.]+ tokens/s$"))
    expect(page.locator("#model")).to_have_text("demo")


@pytest.mark.slow
def test_nothing_a_model_writes_runs(page: Any) -> None:
    send(page, "<<<img src=x onerror=alert(1)> <script>alert(2)</script> [x](javascript:alert(3))>>")
    playwright.expect(last(page)).to_contain_text("onerror")
    assert last(page).locator("img, script, a").count() == 0


def test_stop_regenerate_and_edit(page: Any, server: Server) -> None:
    expect = playwright.expect
    send(page, "go on {{20 ms}}")
    expect(last(page)).to_contain_text("abc")
    page.get_by_role("button", name="Stop").click()
    done(page)
    expect(page.locator(".note")).to_have_text("stopped")
    server.until_idle()
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("say <<other>>")
    page.locator(".message").get_by_role("button", name="Send").click()
    expect(last(page)).to_have_text("other")
    done(page)
    page.get_by_role("button", name="Regenerate").click()
    expect(last(page)).to_have_text("other")
    done(page)
    assert page.locator(".message").count() == 2


@pytest.mark.slow
def test_conversations_outlive_the_page(page: Any) -> None:
    expect = playwright.expect
    send(page, "say <<first>>")
    expect(last(page)).to_have_text("first")
    done(page)
    page.get_by_role("button", name="New conversation").first.click()
    assert page.locator(".message").count() == 0
    send(page, "say <<second>>")
    expect(last(page)).to_have_text("second")
    done(page)
    page.reload()
    expect(last(page)).to_have_text("second")
    page.get_by_role("button", name="say <<first>>", exact=True).click()
    expect(last(page)).to_have_text("first")
    page.get_by_role("button", name="Delete say <<first>>").click()
    expect(last(page)).to_have_text("second")


@pytest.mark.slow
def test_reasoning_is_kept_apart(page: Any) -> None:
    send(page, "<<<think>well</think>yes>>")
    playwright.expect(last(page).locator("details")).to_contain_text("well")
    playwright.expect(last(page).locator("p")).to_have_text("yes")


@pytest.mark.slow
def test_settings_are_sent(page: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("say <<from the system>>")
    page.get_by_label("Most tokens").fill("2")
    page.get_by_role("button", name="Close").click()
    with page.expect_request("**/v1/chat/completions") as caught:
        send(page, "hello")
    body = caught.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "say <<from the system>>"}
    assert body["max_tokens"] == 2
    playwright.expect(page.locator(".note")).to_contain_text("cut at the limit of tokens")


@pytest.mark.slow
def test_errors_are_shown(page: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("word " * 5000)
    page.get_by_role("button", name="Close").click()
    send(page, "hello")
    playwright.expect(page.get_by_role("alert")).to_contain_text("context")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "hello again")
    playwright.expect(page.get_by_role("alert")).to_contain_text("cannot be reached")


@pytest.mark.slow
def test_cluster_and_theme(page: Any) -> None:
    page.get_by_role("button", name="Cluster").click()
    playwright.expect(page.locator("#engine")).to_contain_text("running")
    playwright.expect(page.locator("#engine polyline")).to_have_count(1)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Dark or light").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_narrow_screen(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    send(page, "say <<" + "long " * 40 + "\n```\n" + "x" * 200 + "\n```>>")
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    playwright.expect(page.get_by_label("Message", exact=True)).to_be_in_viewport()
    page.get_by_role("button", name="Conversations").click()
    playwright.expect(page.get_by_role("button", name="New conversation").first).to_be_visible()


@pytest.mark.slow
def test_key_is_asked_for(browser: Any) -> None:
    with scripted("none", "the-key") as locked:
        page = browser.new_page()
        page.goto(locked.url)
        playwright.expect(page.get_by_role("alert")).to_contain_text("API key")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("the-key")
        page.get_by_role("button", name="Close").click()
        playwright.expect(page.locator("#model")).to_have_text("demo")
        send(page, "say <<in>>")
        playwright.expect(last(page)).to_have_text("in")
        page.close()
