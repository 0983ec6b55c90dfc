"""The page of all claims and the README's findings say what the ledger says."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from helpers import claims
from helpers.claims import book, page, places
from helpers.claims.__main__ import main

HINT = "run: python -m helpers.claims page"
SETTLED = claims.Claim(
    "C001", "1. One", "a | claim of ~2 *stars*", "api", "somehow", verdict="wrong", measured="3"
)
OPEN = claims.Claim("C002", "2. Two", "another", "api", "somehow")


@pytest.fixture
def toy(tmp_path):
    """A repository with two claims: one settled below a notebook's second heading, one open."""
    for folder in ("data", "notebooks", "tests"):
        (tmp_path / folder).mkdir()
    line = "C001 wrong · the note says 2 · measured 3"
    output = {"output_type": "execute_result", "data": {"text/plain": line}, "metadata": {}}
    cells = [
        {"cell_type": "markdown", "source": "# Title\n## 1. Before\n```\n# no heading\n```"},
        {"cell_type": "markdown", "source": ["## 2. It's `here`, twice\n", "Words."]},
        {"cell_type": "code", "source": 'claims.judge("C001", 3)', "outputs": [output]},
        {"cell_type": "markdown", "source": "## 3. After"},
    ]
    (tmp_path / "notebooks" / "04_x.ipynb").write_text(json.dumps({"cells": cells}))
    book.write(tmp_path, [replace(SETTLED, settled_by="notebooks/04_x.ipynb"), OPEN])
    (tmp_path / "data" / "surprises.csv").write_text("id,why\nC001,nobody knew\n")
    marks = "\n".join(page.MARKS)
    (tmp_path / "README.md").write_text(f"# Course\n\n{marks}\n\nThe rest.\n", encoding="utf-8")
    return tmp_path


def row(text: str, id: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f'| <a id="{id}">')]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# ---------------------------------------------------------------------------- what is committed


def test_the_page_is_up_to_date():
    stored = (book.ROOT / page.PAGE).read_text(encoding="utf-8")
    assert stored == page.page(book.ROOT), HINT


def test_the_readme_agrees_with_the_ledger():
    stored = (book.ROOT / "README.md").read_text(encoding="utf-8")
    assert stored == page.readme(book.ROOT), HINT


def test_the_page_has_every_claim_once_with_its_verdict_and_its_full_figures():
    text = page.page(book.ROOT)
    for claim in book.read(book.ROOT):
        cells = row(text, claim.id.lower())
        assert len(cells) == 6 and cells[2] == claim.verdict
        shown = "".join(cells).replace("\\", "")
        assert claim.claim.replace("\\", "") in shown
        assert claim.measured in shown and claim.condition in shown


def test_ten_claims_surprise_and_each_is_settled():
    chosen = page.surprises(book.ROOT)
    assert len(chosen) == 10
    assert all(claims.find(id).verdict != "open" for id in chosen)
    assert not [why for why in chosen.values() if re.search(r"\d", why)], "figures: of the ledger"
    assert all(10 < len(why) <= 100 for why in chosen.values())


# -------------------------------------------------------------------------- how it is put together


def test_a_claim_leads_to_the_heading_above_its_cell(toy):
    assert places.headings(toy) == {("notebooks/04_x.ipynb", "C001"): "2. It's `here`, twice"}
    cells = row(page.page(toy), "c001")
    link = "../notebooks/04_x.ipynb#2-its-here-twice"
    assert cells[-1] == rf"[lesson 04: 2. It's \`here\`, twice]({link})"


def test_a_claim_that_a_test_settles_leads_to_the_file(toy):
    book.write(toy, [replace(SETTLED, settled_by="tests/test_a.py::TestB::test_the_sum_is_kept")])
    assert row(page.page(toy), "c001")[-1] == "[test: the sum is kept](../tests/test_a.py)"


def test_markdown_in_a_claim_is_shown_as_it_is(toy):
    assert row(page.page(toy), "c001")[1] == r"a \| claim of \~2 \*stars\*"


def test_an_open_claim_says_so(toy):
    text = page.page(toy)
    assert row(text, "c002")[2:] == ["open", "not settled yet", "–", "–"]
    assert "1 wrong and 1 open" in text and "1 claims: 1 open." in text
    book.write(toy, [SETTLED])
    assert "open" not in page.counted(book.read(toy)) and "*open*" not in page.page(toy)


def test_long_figures_are_short_in_the_table_and_whole_beside_it(toy):
    measured = "; ".join(
        f"case {i}: 0.{i} (a) and 0.2 (b), means of 5 seeds, {i}" for i in range(9)
    )
    condition = f"holds: {'; '.join('abcdefgh' * 3)} · undecided: {'z' * 80}"
    book.write(toy, [replace(SETTLED, measured=measured, condition=condition)])
    cells = row(page.page(toy), "c001")
    assert cells[3].startswith("case 0: 0.0 (a) and 0.2 (b), and 8 more<details>")
    assert measured in cells[3] and condition in cells[3]
    assert cells[4] == "holds: 24 conditions · undecided: 1 condition"


def test_a_figure_of_conditions_names_them():
    partly = replace(SETTLED, measured="1 of 2 conditions", condition="holds: a · fails: b")
    assert page.figure(partly) == "holds: a · fails: b"
    assert page.figure(replace(SETTLED, condition="holds: a")) == "3"
    assert page.figure(replace(SETTLED, measured="false")) == "false"
    assert page.figure(OPEN) == "not settled yet"


def test_a_change_in_the_ledger_is_written_once(toy):
    assert page.write(toy) == [page.PAGE, "README.md"]
    assert page.write(toy) == []
    book.write(toy, [replace(SETTLED, measured="4")])
    assert page.write(toy) == [page.PAGE, "README.md"]
    text = (toy / "README.md").read_text(encoding="utf-8")
    assert "| wrong | 4 | nobody knew |" in text
    assert text.startswith("# Course\n\n<!--") and text.endswith("\n\nThe rest.\n")


def test_a_readme_without_its_place_is_left_alone(toy):
    (toy / "README.md").write_text("# Course\n")
    with pytest.raises(claims.ClaimError, match="put the lines `<!-- findings"):
        page.write(toy)
    assert not (toy / page.PAGE).exists()


def test_a_surprise_that_is_no_claim_is_named(toy):
    (toy / "data" / "surprises.csv").write_text("id,why\nC999,nobody knew\n")
    with pytest.raises(claims.ClaimError, match="names C999"):
        page.write(toy)


def test_command_line(toy, monkeypatch, capsys):
    monkeypatch.setattr("helpers.claims.__main__.ROOT", toy)
    assert main(["page"]) == 0
    assert capsys.readouterr().out == "docs/claims.md is written.\nREADME.md is written.\n"
    assert main(["page"]) == 0
    assert "up to date" in capsys.readouterr().out
    (toy / "README.md").write_text("# Course\n")
    assert main(["page"]) == 1
    assert "has no place for the findings" in capsys.readouterr().err
