"""Figures carry their alternative text, and are told apart without colour."""

import base64
import html

import matplotlib
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from notebook_rules import image_alts

from helpers import plots


@pytest.fixture
def figure():
    with matplotlib.rc_context():
        plots.use_style()
        fig, ax = plt.subplots()
        ax.plot([1, 2], [3, 4])
        yield fig
        plt.close(fig)


@pytest.fixture
def shown(figure):
    InteractiveShell.instance()
    with capture_output() as captured:
        plots.show(figure, alt='Loss "A" falls\n  from 3 < 4 & rises')
    (output,) = captured.outputs
    return output.data


def test_show_stores_an_image_with_its_alt_text(shown):
    markup = shown["text/html"]
    assert image_alts(markup) == ['Loss "A" falls from 3 < 4 & rises']
    data = markup.partition("base64,")[2].partition('"')[0]
    assert base64.b64decode(data).startswith(b"\x89PNG")
    assert "image/png" not in shown  # JupyterLab would show it without the alt text
    assert html.unescape(markup) != markup


def test_show_closes_the_figure_so_that_it_is_not_shown_twice(figure, shown):
    assert not plt.fignum_exists(figure.number)


def test_empty_alt_text_is_refused(figure):
    with pytest.raises(ValueError, match="alt is empty"):
        plots.show(figure, alt="  ")


def test_each_line_has_its_own_colour_and_marker(figure):
    lines = [figure.axes[0].plot([0, 1], [i, i])[0] for i in range(6)]
    assert len({line.get_color() for line in lines}) == 6
    assert len({line.get_marker() for line in lines}) == 6
    assert figure.dpi == plots.DPI
