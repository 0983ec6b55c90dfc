"""Figures that everybody can read: one style, and alternative text for every picture.

Source: matplotlib; the style is this course's own, the colours are named below.
Taught in: notebook 00, section 2.
"""

import base64
import html
import io

import matplotlib.pyplot as plt
from cycler import cycler
from IPython.display import HTML, display
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 110


def use_style() -> None:
    """Set matplotlib's defaults for the lessons: colour-blind-safe, and readable in grey too.

    Each line has a colour and a marker of its own, so that no figure depends on colour alone.

    Source: M. Okabe and K. Ito, Color Universal Design (2008), without yellow, which is too pale
    on white.
    """
    plt.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=MARKERS),
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 12,
            "axes.labelsize": 11,
            "figure.dpi": DPI,
            "figure.figsize": (6.5, 3.8),
            "figure.facecolor": "white",
            "font.size": 11,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "lines.markersize": 5,
        }
    )


def show(fig: Figure, alt: str) -> None:
    """Display a figure with its alternative text, and close it.

    The picture goes out as an HTML ``<img alt=…>``: JupyterLab ignores an ``alt`` in the metadata
    of an ``image/png`` output, and an HTML image keeps it in JupyterLab, Colab and on GitHub.

    Args:
        fig: the figure; drawn at ``DPI`` dots per inch and closed afterwards.
        alt: what is drawn and what to see in it, for those who do not see the picture.

    Raises:
        ValueError: ``alt`` is empty.
    """
    if not alt.strip():
        raise ValueError("alt is empty; say what the figure shows, e.g. alt='Loss falls from …'")
    display(HTML(_image(fig, alt)))
    plt.close(fig)


def _image(fig: Figure, alt: str) -> str:
    png = io.BytesIO()
    # No Software entry: the stored bytes must not change with matplotlib's version alone.
    fig.savefig(png, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    data = base64.b64encode(png.getvalue()).decode("ascii")
    return (
        f'<img alt="{html.escape(" ".join(alt.split()))}" style="max-width: 100%" '
        f'src="data:image/png;base64,{data}">'
    )
