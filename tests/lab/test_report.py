"""The report: every number it prints is in its JSON, the page stands alone, foreign text is escaped."""

from __future__ import annotations

import copy
import html.parser
import re

import pytest
from scipy.stats import binomtest

from lifecycle_lib.core.stats import Effect, wilson
from lifecycle_lib.lab import figures
from lifecycle_lib.lab.report import (
    bytes_text,
    find_report,
    rate_text,
    reasons_text,
    render_html,
    render_text,
    time_text,
    verdict_text,
)

NAMES = ("base", "sft", "dpo", "rlvr", "int8", "int4")
KEYS = ("json_validity", "policy_id", "evidence", "eligibility", "exact_pass", "invented_claim_rate", "refusal",
        "over_refusal")
GREEDY = {"base": 0, "sft": 470, "dpo": 475, "rlvr": 480, "int8": 480, "int4": 474}
EXACT = {"base": 0, "sft": 333, "dpo": 455, "rlvr": 478, "int8": 478, "int4": 470}
CLAIMS = {"base": 0, "sft": 128, "dpo": 9, "rlvr": 0, "int8": 0, "int4": 1}
HOSTILE = '{"evidence":null}</td><script>alert("x")</script>&<b>'


def rates(exact: int, claims: int, n: int = 512) -> dict:
    counts = dict.fromkeys(KEYS, 500) | {"exact_pass": exact, "invented_claim_rate": claims}
    row: dict = {"n_cases": n}
    for key, k in counts.items():
        row |= {key: k / n, f"{key}_low": wilson(k, n)[0], f"{key}_high": wilson(k, n)[1]}
    return row


def fake_report(decision: str = "SHIP", answer: str = HOSTILE) -> dict:
    """A run's report with the numbers of a plausible laptop run."""
    stages = []
    for name in NAMES:
        sample = {"slice": "plain", "case_id": "eval-00000", "prompt": "<bos><policy>late P-1 10d<user>hi<bot>",
                  "expected": '{"evidence":null}', "answer": answer, "verdict": "wrong: not the agreed JSON"}
        stages.append({"name": name, **rates(EXACT[name], CLAIMS[name]), "greedy": rates(GREEDY[name], 0),
                       "weight_bytes": 2_770_000 if name in NAMES[:4] else 480_000, "tokens_per_s": 9123.4,
                       "ttft_p95_ms": 9.5, "slices": {"plain": {"n": 310, "exact_pass": 0.93},
                                                      "boundary": {"n": 72, "exact_pass": 0.61}},
                       "seconds": 84.25, "cpu_s": 83.0, "eval_seconds": 12.0, "peak_memory_bytes": 612_000_000,
                       "steps": 200, "n_params": 692_000, "held_out_loss": 1.234, "fingerprint": "0123456789abcdef",
                       "samples": [sample, sample | {"slice": "boundary"}, sample | {"slice": "no_policy",
                                                                                     "verdict": "right"}]})
    good = {"name": "invalid JSON", "value": 0.9914, "limit": 0.98, "passed": True, "explanation": "512 of 512 valid"}
    bad = good | {"name": "invented claims", "passed": False, "explanation": "128 of 512; upper Wilson bound 0.2893"}
    ship = {"candidate": "int4", "decision": "SHIP", "reasons": [], "checks": [good]}
    stop = {"candidate": "sft", "decision": "BLOCK", "reasons": ["invented claims"], "checks": [good, bad]}
    shipped = decision == "SHIP"
    tried = [ship] if shipped else [stop | {"candidate": name} for name in ("int4", "int8")]
    lineage = [{"name": name, "fingerprint": f"{i:016x}", "seconds": 12.3} for i, name in enumerate(NAMES[:4])]
    return {"stages": stages, "gate": tried[-1] | {"baseline": "rlvr", "temperature": 1.0, "considered": tried,
                                                   "must_block": stop},
            "release": {"state": "full" if shipped else "none", "name": "int4-laptop-seed0" if shipped else None,
                        "release_id": "feedfeedfeedfeed" if shipped else None, "fingerprint": "0123456789abcdef",
                        "served_now": None, "lineage": lineage if shipped else []},
            "seconds": 612.0, "peak_memory_bytes": 612_000_000, "profile": "laptop", "seed": 0, "device": "cpu",
            "run": "laptop-seed0"}


class Reader(html.parser.HTMLParser):
    """Collects tags, what they load, and the text that is shown."""

    void = {"meta", "br", "wbr", "path", "use", "rect", "img", "link"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


def test_numbers_by_hand():
    low, high = binomtest(478, 512).proportion_ci(method="wilson")
    assert rate_text(rates(478, 0), "exact_pass") == f"93.4 % ({100 * low:.1f} to {100 * high:.1f})"
    assert rate_text(rates(478, 0), "exact_pass") == "93.4 % (90.9 to 95.2)"
    assert rate_text({"refusal": None}, "refusal") == "no such case"
    assert [bytes_text(n) for n in (12, 1000, 480_000, 2_770_000, 3_000_000_000)] == [
        "12 bytes", "1 kB", "480 kB", "2.77 MB", "3 GB"]
    assert [time_text(s) for s in (0.04, 84.25, 99.96, 185, 3599.6, 3720)] == [
        "0.0 s", "84.2 s", "1 min 40 s", "3 min 05 s", "1 h 00 min", "1 h 02 min"]


@pytest.mark.parametrize("decision", ["SHIP", "BLOCK"])
def test_both_forms_say_the_same(decision):
    report = fake_report(decision)
    text, page = render_text(report), render_html(report)
    shown = " ".join(" ".join(Reader(page).words).split())
    flat = " ".join(text.split())
    for said in (decision, *verdict_text(report), "612 MB", "10 min 12 s", "128 of 512; upper Wilson bound 0.2893",
                 "FAILS", "Not measured here: other seeds", "held-out loss 1.234", "93.4 %", "90.9 to 95.2",
                 "eval-00000", "692,000 parameters", "right", "wrong: not the agreed JSON", *NAMES):
        assert said in flat and said in shown, said
    assert ("feedfeedfeedfeed" in text) == ("feedfeedfeedfeed" in shown) == (decision == "SHIP")


def test_page_stands_alone_and_is_well_formed():
    reader = Reader(render_html(fake_report()))
    assert reader.open == [] and reader.loads == []
    assert "script" not in reader.tags and "img" not in reader.tags and reader.tags.count("svg") == 1
    page = render_html(fake_report())
    assert "prefers-color-scheme:dark" in page and not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", page)


def test_text_of_the_model_is_escaped():
    page = render_html(fake_report())
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert HOSTILE in "".join(Reader(page).words)  # escaped once: a reader sees what the model wrote
    # the check above catches a page that does not escape
    with pytest.raises(AssertionError):
        broken = page.replace("&lt;script&gt;", "<script>")
        assert "<script>" not in broken


def test_verdict_warns_when_the_gate_lets_claims_pass():
    report = fake_report()
    assert "gate blocks sft: invented claims" in verdict_text(report)[1]
    wrong = copy.deepcopy(report)
    wrong["gate"]["must_block"] |= {"decision": "SHIP", "reasons": []}
    assert verdict_text(wrong)[1].startswith("Warning")
    several = {"reasons": ["invented claims", "slice regression: plain", "latency", "slice regression: boundary"]}
    assert reasons_text(several) == "invented claims, latency, slice regression (plain, boundary)"


def test_find_report_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="lifecycle run --profile smoke --seed 3"):
        find_report(tmp_path, "smoke", 3)
    for seed in (0, 1):
        (tmp_path / f"reports/smoke-seed{seed}").mkdir(parents=True)
        (tmp_path / f"reports/smoke-seed{seed}/report.json").write_text("{}")
    assert find_report(tmp_path, "smoke", 0).parent.name == "smoke-seed0"


# ---- figures -----------------------------------------------------------------------------------------------

@pytest.fixture
def drawn():
    import matplotlib.pyplot as plt
    yield plt
    plt.close("all")


def words(fig) -> str:
    return " ".join(t.get_text() for t in fig.findobj(lambda a: hasattr(a, "get_text")))


def all_figures() -> dict:
    rows = [{"step": i, "loss": 3 - i / 10} for i in range(20)]
    stages, told = fake_report()["stages"], {"not_measured": "other seeds"}
    return {
        "scorecard": figures.scorecard_figure(stages, **told),
        "curve": figures.learning_curve({"a": rows, "b": [rows, rows[:15]]}, title="t", smooth=3, **told),
        "dots": figures.interval_dots({"gain": Effect(0.2, 0.1, 0.3, 5)}, "t", xlabel="points", smallest=0.1,
                                      interval="95 % paired t interval", **told),
        "bars": figures.slice_bars({s["name"]: s["slices"] for s in stages[1:4]}, title="t", **told)}


def test_every_figure_says_what_it_rests_on(drawn):
    for name, fig in all_figures().items():
        said = words(fig)
        assert "Not measured here: other seeds." in said, name
        assert re.search(r"\bn = \d|n under each slice", said), name
        ax = fig.axes[0]
        assert ax.get_xlabel() and (ax.get_ylabel() or name == "dots"), name
        sizes = [t.get_fontsize() for t in fig.findobj(lambda a: hasattr(a, "get_fontsize")) if t.get_text()]
        assert min(sizes) >= 9, name


def test_series_differ_without_colour(drawn):
    assert len({(m, str(line), h) for _, m, line, h in figures.SERIES}) == len(figures.SERIES)
    assert len({m for _, m, _, _ in figures.SERIES}) == len(figures.SERIES)
    lines = [line for line in all_figures()["scorecard"].axes[0].lines if len(line.get_xdata()) == 6
             and line.get_marker() in "os"]
    assert len({line.get_linestyle() for line in lines}) == 2


def test_points_and_whiskers_are_the_numbers(drawn):
    stages = fake_report()["stages"]
    container = figures.scorecard_figure(stages, not_measured="x").axes[0].containers[0]
    assert list(container[0].get_ydata()) == pytest.approx([100 * EXACT[n] / 512 for n in NAMES])
    for name, segment in zip(NAMES, container[2][0].get_segments()):
        want = binomtest(EXACT[name], 512).proportion_ci(method="wilson")
        assert list(segment[:, 1] / 100) == pytest.approx(list(want), abs=1e-12)


def test_figures_refuse_nothing_and_silence(drawn):
    for call in (lambda: figures.scorecard_figure([], not_measured="x"),
                 lambda: figures.learning_curve({}, not_measured="x"),
                 lambda: figures.learning_curve({"a": []}, not_measured="x"),
                 lambda: figures.learning_curve({"a": [{"step": 0, "loss": 1.0}]}, key="reward", not_measured="x"),
                 lambda: figures.interval_dots({}, "t", xlabel="x", interval="i", not_measured="x"),
                 lambda: figures.slice_bars({}, not_measured="x"),
                 lambda: figures.scorecard_figure(fake_report()["stages"], not_measured=" ")):
        with pytest.raises(ValueError):
            call()


def test_svg_is_repeatable_and_labelled(drawn):
    first, second = (figures.to_svg(all_figures()["scorecard"], 'a "quoted" <label>') for _ in range(2))
    assert first == second
    assert 'aria-label="a &quot;quoted&quot; &lt;label>"' in first and "currentColor" in first


def test_a_run_on_own_text_has_a_folder_of_its_own(tmp_path):
    from lifecycle_lib.lab.report import find_report, run_name
    names = [run_name("smoke", 1), run_name("smoke", 1, "a b/my text.csv"), run_name("smoke", 10)]
    assert names == ["smoke-seed1", "smoke-seed1-my_text.csv", "smoke-seed10"]
    for name in names:
        (tmp_path / "reports" / name).mkdir(parents=True)
        (tmp_path / "reports" / name / "report.json").write_text("{}")
    assert find_report(tmp_path, "smoke", 1).parent.name in names[:2]  # never seed 10's
    assert find_report(tmp_path, "smoke", 10).parent.name == "smoke-seed10"
