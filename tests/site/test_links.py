"""Every link that leads nowhere is found, and everything that a page would fetch from elsewhere."""

import pytest

from helpers.site.links import broken


@pytest.fixture
def site(tmp_path):
    """Two pages in two folders that lead to each other."""
    (tmp_path / "a").mkdir()
    (tmp_path / "style.css").write_text("")
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="style.css?v=1"><p id="here">'
        '<a href="#here">1</a><a href="#">2</a><a href="a/b.html#c%C3%A9">3</a>'
        '<a href="https://example.org/x#y">4</a><a href="mailto:a@example.org">5</a>'
        '<img alt="" src="data:image/png;base64,AA==">'
    )
    (tmp_path / "a" / "b.html").write_text('<h2 id="cé"></h2><a href="../">up</a>')
    return tmp_path


def test_a_sound_site_has_no_broken_link(site):
    assert broken(site) == []


@pytest.mark.parametrize(
    ("markup", "line"),
    [
        ('<a href="gone.html">x</a>', "a/b.html: gone.html"),
        ('<a href="../index.html#gone">x</a>', "a/b.html: ../index.html#gone"),
        ('<a href="#gone">x</a>', "a/b.html: #gone"),
        ('<img src="gone.png">', "a/b.html: gone.png"),
        ('<script src="https://example.org/x.js"></script>', "fetches https://example.org/x.js"),
        ('<link href="//example.org/x.css">', "fetches //example.org/x.css"),
    ],
)
def test_each_kind_of_broken_link_is_found(site, markup, line):
    with (site / "a" / "b.html").open("a") as stream:
        stream.write(markup)
    (found,) = broken(site)
    assert found.endswith(line)
