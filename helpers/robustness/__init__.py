"""What the lessons survive: `python -m helpers.robustness`, and docs/robustness.md that it writes.

- `trials`: one lesson under hardship, in a copy of the checkout, compared as `make test` does it.
- `memory`: what a process and its children hold at their peak.
- `disk`: everything that the course writes, written to a disk that is full.
- `stored`: the table of what was measured, and the page.
"""
