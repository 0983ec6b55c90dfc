"""A learner's first minute: JupyterLab as the course starts it, in a real browser."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import nbformat
import nbformat.reader
import pytest
from checkout import snapshot
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from helpers import notebooks

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
LESSON = Path("notebooks", "00_start_here.ipynb")
START_SECONDS = 180  # on a busy machine; a quiet one needs ten
RUN_SECONDS = 300  # the lesson itself takes under twenty

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"needs one of the browsers {', '.join(NAMES)}"),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy that the browser may save into, its lesson never run: every count will be new."""
    folder = snapshot(tmp_path_factory.mktemp("browser") / "checkout")
    lesson = nbformat.read(folder / LESSON, as_version=4)
    for cell in code_cells(lesson):
        cell.execution_count, cell.outputs = None, []
    nbformat.write(lesson, folder / LESSON)
    return folder


@pytest.fixture(scope="module")
def address(checkout, tmp_path_factory) -> Iterator[str]:
    """JupyterLab runs as `python course.py lab` starts it; this is where, token included."""
    own = tmp_path_factory.mktemp("jupyter")  # no settings or workspaces of whoever runs the test
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime"}
    folders |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    variables = {**os.environ, **{name: str(own / folder) for name, folder in folders.items()}}
    command = [sys.executable, "course.py", "--no-venv", "lab"]
    command += ["--", "--no-browser", "--port", str(free_port())]
    log = own / "log.txt"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=checkout, env=variables, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield wait_for_address(server, log)
    finally:
        server.terminate()  # JupyterLab then ends its kernels
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_address(server: subprocess.Popen, log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        text = log.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"http://localhost:\d+/lab\S*\?token=\w+", text)
        if found:
            return found.group()
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start: {log.read_text(encoding='utf-8', errors='replace')}")


@pytest.fixture(scope="module")
def page(address) -> Iterator["playwright.Page"]:
    flags = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium has no sandbox for root
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=flags)
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.set_default_timeout(START_SECONDS * 1000)
        opened.goto(address)
        yield opened
        browser.close()


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run_all_cells(page: "playwright.Page") -> None:
    """By the menu, as a learner does it, once the status bar says that the kernel is there."""
    # The indicator above the notebook says idle too early: a click then runs nothing.
    page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$")).wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()


def saved(page: "playwright.Page", path: Path) -> NotebookNode:
    """The notebook as it stands in the browser: saved by the keyboard, read from the file."""
    before = path.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if path.stat().st_mtime_ns != before:
            with suppress(nbformat.reader.NotJSONError):  # the server is still writing
                return nbformat.read(path, as_version=4)
        time.sleep(0.1)
    return nbformat.read(path, as_version=4)


def run_and_save(page: "playwright.Page", path: Path) -> NotebookNode:
    run_all_cells(page)
    end = time.monotonic() + RUN_SECONDS
    lesson = saved(page, path)
    while code_cells(lesson)[-1].execution_count is None and time.monotonic() < end:
        if any(output.output_type == "error" for c in code_cells(lesson) for output in c.outputs):
            break  # JupyterLab does not go on after an error
        time.sleep(2)
        lesson = saved(page, path)
    return lesson


def test_the_first_lesson_runs_without_an_error(page, checkout):
    lesson = run_and_save(page, checkout / LESSON)
    page.screenshot(path=checkout.parent / "lesson.png")
    for cell in code_cells(lesson):
        assert not [o for o in cell.outputs if o.output_type == "error"], cell.source
    counts = [cell.execution_count for cell in code_cells(lesson)]
    assert counts == list(range(1, len(counts) + 1))
    stored = " ".join(str(cell.outputs) for cell in code_cells(lesson))
    # The browser shows only the cells around the visible ones, so pictures may be none or some.
    for picture in page.locator(".jp-OutputArea img").all():
        assert picture.get_attribute("alt")
    assert "image/png" not in stored.replace("data:image/png", "")


def test_a_stored_figure_has_its_alt_text_before_anything_is_run(page, checkout, address):
    alt = "A line that rises from one to two"
    source = "from matplotlib.figure import Figure\n\nfrom helpers import plots\n\n"
    figure = f"fig = Figure()\nfig.subplots().plot([1, 2])\nplots.show(fig, alt={alt!r})"
    path = checkout / LESSON.with_name("figure.ipynb")
    nbformat.write(new_notebook(cells=[new_code_cell(source + figure)]), path)
    notebooks.execute(path)  # not by this server, which therefore does not trust the output
    page.goto(address.replace(LESSON.name, path.name))
    picture = page.locator(".jp-OutputArea").get_by_alt_text(alt, exact=True)
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
