"""A study's table: nothing runs twice, a half row is cut off, errors name the command."""

import pytest

from helpers.experiments import __main__ as cli
from helpers.experiments.study import Study, StudyError, results, run_study, set_aside


def make(calls: list) -> Study:
    def run(settings, seed):
        calls.append((settings["rate"], seed))
        return {"loss": settings["rate"] + seed}

    return Study("toy", ({"rate": 0.1}, {"rate": 0.2}), ("loss",), run)


def silent(_: str) -> None:
    return None


def test_finished_rows_are_not_run_again(tmp_path):
    calls = []
    run_study(make(calls), seeds=range(2), folder=tmp_path, report=silent)
    assert len(calls) == 4
    table = run_study(make(calls), seeds=range(3), folder=tmp_path, report=silent)
    assert len(calls) == 6 and len(table) == 6
    assert set(table["seed"]) == {0, 1, 2} and (table["torch"].notna()).all()
    assert table.loss.tolist() == pytest.approx((table.rate + table.seed).tolist())


def test_a_half_row_is_dropped_and_run_again(tmp_path):
    calls = []
    run_study(make(calls), seeds=[0], folder=tmp_path, report=silent)
    path = tmp_path / "toy.csv"
    text = path.read_text()
    path.write_text(text[:-20])
    table = run_study(make(calls), seeds=[0], folder=tmp_path, report=silent)
    assert len(calls) == 3 and len(table) == 2
    assert path.read_text().count("\n") == 3


def test_an_interrupt_keeps_what_is_finished(tmp_path):
    calls = []
    study = make(calls)

    def stop_at_second(settings, seed):
        if calls:
            raise KeyboardInterrupt
        return study.run(settings, seed)

    broken = Study(study.name, study.settings, study.metrics, stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run_study(broken, seeds=[0], folder=tmp_path, report=silent)
    assert len(results("toy", tmp_path)) == 1


def test_other_seeds_run_the_chosen_value_only(tmp_path):
    calls = []

    def run(settings, seed):
        calls.append((settings["arm"], settings["rate"], seed))
        return {"validation_loss": abs(settings["rate"] - settings["arm"])}

    grid = tuple({"arm": arm, "rate": rate} for arm in (1, 2) for rate in (1, 2, 3))
    study = Study("tuned", grid, ("validation_loss",), run, tuned="rate")
    run_study(study, seeds=range(3), folder=tmp_path, report=silent)
    assert calls[6:] == [(1, 1, 1), (2, 2, 1), (1, 1, 2), (2, 2, 2)]
    run_study(study, seeds=range(3), folder=tmp_path, report=silent)
    assert len(calls) == 10


def test_a_study_can_start_anew(tmp_path):
    calls = []
    run_study(make(calls), seeds=[0], folder=tmp_path, report=silent)
    set_aside(make(calls), tmp_path)
    set_aside(make(calls), tmp_path)  # nothing left to move: no error
    assert (tmp_path / "toy.csv.old").exists()
    run_study(make(calls), seeds=[0], folder=tmp_path, report=silent)
    assert len(calls) == 4


def test_errors(tmp_path):
    with pytest.raises(StudyError, match="python -m helpers.experiments toy"):
        results("toy", tmp_path)
    (tmp_path / "toy.csv").write_text("a,b\n1,2\n")
    with pytest.raises(StudyError, match="other columns"):
        run_study(make([]), seeds=[0], folder=tmp_path, report=silent)


def test_command_line_names_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["experiments", "ful_vs_lora"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "full_vs_lora" in capsys.readouterr().err
