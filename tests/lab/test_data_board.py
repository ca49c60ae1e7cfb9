"""The board: its counts by hand and against the manifest, what it draws, and odd corpora."""

import json

import matplotlib.pyplot as plt
import pytest

from lifecycle_lib.core.stats import wilson
from lifecycle_lib.corpus.gate import run_gate
from lifecycle_lib.corpus.manifest import KEPT, read_manifest
from lifecycle_lib.lab import data_board as B


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("LIFECYCLE_QUIET", "1")
    yield
    plt.close("all")


def row(i, **more):
    return {"id": f"r{i}", "text": f"the kettle {i * 7919} came on day {i} to shop number {i * 31}", "source": "A",
            "licence": "MIT", "captured": "2024-05-01", "slice": "x", "domain": "d"} | more


@pytest.fixture
def folder(tmp_path):
    rows = [*(row(i) for i in range(10)), *(row(i, id=f"c{i}", captured="2024-05-09") for i in range(3)),
            row(20, source="B", licence=""), row(21, source="B", captured=None), row(22, slice="rare", domain="e"),
            row(23, text="x")]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{\n")
    run_gate(path, tmp_path / "out")
    return tmp_path / "out"


def test_counts_by_hand(folder):
    board = B.read_board(folder)
    assert (board.lines, board.undated) == (18, 1)
    assert dict(board.ends["source"]["A"]) == {"kept": 11, "reject": 4}
    assert dict(board.ends["source"]["B"]) == {"quarantine": 1, "kept": 1}
    assert dict(board.ends["source"]["(unreadable)"]) == {"reject": 1}
    # 2024-05-01 is a Wednesday of the week of Monday April 29, 2024-05-09 a Thursday of May 6
    assert dict(board.weeks) == {"2024-04-29": [0, 11], "2024-05-06": [3, 3]}
    assert dict(board.ends["slice"]["rare"]) == {"kept": 1}


def test_counts_are_the_manifests(folder):
    board, manifest = B.read_board(folder), read_manifest(folder)
    for by, names in manifest["by"].items():
        ends = board.ends[by].items()
        assert {n: c["kept"] for n, c in ends} == {n: sum(c[v] for v in KEPT) for n, c in names.items()}
        assert {n: sum(c.values()) for n, c in ends} == {n: sum(c.values()) for n, c in names.items()}
        assert sum(board.kept_bytes[by].values()) == manifest["counts"]["bytes_kept"]


def texts(fig):
    return " ".join(t.get_text() for t in fig.findobj(plt.Text))


def test_what_is_drawn(folder):
    fig = B.data_board(folder, min_rows=5)
    said = texts(fig)
    assert "A (15)" in said and "rare: 1 of 1 LOW" in said and "n = 18 lines" in said and "Not measured here" in said
    assert "Wilson" in said and "1 kept rows and copies have no capture date" in said
    assert len(fig.axes) == 6
    dots = fig.axes[0].containers[0]  # kept, by source
    assert [round(x, 6) for x in dots[0].get_xdata()] == [round(100 * 11 / 15, 6), 50.0, 0.0]
    low, high = dots[2][0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx(tuple(100 * w for w in wilson(11, 15)))


def test_a_bar_of_the_wrong_interval_is_caught(folder, monkeypatch):
    """Broken on purpose: bars of p +- 1.96 sd, which vanish at 0 of n."""
    monkeypatch.setattr(B, "wilson", lambda k, n: (k / n - 1.96 * (k / n * (1 - k / n) / n) ** .5,
                                                   k / n + 1.96 * (k / n * (1 - k / n) / n) ** .5))
    low, high = B.data_board(folder).axes[0].containers[0][2][0].get_segments()[-1][:, 0]
    assert low == high  # 0 of 1 would be certain


def test_many_names_are_cut_and_add_up():
    from collections import Counter
    counts = {f"s{i:02d}": Counter(kept=i, reject=1) for i in range(40)}
    shown = B.largest(counts)
    assert len(shown) == B.MOST and shown[0][0] == "s39" and shown[-1][0] == "29 others"
    assert sum((c for _, c in shown), Counter()) == sum(counts.values(), Counter())
    assert B.largest(dict(list(counts.items())[:3])) == [(n, counts[n]) for n in ("s02", "s01", "s00")]


@pytest.mark.parametrize("change", [{"licence": ""}, {"captured": None}, {"source": "a$b$ \u200f" + "z" * 90},
                                    {"captured": "0001-01-01"}, {"captured": "2023-02-30"}])
def test_odd_corpora_are_drawn(tmp_path, change):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row(i, **change)) + "\n" for i in range(3)))
    run_gate(path, tmp_path / "out")
    assert B.write_board(tmp_path / "out").read_bytes().startswith(b"\x89PNG")


def test_refusals(folder, tmp_path):
    with pytest.raises(ValueError, match="min_rows=0"):
        B.data_board(folder, min_rows=0)
    with pytest.raises(ValueError, match="no finished gate run"):
        B.data_board(tmp_path)


def test_only_its_own_file_is_added(folder):
    before = sorted(p.name for p in folder.iterdir())
    assert B.write_board(folder).name == "board.png"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*before, "board.png"])
    assert not plt.get_fignums()
