"""What a run on other versions is said to have shown; the messages are nbval's own, shortened."""

from pathlib import Path

import pytest

from helpers import outcomes

JUDGED = "C017 wrong · the note says 4,194,304 · measured 12"


def differing(source: str, *lines: str, key: str = "text/plain") -> str:
    """nbval's message on a cell whose output differs: "+" is stored, "-" was computed."""
    return (
        "#x1B[91mNotebook cell execution failed#x1B[0m\n#x1B[94mCell 1: Cell outputs differ\n\n"
        f"Input:\n#x1B[0m{source}\n\n#x1B[94mTraceback:#x1B[0m\n#x1B[94m mismatch '{key}'#x1B[91m"
        "\n\n assert reference_output == test_output failed:\n\n"
        + "".join(f"  {line}\n" for line in lines)
    )


def judged(*lines: str) -> str:
    return differing("claims.judge('C017', n)", *lines)


@pytest.mark.parametrize(
    "message",
    [
        differing("print(loss)", "- loss 0.1234", "?    ^", "+ loss 0.1235", key="stdout"),
        judged(f"- {JUDGED}", f"+ {JUDGED[:-2]}13"),
        judged(f"  {JUDGED}", "- about 2", "+ about 3"),
        differing("raise ValueError", "- new words", "+ old words", key="evalue"),
    ],
)
def test_other_words_are_no_failure(message: str) -> None:
    assert outcomes.only_worded_anew(message)


@pytest.mark.parametrize(
    "message",
    [
        "AssertionError: assert 1 == 2",
        "Cell 5: Cell execution caused an exception\n\nInput:\n1/0",
        "Cell 5: Timeout of 120 seconds exceeded waiting for output.",
        judged(f"- {JUDGED}", f"+ {JUDGED.replace('wrong', 'confirmed')}"),
        judged(f"- {JUDGED}", "+ nothing"),
        differing("print(as_stored)", "- .05 nats: False", "+ .05 nats: True", key="stdout"),
        judged("- about 2", "+ about 3"),  # the verdict cannot be seen
        differing("raise KeyError", "- KeyError", "+ ValueError", key="ename"),
        "Cell outputs differ\n#x1B[91mMissing output fields from running code: {'evalue', 'ename'}",
    ],
)
def test_what_is_a_failure(message: str) -> None:
    assert not outcomes.only_worded_anew(message)


REPORT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.adapters.test_files" name="test_a"/>
<testcase classname="tests.test_setup.TestPip" name="test_b"><skipped message="why"/></testcase>
<testcase classname="notebooks.06_training.ipynb" name="Cell 3"><failure message="Cell 3"
>Cell outputs differ</failure></testcase>
<testcase classname="notebooks.06_training.ipynb" name="Cell 4"><error message="x">dead</error>
</testcase><testcase time="0.1"/></testsuite></testsuites>"""


def test_a_report_becomes_a_table(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT, encoding="utf-8")
    found = outcomes.cases(report)
    assert [(case.part, case.kind) for case in found] == [
        ("tests/adapters", "passed"),
        ("tests", "skipped"),
        ("notebooks/06_training", "worded anew"),
        ("notebooks/06_training", "failed"),
    ]
    lines = outcomes.table(found).splitlines()
    assert lines[0].split() == ["passed", "worded", "anew", "failed", "skipped"]
    assert lines[1].split() == ["notebooks/06_training", "0", "1", "1", "0"]
    assert lines[4].split() == ["together", "1", "1", "1", "1"]
    assert lines[-2:] == [
        "failed: notebooks.06_training.ipynb::Cell 4",
        "worded anew: notebooks.06_training.ipynb::Cell 3",
    ]
    assert outcomes.summary(found) == "1 passed, 1 worded anew, 1 failed, 1 skipped"
    assert outcomes.has_failed(found) and not outcomes.has_failed(found[:3])
