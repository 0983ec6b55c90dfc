"""helpers.notebooks: notebooks run in place, whole or not at all, and the same every time."""

from pathlib import Path
from unittest.mock import Mock

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers import notebooks
from helpers.atomic import DiskFull


def write(path: Path, *sources: str, tags: tuple[str, ...] = ()) -> bytes:
    nb = new_notebook(cells=[new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)])
    nb.cells[-1].metadata["tags"] = list(tags)
    nbformat.write(nb, path)
    return path.read_bytes()


def test_a_notebook_is_run_in_its_own_folder_and_stored(tmp_path: Path) -> None:
    path = tmp_path / "01_ä b.ipynb"
    write(path, "import os", "print('a')\nprint('b')", "os.path.basename(os.getcwd())")
    assert notebooks.execute(path) > 0
    first = path.read_bytes()
    nb = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in nb.cells] == [1, 2, 3]
    assert nb.cells[1].outputs[0].text == "a\nb\n"
    assert nb.cells[2].outputs[0].data["text/plain"] == repr(tmp_path.name)
    notebooks.execute(path)
    assert path.read_bytes() == first, "a second run must not change a byte"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_failing_cell_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "01.ipynb"
    before = write(path, "print('runs')", "1 / 0")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.execute(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_dead_kernel_and_a_full_disk_are_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path / "01.ipynb", "1")
    monkeypatch.setattr(notebooks, "find", lambda names: [tmp_path / "01.ipynb"])
    for error, words in (
        (DeadKernelError("Kernel died"), "memory runs out: close other programs"),
        (DiskFull(tmp_path), "No space left on the disk of"),
    ):
        monkeypatch.setattr(notebooks, "execute", Mock(side_effect=error))
        assert notebooks.main([]) == 1
        said = capsys.readouterr().err
        assert "the file is unchanged" in said and words in said


def test_a_cell_may_fail_when_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "01.ipynb"
    write(path, "1 / 0", tags=("raises-exception",))
    notebooks.execute(path)
    assert nbformat.read(path, as_version=4).cells[0].outputs[0].ename == "ZeroDivisionError"


def test_tidy_takes_out_widgets_times_and_versions() -> None:
    data = {"text/plain": "Bar()", notebooks.WIDGET_VIEW: {"model_id": "1"}}
    cell = new_code_cell("bar", outputs=[new_output("display_data", data)])
    cell.metadata["execution"] = {"iopub.execute_input": "now"}
    cell.metadata["tags"] = ["solution"]
    nb = new_notebook(cells=[cell], metadata={"widgets": {"state": {}}})
    tidied = notebooks.tidy(nb)
    assert tidied.metadata == notebooks.METADATA
    assert tidied.cells[0].outputs[0].data == {"text/plain": "Bar()"}
    assert tidied.cells[0].metadata == {"tags": ["solution"]}


def test_a_write_that_fails_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "01.ipynb"
    before = write(path, "1")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(notebooks.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        notebooks.store(new_notebook(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_find_by_number_name_or_path(tmp_path: Path) -> None:
    for stem in ("00_start_here", "01_peft_basics"):
        write(tmp_path / f"{stem}.ipynb", "1")
    found = [
        [path.stem[:2] for path in notebooks.find(names, tmp_path)]
        for names in ([], ["01"], ["notebooks/01_peft_basics.ipynb"], ["01", "00"])
    ]
    assert found == [["00", "01"], ["01"], ["01"], ["00", "01"]]
    with pytest.raises(ValueError, match="did you mean '01_peft_basics'"):
        notebooks.find(["peft_basic"], tmp_path)


def test_progress_and_warnings_are_not_stored(tmp_path: Path) -> None:
    path = tmp_path / "01.ipynb"
    write(path, "import sys\nprint('50 %', file=sys.stderr)\nprint('done')")
    notebooks.execute(path)
    (cell,) = nbformat.read(path, as_version=4).cells
    assert [(output.name, output.text) for output in cell.outputs] == [("stdout", "done\n")]
