"""Commands on the user's own JSONL: data gate, diff, explain, replay.

`gate` returns 1 when lines were lost (no row could be made of them) or nothing was kept, `diff` when a slice lost more
than was allowed, `replay` when the decisions did not come out again.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

SHOWN = 8  # lines of a kind, then a count
BY = ("slice", "source", "domain", "licence")


def cmd_gate(args: argparse.Namespace) -> int:
    from lifecycle_lib.corpus.decisions import lost_lines
    from lifecycle_lib.corpus.gate import run_gate

    manifest = run_gate(args.file, args.out, _config(args))
    say(summary(manifest, args.by, args.file))
    lost = manifest["counts"]["lost"]
    if lost:
        say(f"\n{lost:,} lines lost, no row could be made of them:")
        for line in lost_text(args.file, lost_lines(args.out)):
            say(line)
    say(f"\n{Path(args.out) / 'manifest.json'}  {manifest['hash'][:16]}")
    if args.board:
        from lifecycle_lib.lab.data_board import write_board

        say(write_board(args.out))
    if {"no_licence", "no_source", "licence_not_spdx"} & set(manifest["counts"]["reason"]):
        say('a row is kept only with a "licence" (SPDX) and a "source": find them out, add them, and gate again')
    if "no_capture_date" in manifest["counts"]["reason"]:
        say('add "captured" (YYYY-MM-DD) to a row and it is admitted without risk: rights are dated')
    if not manifest["counts"]["kept"]:
        say(f"nothing was kept: see the reasons above, or: lifecycle data explain {args.out} line:1")
    return 1 if lost or not manifest["counts"]["kept"] else 0


def _config(args: argparse.Namespace) -> Any:
    """The configuration file's fields, with those of the command line over them."""
    from lifecycle_lib.core.records import read_json
    from lifecycle_lib.corpus.gate import GateConfig

    given = read_json(args.config) if args.config else {}
    if not isinstance(given, dict):
        raise ValueError(f"{args.config}: a {type(given).__name__} where an object is needed; give {{...}}")
    over = {"near_threshold": args.near, "pii": args.pii, "allowed_sources": args.allow}
    given = given | {name: value for name, value in over.items() if value is not None}
    return GateConfig.from_dict(given, args.config or "options")


def summary(manifest: dict[str, Any], by: str, name: str) -> str:
    """Counts of a manifest as two short tables."""
    counts = manifest["counts"]
    verdict, lines = counts["verdict"], counts["lines"]
    said = ", ".join(f"{v.replace('_', ' ')} {n:,}" for v, n in verdict.items() if n)
    head = (f"{name}: {lines:,} lines, kept {counts['kept']:,} ({counts['kept'] / lines:.1%}), "
            f"rules {manifest['rules']['version']}\n{said}")
    reasons = sorted(((n, r) for r, n in counts["reason"].items() if r != "passed"), reverse=True)
    rows = sorted(manifest["by"][by].items(), key=lambda item: (-sum(item[1].values()), item[0]))
    shown = [[part, *(f"{v:,}" for v in (sum(c.values()), *c.values()))] for part, c in rows[:2 * SHOWN]]
    text = [head, table(["reason", "lines"], [[r, f"{n:,}"] for n, r in reasons])] if reasons else [head]
    text.append(table([by, "lines", "admit", "with risk", "quarantine", "reject"], shown))
    if len(rows) > 2 * SHOWN:
        text.append(f"and {len(rows) - 2 * SHOWN:,} more in the manifest")
    return "\n\n".join(text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns of at most 60 characters; those in `left` are text, the others numbers to the right."""
    rows = [[_cut(cell, 60) for cell in row] for row in (head, *rows)]
    wide = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in
                               enumerate(zip(row, wide))).rstrip() for row in rows)


def lost_text(name: str, lost: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The first lines in full, then all line numbers by reason, neighbours as ranges."""
    ranges: dict[str, list[list[int]]] = {}
    for n, decision in enumerate(lost):
        line, reason = decision["line"], decision["reason"]
        if n < SHOWN:
            yield f"{name}:{line}: {decision['details'][0]['message']}"
        spans = ranges.setdefault(reason, [])
        if spans and spans[-1][1] == line - 1:
            spans[-1][1] = line
        else:
            spans.append([line, line])
    for reason, spans in ranges.items():
        text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans[:200])
        yield f"{reason}: lines {text}" + (" ... (all in decisions.jsonl)" if len(spans) > 200 else "")


def cmd_diff(args: argparse.Namespace) -> int:
    from lifecycle_lib.corpus.decisions import diff, too_much_lost

    if not 0 <= args.max_loss <= 1:  # before the work
        raise ValueError(f"--max-loss {args.max_loss}: give a share from 0 to 1, such as 0.1")
    parts = diff(args.before, args.after, args.by, args.examples)
    failed = too_much_lost(parts, args.max_loss)
    shown = [part for part in parts if part.lost or part.gained]
    rows = [[p.name, f"{p.before:,}", f"{p.kept:,}", f"{p.lost_share:.1%}" if p.before else "-", f"{p.gained:,}",
             ", ".join(f"{r} {n:,}" for r, n in p.reasons.most_common(3))] for p in shown]
    if rows:
        say(table([args.by, "before", "still", "lost", "new", "why"], rows, left=(0, 5)))
    say(f"{len(parts) - len(shown)} of {len(parts)} unchanged")
    for part in shown:
        name = _cut(part.name, 40)
        for e in part.examples:
            why = e.get("reason", "not in the second input")
            say(f"\n{name}  lost {_cut(e['id'], 40)} ({why}): {_cut(e['text'])}")
            if other := e.get("representative"):
                alike = f" (Jaccard {e['jaccard']})" if "jaccard" in e else ""
                say(f"{name}  kept {_cut(other['id'], 40)}{alike}: {_cut(other['text'])}")
    if failed:
        say(f"\nFAILED: more than {args.max_loss:.0%} lost in {len(failed)} of {len(parts)}: "
              f"{', '.join(p.name for p in failed[:SHOWN])}{' ...' if len(failed) > SHOWN else ''}")
    return 1 if failed else 0


def say(text: Any, file: Any = None) -> None:
    """Print without what could move a terminal's cursor: ids and sources are other people's text."""
    print("".join(c if c.isprintable() or c == "\n" else "?" for c in str(text)), file=file)


def _cut(text: str, most: int = 160) -> str:
    one = " ".join(text.split())
    return one if len(one) <= most else one[:most - 3] + "..."


def cmd_explain(args: argparse.Namespace) -> int:
    from lifecycle_lib.corpus.decisions import chain, explain
    from lifecycle_lib.corpus.manifest import read_manifest
    from lifecycle_lib.corpus.quarantine import exits

    found = explain(args.folder, args.row)
    config, left = read_manifest(args.folder, files=False)["config"], exits(args.folder)
    for decision in found:
        say(f"line {decision['line']}, id {decision['id']}, source {decision['source']}, licence "
              f"{decision['licence']}: {decision['verdict']} ({decision['reason']}), rules {decision['rules']}")
        for stage, told in chain(decision, config):
            say(f"  {stage:<8} {told}")
        if other := decision.get("other"):
            say(f"  that is line {other['line']}, id {other['id']}, source {other['source']}: {other['verdict']} "
                  f"({other['reason']})")
        for entry in decision.get("transformations", []):
            say(f"  log      {', '.join(f'{k} {v}' for k, v in entry.items() if k not in ('text_sha', 'chain'))}")
        if note := left.get(decision["id"]):
            say(f"  left by  {note['door']}, {note['reviewer']}, {note['on']}: {note['why']}")
    return 0


def cmd_replay(args: argparse.Namespace) -> int:
    from lifecycle_lib.core.records import read_json
    from lifecycle_lib.corpus.decisions import replay
    from lifecycle_lib.corpus.gate import GateConfig

    rules = GateConfig.from_dict({"ruleset": read_json(args.rules)}, args.rules).ruleset if args.rules else None
    found = replay(args.folder, args.file, rules)
    if found.identical:
        say(f"{found.lines:,} decisions, byte for byte the same")
        return 0
    say(f"{found.lines:,} decisions, {sum(found.changes.values()):,} with another verdict or reason"
          f"{f' under rules {rules.version}' if rules else ''}")
    for (old, new), n in found.changes.items():
        say(f"{n:>8,}  {old} -> {new}")
    for line, row_id, old, new in found.examples[:SHOWN]:
        say(f"line {line}, id {row_id}: {old} -> {new}")
    return 0 if rules else 1


def register(commands: "argparse._SubParsersAction") -> None:
    """Add these commands to the command line."""
    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(function=function)
        return sub

    gate = command("gate", cmd_gate, "admit, quarantine or reject every line of a JSONL file, with reasons")
    gate.add_argument("file", help='JSONL, a row a line: {"id", "text", "source", "licence", ...}')
    gate.add_argument("--out", required=True, help="folder for kept, quarantine, decisions (.jsonl) and manifest.json")
    gate.add_argument("--config", help="JSON file with fields of GateConfig, e.g. {\"ruleset\": {\"version\": "
                                       "\"1.1.0\", \"min_chars\": 20}, \"near_threshold\": 0.8}")
    gate.add_argument("--near", type=float, help="also reject near copies from this Jaccard of word shingles, e.g. 0.8")
    gate.add_argument("--pii", help="rows with personal data: quarantine (default), mask or off")
    gate.add_argument("--allow", action="append", metavar="SOURCE",
                      help="a source that was seen before (repeat); all others go to quarantine")
    gate.add_argument("--by", choices=BY, default="source", help="second table by this field (default source)")
    gate.add_argument("--board", action="store_true", help="write board.png: what went in")
    diff = command("diff", cmd_diff, "which rows are gone between two runs, smallest slices first, and why")
    diff.add_argument("before", help="a gate's folder, or a JSONL file")
    diff.add_argument("after", help="a gate's folder")
    diff.add_argument("--by", choices=BY, default="slice", help="group by this field (default slice)")
    diff.add_argument("--max-loss", type=float, default=0.2,
                      help="fail when a group loses more than this share of its rows (default 0.2)")
    diff.add_argument("--examples", type=int, default=2, help="lost rows shown a group (default 2)")
    explain = command("explain", cmd_explain, "the chain of decisions about one row")
    explain.add_argument("folder", help="a gate's folder")
    explain.add_argument("row", help="its id, or line:17")
    replay = command("replay", cmd_replay, "gate the same file again: the same decisions? or what other rules change")
    replay.add_argument("folder", help="a gate's folder")
    replay.add_argument("file", help="the file that was gated")
    replay.add_argument("--rules", help="JSON file with a Ruleset of another version")
