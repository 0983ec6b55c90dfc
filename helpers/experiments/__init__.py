"""Multi-seed studies that are too slow for a lesson; each writes ``data/results/NAME.csv``.

``python -m helpers.experiments NAME`` runs one, goes on where it stopped, and shows the time left.
"""
