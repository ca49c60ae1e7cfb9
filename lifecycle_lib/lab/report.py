"""A run's report as one self-contained HTML page and as text: the same facts, from the same JSON.

Nothing is fetched: style and figure are inside the page, and it follows the reader's light or dark setting. Right and
wrong are said in words, not in colour alone. Left out: comparing runs (notebooks do that).
"""

import html
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lifecycle_lib.judge.verifiers import NOT_MEASURED as HUMAN_QUEUE

NOT_MEASURED = "other seeds, wordings that the desk's generator does not use, " + ", ".join(HUMAN_QUEUE)
WHAT = {"base": "pretraining on desk documents", "sft": "demonstrations, some with an invented label",
        "dpo": "preference pairs: no invented label", "rlvr": "rewards from a verifier", "int8": "rlvr in packed int8",
        "int4": "rlvr in packed int4"}
RATES = {"exact_pass": "exact pass", "json_validity": "valid JSON", "policy_id": "policy id", "evidence": "evidence",
         "eligibility": "eligibility", "invented_claim_rate": "invented claims", "refusal": "refuses when it should",
         "over_refusal": "refuses when it should not"}
FIGURE_SPACE = "\u2007"  # as wide as a digit: numbers stay in columns
SLICES = {"plain": "Plain case", "boundary": "Two days or less from the limit", "no_policy": "No policy covers it"}


# ---- where reports lie -------------------------------------------------------------------------------------

def run_name(profile: str, seed: int, given: Path | str | None = None) -> str:
    """Name of a run and of its report's folder; `given` is the user's own text or checkpoint, if there is one."""
    own = "" if given is None else "-" + re.sub(r"[^A-Za-z0-9._]+", "_", Path(given).name)
    return f"{profile}-seed{seed}{own}"


def find_report(root: Path, profile: str | None = None, seed: int | None = None) -> Path:
    """The newest report.json below `root`, of this profile and seed if given. ValueError when there is none."""
    names = [f"{profile or '*'}-seed{'*' if seed is None else seed}{own}/report.json" for own in ("", "-*")]
    found = sorted({path for name in names for path in (root / "reports").glob(name)},
                   key=lambda path: path.stat().st_mtime_ns)
    if not found:
        given = {"profile": profile, "seed": seed}
        wanted = "".join(f" --{key} {value}" for key, value in given.items() if value is not None)
        raise ValueError(f"no report{' for' if wanted else ''}{wanted} in {root}; make one with: lifecycle run{wanted}")
    return found[-1]


# ---- words for numbers -------------------------------------------------------------------------------------

def rate_text(row: Mapping, key: str) -> str:
    """A rate with its interval, in percent: "93.4 % (90.9 to 95.3)"."""
    if row[key] is None:
        return "no such case"
    return f"{100 * row[key]:.1f} % ({100 * row[key + '_low']:.1f} to {100 * row[key + '_high']:.1f})"


def bytes_text(n: int) -> str:
    """Bytes for people, powers of 1000: "2.77 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} bytes"


def time_text(seconds: float) -> str:
    """Seconds for people: "4.2 s", "3 min 05 s", "1 h 02 min"."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def what_was_built(report: Mapping) -> str:
    """The run in one sentence."""
    base = report["stages"][0]
    size = f"{base['n_params']:,} parameters"
    start = f"starting from {base['public']}" if "public" in base else "grown from random weights"
    does = ("it reads a shop's policy lines and an order, and answers a return request in strict JSON"
            if report["stages"][-1]["json_validity"] > 0.5 else
            "it has not learnt to answer; this run shows that every stage works, not what it teaches")
    device = report["device"].upper()
    return f"A language model of {size}, {start} in {time_text(report['seconds'])} on {device}: {does}."


def reasons_text(decision: Mapping) -> str:
    """Why a candidate was blocked, the slices gathered: "invented claims, slice regression (boundary, plain)"."""
    start = "slice regression: "
    named = [reason.removeprefix(start) for reason in decision["reasons"] if reason.startswith(start)]
    others = [reason for reason in decision["reasons"] if not reason.startswith(start)]
    return ", ".join([*others, *([f"slice regression ({', '.join(named)})"] if named else [])])


def verdict_text(report: Mapping) -> tuple[str, str]:
    """(what the gate decided, what became of the checkpoint that it has to block)."""
    gate, release, proof = report["gate"], report["release"], report["gate"]["must_block"]
    if gate["decision"] == "SHIP":
        size = next(row for row in report["stages"] if row["name"] == gate["candidate"])["weight_bytes"]
        first = (f"{gate['candidate']} passes all {len(gate['checks'])} checks against {gate['baseline']} and is "
                 f"released ({bytes_text(size)} of weights, state: {release['state']}).")
    else:
        tried = "; ".join(f"{one['candidate']}: {reasons_text(one)}" for one in gate["considered"])
        first = f"Nothing is released. {tried}."
    if not proof["checks"]:
        second = f"The gate could not judge {proof['candidate']} either, which it is there to block."
    elif proof["decision"] == "BLOCK":
        second = f"As it must, the same gate blocks {proof['candidate']}: {reasons_text(proof)}."
    else:
        second = f"Warning: the same gate would let {proof['candidate']} pass, which it is there to block."
    return first, second


def printable(text: str) -> str:
    """A model's answer with control characters as escapes: it may be noise, and a page may not hold those."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- tables, shared by both forms --------------------------------------------------------------------------

def scorecard(report: Mapping) -> list[list[str]]:
    """Header and one row a stage."""
    keys = ("exact_pass", "invented_claim_rate", "json_validity", "eligibility")
    return [["stage", *(RATES[key] for key in keys), "weights", "tokens/s", "what moved it"]] + [
        [s["name"], *(rate_text(s, key) for key in keys), bytes_text(s["weight_bytes"]), f"{s['tokens_per_s']:,.0f}",
         "a public checkpoint as it is" if "public" in s else WHAT[s["name"]]] for s in report["stages"]]


def all_rates(report: Mapping, keys: Sequence[str] = tuple(RATES)) -> list[list[str]]:
    """These rates of every stage, at temperature 1 and greedy."""
    rows = [["stage", "decoding", *(RATES[key] for key in keys)]]
    for s in report["stages"]:
        rows += [[s["name"], how, *(rate_text(part, key) for key in keys)]
                 for how, part in (("temperature 1", s), ("greedy", s["greedy"]))]
    return rows


def slices(report: Mapping) -> list[list[str]]:
    """Exact pass by slice of the evaluation."""
    names = {name: part["n"] for name, part in report["stages"][0]["slices"].items()}
    return [["stage", *(f"{name}, n = {n}" for name, n in names.items())]] + [
        [s["name"], *(f"{100 * s['slices'][name]['exact_pass']:.1f} %" for name in names)] for s in report["stages"]]


def checks(decision: Mapping) -> list[list[str]]:
    """The gate's checks on one candidate, passed or failed in words."""
    return [["check", "verdict", "value", "limit", "why"]] + [
        [c["name"], "passes" if c["passed"] else "FAILS", f"{c['value']:.4g}", f"{c['limit']:.4g}", c["explanation"]]
        for c in decision["checks"]]


def costs(report: Mapping) -> list[list[str]]:
    """What each stage took."""
    rows = [["stage", "steps", "making it", "CPU time", "both evaluations", "peak memory so far", "first token, p95"]]
    for s in report["stages"]:
        rows.append([s["name"], str(s.get("steps", "-")), time_text(s["seconds"]), time_text(s["cpu_s"]),
                     time_text(s["eval_seconds"]), bytes_text(s["peak_memory_bytes"]), f"{s['ttft_p95_ms']:.1f} ms"])
    return rows


def lineage(report: Mapping) -> list[list[str]]:
    """The released checkpoint's ancestry, oldest first."""
    return [["artifact", "fingerprint", "made in"]] + [
        [a["name"], a["fingerprint"], time_text(a["seconds"])] for a in report["release"]["lineage"]]


def notes(report: Mapping) -> list[str]:
    """Sentences that belong under the scorecard."""
    base = report["stages"][0]
    lines = [f"{base['n_cases']} frozen cases whose (days, window) pairs no training text shows; temperature 1; each "
             "rate with its 95 % Wilson interval."]
    if "held_out_loss" in base:
        lines.append(f"Base: held-out loss {base['held_out_loss']:.3f} nats per token on desk documents.")
    if "corpus" in base:
        own = base["corpus"]
        lines.append(f"Own text: held-out loss {own['held_out_loss_before']:.3f} before training, "
                     f"{own['held_out_loss']:.3f} after (nats per token; {own['nats_per_byte']:.3f} per byte, over "
                     f"{own['held_out_bytes']} bytes held out).")
    return lines


# ---- text ---------------------------------------------------------------------------------------------------

def render_text(report: Mapping) -> str:
    """The report for a terminal."""
    first, second = verdict_text(report)
    own = report["run"].removeprefix(f"{report['profile']}-seed{report['seed']}").removeprefix("-")
    own = f", with {own}" if own else ""
    out = [f"LIFECYCLE {report['profile']}, seed {report['seed']}, {report['device']}{own}",
           *_wrap(what_was_built(report)), "", *_wrap(f"GATE {report['gate']['decision']}: {first}"), *_wrap(second),
           "", "SCORECARD", *_columns(scorecard(report)), *(line for note in notes(report) for line in _wrap(note)), "",
           "SAMPLE ANSWERS (temperature 1)"]
    for number, case in enumerate(report["stages"][0]["samples"]):
        out += [f"{SLICES[case['slice']]}, {case['case_id']}", f"  prompt   {case['prompt']}",
                f"  expected {case['expected']}"]
        for s in report["stages"]:
            one = s["samples"][number]
            out.append(f"  {s['name']:<8} {printable(one['answer'])}  [{one['verdict']}]")
    for decision in (*report["gate"]["considered"], report["gate"]["must_block"]):
        out += ["", *_wrap(f"GATE ON {decision['candidate']}: {decision['decision']}"
                           + (f" ({reasons_text(decision)})" if decision["reasons"] else "")),
                *(_columns(checks(decision)) if decision["checks"] else [])]
    out += ["", f"RELEASE {report['release']['name'] or 'none'}"]
    if report["release"]["lineage"]:
        out += [f"id {report['release']['release_id']}, state {report['release']['state']}", *_columns(lineage(report))]
    out += ["", "COSTS", *_columns(costs(report)),
            f"all together {time_text(report['seconds'])}, peak memory {bytes_text(report['peak_memory_bytes'])}", "",
            "EXACT PASS BY SLICE", *_columns(slices(report)), "", "EVERY RATE"]
    out += [*_columns(all_rates(report, tuple(RATES)[:4])), "", *_columns(all_rates(report, tuple(RATES)[4:])), "",
            *_wrap(f"Not measured here: {NOT_MEASURED}.")]
    return "\n".join(out) + "\n"


def _wrap(line: str) -> list[str]:
    return textwrap.wrap(line, 118) or [""]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


# ---- HTML ---------------------------------------------------------------------------------------------------

CSS = """
:root{color-scheme:light dark;--bg:#fcfcfa;--ink:#1c1d1f;--soft:#62656b;--line:#dcdcd6;--card:#fff;--good:#17663a;
--goodbg:#e6f3ea;--bad:#9c2a2a;--badbg:#fbeaea}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--ink:#e9e9e6;--soft:#a0a4ab;--line:#33373d;--card:#1c1f23;
--good:#8fd6a9;--goodbg:#16291e;--bad:#f2a3a3;--badbg:#331b1c}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:22px 28px 60px}h1{font-size:25px;line-height:1.2;margin:0 0 4px;
letter-spacing:-.01em}h2{font-size:18px;margin:38px 0 8px}h3{font-size:15px;margin:20px 0 6px}
p{margin:0 0 8px;max-width:95ch}
.soft,small,caption{color:var(--soft)}small{font-size:12px;white-space:nowrap}.kicker{font-size:12.5px;color:var(--soft);
margin:0 0 2px}.banner{border:1px solid;border-left-width:6px;border-radius:8px;padding:10px 16px;margin:12px 0 14px;
display:flex;gap:16px;align-items:center}.banner b{font-size:22px;letter-spacing:.03em}.banner p{margin:0}
.ship{background:var(--goodbg);border-color:var(--good)}.ship b{color:var(--good)}.block{background:var(--badbg);
border-color:var(--bad)}.block b{color:var(--bad)}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums;margin:0 0 6px}
th{text-align:left;font-weight:600;color:var(--soft);font-size:12.5px;border-bottom:1.5px solid var(--line)}
th,td{padding:4px 14px 4px 0;vertical-align:top}td{border-bottom:1px solid var(--line)}td:first-child{font-weight:600}
.figure{margin:10px 0 0}.figure svg{width:100%;max-width:880px;height:auto;display:block}
.figure svg text{fill:currentColor}
code{font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.id{white-space:nowrap}.right{color:var(--good);font-weight:600}.wrong{color:var(--bad);font-weight:600}
.samples td{width:31%}
.samples td:first-child{width:7%}.samples thead code{font-weight:400;color:var(--ink)}
"""


class Html(str):
    """Text that is already HTML."""


def esc(value: object) -> Html:
    """Escaped, unless it is already HTML."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def table(rows: Sequence[Sequence[object]], kind: str = "") -> Html:
    """Rows as a table that scrolls sideways where it must; the first row is the header."""
    head = "".join(f"<th scope=col>{esc(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return Html(f'<div class=scroll><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
                "</div>")


def _cell(cell: object) -> Html:
    """A cell: intervals in small type, the words right, wrong, passes and FAILS also in colour."""
    text = esc(cell)
    if isinstance(cell, Html):
        return text
    if text in ("passes", "FAILS"):
        return Html(f"<span class={'right' if text == 'passes' else 'wrong'}>{text}</span>")
    number, bracket, interval = text.partition(" % (")
    if not bracket or not number.replace(".", "").isdigit():
        return text
    return Html(f"{number.rjust(5, FIGURE_SPACE)} % <small>{interval.rstrip(')')}</small>")


def code(text: str) -> Html:
    """Prompt or answer in fixed width; lines break after commas and before tags, not inside an id."""
    safe = re.sub(r"P-\d", r"<span class=id>\g<0></span>", esc(printable(text)).replace(",", ",<wbr>"))
    return Html(f"<code>{safe.replace('&lt;', '<wbr>&lt;')}</code>")


def sample_table(report: Mapping) -> Html:
    """The same cases answered by every stage, side by side."""
    head: list[object] = ["stage"]
    for case in report["stages"][0]["samples"]:
        head.append(Html(f"{esc(SLICES[case['slice']])}, {esc(case['case_id'])}<br>{code(case['prompt'])}<br>"
                         f"expected {code(case['expected'])}"))
    rows = [head]
    for s in report["stages"]:
        rows.append([s["name"], *(Html(
            f"{code(one['answer'])}<br>"
            f"<span class={one['verdict'].partition(':')[0]}>{esc(one['verdict'])}</span>") for one in s["samples"])])
    return table(rows, "samples")


def render_html(report: Mapping) -> str:
    """The report as one page. Raises ValueError when there are no stages."""
    from lifecycle_lib.lab.figures import scorecard_figure, to_svg  # matplotlib: only when a page is drawn

    drawn = scorecard_figure(report["stages"], not_measured="other seeds, other wordings", width=8.6, height=3.1)
    figure = to_svg(drawn, "Exact pass and invented claims by stage, with intervals; the table has the numbers")
    first, second = verdict_text(report)
    gate, release = report["gate"], report["release"]
    kind = "ship" if gate["decision"] == "SHIP" else "block"
    body = [f"<p class=kicker>{esc(report['profile'])} profile, seed {report['seed']}, {esc(report['device'])}</p>"
            "<h1>A returns assistant, from its first weights to its release</h1>",
            _paragraphs([what_was_built(report)]),
            f'<div class="banner {kind}"><b>{esc(gate["decision"])}</b><div>{_paragraphs([first, second])}</div></div>',
            table(scorecard(report)), _paragraphs([" ".join(notes(report))], "soft"),
            f"<div class=figure>{figure}</div>",
            "<h2>Three cases, every stage</h2>",
            _paragraphs(["The first frozen case of each kind, answered at temperature 1."]),
            sample_table(report), "<h2>What the gate checked</h2>"]
    for decision in (*gate["considered"], gate["must_block"]):
        why = " (it has to be blocked)" if decision is gate["must_block"] else f" against {gate['baseline']}"
        body.append(f"<h3>{esc(decision['candidate'])}{esc(why)}: {esc(decision['decision'])}</h3>")
        body.append(table(checks(decision)) if decision["checks"] else _paragraphs(decision["reasons"]))
    body.append("<h2>Released checkpoint and where it comes from</h2>")
    if release["lineage"]:
        body += [_paragraphs([f"{release['name']}, release {release['release_id']}, state {release['state']}. The same "
                              f"from the store: lifecycle lineage {release['fingerprint']}"]), table(lineage(report))]
    else:
        body.append(_paragraphs(["None: no candidate passed the gate."]))
    body += ["<h2>What it cost</h2>", table(costs(report)),
             _paragraphs([f"All together {time_text(report['seconds'])}; peak memory "
                          f"{bytes_text(report['peak_memory_bytes'])}."], "soft"),
             "<h2>Exact pass by slice</h2>", table(slices(report)), "<h2>Every rate</h2>", table(all_rates(report)),
             _paragraphs([f"Not measured here: {NOT_MEASURED}."], "soft")]
    return ("<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>lifecycle: {esc(report['profile'])}, seed {report['seed']}, {esc(gate['decision'])}</title>"
            f"<style>{CSS}</style></head><body><main>{''.join(body)}</main></body></html>\n")


def _paragraphs(lines: Iterable[str], kind: str = "") -> str:
    return "".join(f'<p class="{kind}">{esc(line)}</p>' for line in lines)
