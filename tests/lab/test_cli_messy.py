"""`lifecycle data messy`: the counts of a folder, a refusal that names the file, and nothing written over an input."""

from pathlib import Path

from lifecycle_lib.desk import messy
from lifecycle_lib.desk.messy import RATES_FILE
from lifecycle_lib.lab.cli import main


def test_a_missing_file_is_named_and_nothing_is_written(tmp_path, capsys):
    out = tmp_path / "rates.json"
    assert main(["data", "messy", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    assert "codespell_20k.txt: cannot be read" in capsys.readouterr().err and not out.exists()


def test_the_summary_shows_rates_with_intervals_and_the_file_is_the_committed_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(messy, "calibrate", lambda folder: messy.load_rates())
    out = tmp_path / "rates.json"
    assert main(["data", "messy", str(tmp_path), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "phone: 4,827 texts" in said and "[34.6%, 37.4%]" in said and "not fitted" in said
    assert out.read_text() == Path(RATES_FILE).read_text()
