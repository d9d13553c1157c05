"""The Space's page, clicked through in a browser, with the tiny model behind it; nothing leaves this machine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import answers
import pytest

from mend_hf import AutoMendModel, Demonstration, MendConfig, get_mend_model

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
gradio = pytest.importorskip("gradio", reason="needs gradio: pip install gradio")

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic", "--no-first-run"]
SHOTS = [Demonstration("great film", "good"), Demonstration("a bore", "bad"), Demonstration("fine", "good")]
SECONDS_TO_START = 120

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium browser: apt install chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a Space with the tiny model is served, from a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("space")
    settings = {
        "PYTHONPATH": str(ROOT),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, str(ROOT / "examples" / "space" / "app.py"), "--tiny"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for(f"http://127.0.0.1:{port}/", server, folder / "log")
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(10 * SECONDS_TO_START):
        try:
            opener.open(address).close()
            return
        except urllib.error.URLError:
            if server.poll() is not None:
                break
            time.sleep(0.1)
    pytest.fail(f"The Space did not start: {log.read_text()}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """A function that opens the page as a new user; the arguments are the browser context's."""
    contexts, foreign = [], []

    def look_at(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:", address.replace("http", "ws"))):
            foreign.append(request.url)

    def open_one(**settings: Any) -> Any:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", look_at)
        page.goto(address)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert foreign == []


def click(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def paste(page: Any, lines: str) -> None:
    page.get_by_role("tab", name="JSON lines").click()
    page.get_by_label("One object with input and output a line").fill(lines)
    click(page, "Put into the table")


def wait_for_cell(page: Any, text: str) -> None:
    """Wait until the table's first cell has this text."""
    playwright.expect(page.get_by_test_id("cell-0-0")).to_have_text(text, timeout=20_000)


def distil(page: Any, num_demonstrations: int) -> None:
    click(page, "Distil")
    page.get_by_text(f"{num_demonstrations} demonstrations, ").wait_for()


def ask(page: Any, query: str) -> None:
    page.get_by_label("Query").fill(query)
    click(page, "Ask")


def upload(page: Any, name: str, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        click(page, name)
    chooser.value.set_files(path)


@needs_browser
def test_demonstrations_are_distilled_asked_kept_and_asked_again(open_page: Any, tmp_path: Path) -> None:
    page = open_page(accept_downloads=True)
    paste(page, answers.to_lines(SHOTS))
    page.get_by_role("tab", name="Demonstrations").click()
    wait_for_cell(page, "great film")
    distil(page, 3)
    assert page.get_by_label("Options, one a line").input_value().split() == ["good", "bad"]
    ask(page, "moving and funny")
    page.get_by_text(re.compile(r"tokens read")).nth(2).wait_for()
    labels = page.locator("#answers [data-testid=label-output-value]")
    assert labels.count() == 3
    assert set(labels.all_inner_texts()) <= {"good", "bad"}
    page.locator("img[alt]").first.wait_for()

    with page.expect_download() as download:
        click(page, "Download .zip")
    download.value.save_as(tmp_path / "distilled.zip")

    later = open_page()
    upload(later, "Upload .zip", tmp_path / "distilled.zip")
    later.get_by_text("from a file.").wait_for()
    later.get_by_label("Options, one a line").fill("good\nbad")
    ask(later, "moving and funny")
    later.get_by_text("there is nothing to read").wait_for()
    texts = [each.locator("#answers").inner_text().partition("MEND")[2] for each in (page, later)]
    assert re.findall(r"\d+%", texts[0]) == re.findall(r"\d+%", texts[1]) != []


@needs_browser
def test_a_typed_cell_is_distilled(open_page: Any) -> None:
    page = open_page()
    click(page, "Clear")
    wait_for_cell(page, "")
    for column, text in enumerate(("a long walk", "outdoors")):
        page.locator("[data-testid^=cell-0-]").nth(column).dblclick()
        page.keyboard.type(text)
        page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    distil(page, 1)


@needs_browser
def test_what_is_wrong_is_told_and_the_page_goes_on(open_page: Any, tmp_path: Path) -> None:
    page = open_page()
    ask(page, "moving and funny")
    page.get_by_text("distil some, or upload").wait_for()
    (tmp_path / "broken.zip").write_text("<b>not</b> an archive")
    upload(page, "Upload .zip", tmp_path / "broken.zip")
    page.get_by_text("Expected a whole .zip file that is not encrypted, got broken.zip").wait_for()
    paste(page, '{"input": "<b>only</b>"}')
    page.get_by_text("pasted.jsonl:1: expected a field 'output'").wait_for()
    (tmp_path / "shots.jsonl").write_text(answers.to_lines(SHOTS[:2]), encoding="utf-8")
    upload(page, "Upload .jsonl", tmp_path / "shots.jsonl")
    page.get_by_role("tab", name="Demonstrations").click()
    wait_for_cell(page, "great film")
    distil(page, 2)


@needs_browser
def test_two_users_do_not_see_each_others_demonstrations(open_page: Any) -> None:
    first, second = open_page(), open_page()
    paste(first, answers.to_lines(SHOTS))
    paste(second, answers.to_lines([Demonstration("a goal", "sport"), Demonstration("a vote", "politics")]))
    for page in (first, second):
        page.get_by_role("tab", name="Demonstrations").click()
    wait_for_cell(first, "great film")
    wait_for_cell(second, "a goal")
    distil(first, 3)
    distil(second, 2)
    for page in (first, second):
        ask(page, "moving and funny")
    for page, own, others in ((first, "good", "sport"), (second, "sport", "good")):
        page.get_by_text(re.compile(r"tokens read")).nth(2).wait_for()
        shown = page.locator("body").inner_text()
        assert own in shown
        assert others not in shown
    third = open_page()
    ask(third, "moving and funny")
    third.get_by_text("distil some, or upload").wait_for()


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_no_wider_than_the_screen(open_page: Any, width: int, scheme: str) -> None:
    page = open_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    distil(page, 6)
    ask(page, "moving and funny")
    page.get_by_text(re.compile(r"tokens read")).nth(2).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_environment_names_another_distiller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import app
    from tiny import load_tiny

    base, tokenizer = load_tiny()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config.name_or_path = tokenizer.name_or_path = str(tmp_path / "base")
    get_mend_model(base, MendConfig(num_virtual_tokens=3), tokenizer).save_pretrained(tmp_path / "distiller")
    monkeypatch.setenv("MEND_DISTILLER", str(tmp_path / "distiller"))
    model = app.load_model(tiny=False)
    expected = AutoMendModel.from_pretrained(tmp_path / "distiller").distill(SHOTS)
    assert model.distill(SHOTS).provenance == expected.provenance
    assert app.describe_task(answers.distil(model, SHOTS)).startswith("3 demonstrations, ")
