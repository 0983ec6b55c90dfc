"""The rendered course: a site of the stored outputs, built from what the repository holds anyway.

    python -m helpers.site           builds it into build/site, then checks every link in it
    python -m helpers.site --check   only checks the links of what is there

`python course.py site` is the same and installs the extra `site` of pyproject.toml first. No cell
is run. The site fetches nothing when it is read: it can be opened from a disk, or put on any
server as it is. `tests/site/` opens it in a browser.
"""
