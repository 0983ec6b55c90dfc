"""How pytest and nbval run here: offline, tests before notebooks, and no comparison of chance."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent

# Set before anything is imported; the kernels that nbval starts inherit both.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# stderr holds progress bars and warnings, an SVG differs with matplotlib's random ids.
NOT_COMPARED = ("stderr", "image/svg+xml")
OUTPUT_TIMEOUT = 120  # seconds; nbval's 5 are too few for a kernel on a busy machine


def pytest_configure(config: pytest.Config) -> None:
    """Point nbval to the sanitising patterns, from whichever folder pytest was started."""
    if getattr(config.option, "nbval_sanitize_with", "no nbval") is None:
        config.option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")


def pytest_collectstart(collector: pytest.Collector) -> None:
    if hasattr(collector, "skip_compare"):  # a notebook, collected by nbval
        collector.skip_compare += NOT_COMPARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests first: when one fails, its message comes before minutes of notebooks."""
    items.sort(key=lambda item: item.path.suffix == ".ipynb")
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = OUTPUT_TIMEOUT
