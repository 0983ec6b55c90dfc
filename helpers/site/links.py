"""Whether every link inside a rendered site leads to a page that is there, and to its anchor."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

_LINKS = {"a": "href", "link": "href", "img": "src", "script": "src", "iframe": "src"}


class Page(HTMLParser):
    """Links and anchors of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []  # what the browser loads by itself
        self.anchors: set[str] = {""}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag links to, what it loads, and what can be linked to."""
        values = dict(attrs)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        address = values.get(_LINKS.get(tag, ""))
        if address:
            (self.links if tag == "a" else self.fetched).append(address)


def broken(site: Path) -> list[str]:
    """A line for each link that leads nowhere, or lets a browser fetch from elsewhere."""
    pages = {file: read(file) for file in sorted(site.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        name = file.relative_to(site).as_posix()
        found += [f"{name}: {each}" for each in page.links if not leads(each, file, pages)]
        for each in page.fetched:
            if urlsplit(each).scheme == "data":
                continue
            if is_outside(each):
                found.append(f"{name}: fetches {each}")
            elif not leads(each, file, pages):
                found.append(f"{name}: {each}")
    return list(dict.fromkeys(found))


def read(file: Path) -> Page:
    """Links and anchors of an HTML file."""
    page = Page()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def is_outside(address: str) -> bool:
    """Whether an address names another server, or no page at all (mail, data)."""
    parts = urlsplit(address)
    return bool(parts.scheme or parts.netloc)


def leads(address: str, file: Path, pages: dict[Path, Page]) -> bool:
    """Whether an address on the page `file` leads somewhere; other servers are not asked."""
    if is_outside(address):
        return True
    path, fragment = urldefrag(address)
    target = file
    if path := unquote(path.partition("?")[0]):
        target = (file.parent / path).resolve()
        if target.is_dir():
            target /= "index.html"
    if target not in pages:
        return target.is_file()
    return unquote(fragment) in pages[target].anchors
