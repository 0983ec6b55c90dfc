"""The rendered site in a real browser: every page, on a wide screen and on a phone.

Skipped unless the extra `site` is installed, so it is no part of a fresh `make test`. After
`python course.py site`, with the environment's Python:

    python -m pytest tests/site -k browser

It takes about nine minutes on two busy cores: the accessibility rules look at every coloured word
of every cell.
"""

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.claims.book import ROOT
from helpers.site.build import build
from helpers.site.links import broken

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra site")
for tool in ("sphinx", "myst_nb", "furo"):
    pytest.importorskip(tool, reason="needs the extra site")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
WIDTHS = {"wide": 1280, "phone": 390}
RULES = {"runOnly": ["wcag2a", "wcag2aa"]}  # contrast of 4.5, names of links, alternative texts, …
LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
PAGES = ["index", "docs/claims", "data/LICENSES", *(f"notebooks/{name}" for name in LESSONS)]
STILL = "*, ::before, ::after { animation: none !important; transition: none !important }"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"needs one of the browsers {', '.join(NAMES)}"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("built") / "site"
    build(ROOT, target)
    return target


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """A request is no news."""


def serve(folder: Path) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    with serve(site) as server:
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    flags = ["--disable-gpu", "--no-first-run", "--disable-background-networking"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium has no sandbox for root
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=BROWSER, args=flags)


def problems(browser: "playwright.Browser", address: str, width: int, scheme: str) -> list[str]:
    """What a reader, or a reader's screen reader, would stumble over on one page."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    page, found = context.new_page(), []
    server = "/".join(address.split("/")[:3])
    page.on("console", lambda said: said.type == "error" and found.append(f"says {said.text}"))
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("request", lambda sent: _is_foreign(sent.url, server) and found.append(sent.url))
    page.goto(address)
    page.add_style_tag(content=STILL)
    found += _overflow(page, "as it opens")
    page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    page.wait_for_timeout(100)
    found += _overflow(page, "unfolded") + _pictures(page) + _rules(page)
    context.close()
    return found


def _is_foreign(url: str, server: str) -> bool:
    return not url.startswith((f"{server}/", "data:"))


def _overflow(page: "playwright.Page", when: str) -> list[str]:
    over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return [f"{over} pixels wider than the screen, {when}"] if over > 0 else []


def _pictures(page: "playwright.Page") -> list[str]:
    shown = page.evaluate(
        "Promise.all([...document.images].map(async image => ["
        "  await image.decode().then(() => image.naturalWidth, () => 0), image.alt.trim()]))"
    )
    return [
        f"a picture of width {width} says {alt!r}" for width, alt in shown if not (width and alt)
    ]


def _rules(page: "playwright.Page") -> list[str]:
    violations = axe.Axe().run(page, options=RULES).response["violations"]
    return [
        f"{rule['id']}: {node['html'][:200]} {[each['message'] for each in node['any']]}"
        for rule in violations
        for node in rule["nodes"][:3]
    ]


def test_every_link_of_the_site_leads_somewhere(site):
    assert broken(site) == []


@pytest.mark.parametrize("screen", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_in_the_browser(browser, address, page, screen):
    assert problems(browser, f"{address}/{page}.html", WIDTHS[screen], "light") == []


@pytest.mark.parametrize("page", ["index", "docs/claims", f"notebooks/{LESSONS[0]}"])
def test_a_page_in_the_dark_in_the_browser(browser, address, page):
    assert problems(browser, f"{address}/{page}.html", WIDTHS["wide"], "dark") == []


def test_figures_are_shown_with_their_texts_in_the_browser(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/notebooks/02_rank_selection.html")
    figures = page.locator(".cell_output img")
    assert figures.count() > 3
    assert figures.first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 300
    page.close()


def test_the_search_finds_a_lesson_in_the_browser(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/index.html")
    page.get_by_role("textbox", name="Search").fill("double quantisation")
    page.keyboard.press("Enter")
    found = page.locator("#search-results li a")
    found.first.wait_for()
    assert any("03_qlora_memory" in link.get_attribute("href") for link in found.all())
    page.close()


@pytest.mark.parametrize(
    ("markup", "said"),
    [
        ("<script>console.error('broken')</script>", "says broken"),
        ("<script>missing()</script>", "script: missing is not defined"),
        ("<script>fetch('http://127.0.0.1:9/x').catch(() => 0)</script>", "127.0.0.1:9/x"),
        ("<div style='width: 500px'>wide</div>", "pixels wider than the screen, as it opens"),
        ("<details><p style='width: 500px'>x</details>", "wider than the screen, unfolded"),
        ("<img src='data:image/png;base64,AA==' alt='x'>", "a picture of width 0 says 'x'"),
        ("<img src='/favicon.svg'>", "says ''"),
        ("<p style='color: #888'>pale</p>", "color-contrast"),
    ],
)
def test_each_problem_is_found_in_the_browser(browser, tmp_path, markup, said):
    icon = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    (tmp_path / "favicon.svg").write_text(icon)
    start = "<!doctype html><html lang='en'><title>t</title><link rel='icon' href='/favicon.svg'>"
    (tmp_path / "sound.html").write_text(f"{start}<body><p>text</p>")
    (tmp_path / "page.html").write_text(f"{start}<body><p>text</p>{markup}")
    with serve(tmp_path) as server:
        base = f"http://127.0.0.1:{server.server_port}"
        assert problems(browser, f"{base}/sound.html", 390, "light") == []
        assert said in " ".join(problems(browser, f"{base}/page.html", 390, "light"))
        server.shutdown()
