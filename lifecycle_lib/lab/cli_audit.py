"""Commands: the registry of evaluation sets, and the audit of a corpus against it.

Exit status of `data audit`: 0 when no item was found, 1 when one was (an exact, fuzzy or canary hit, or a run of the
largest n words), 2 when the corpus or the registry cannot be used. Shorter runs alone are printed and leave it 0.
"""

import argparse
import json
from pathlib import Path

from lifecycle_lib.lab.cli_data import say

REGISTRY = "data/evals/registry.json"
SHOWN = 10


def cmd_audit(args: argparse.Namespace) -> int:
    """One row in memory at a time; the registry is checked before the first."""
    from lifecycle_lib.core.progress import bar
    from lifecycle_lib.corpus.contamination import Registry, audit, stream

    registry, corpus = Registry.read(args.registry), Path(args.corpus)
    next(stream(corpus, args.field or ["text"]), None)  # a corpus that cannot be read is said before the registry
    registry.check(args.set, args.evals or registry.path.parent, ignore=corpus)

    def rows():
        before = 0
        with bar("audit (bytes)", corpus.stat().st_size) as progress:
            for row, done in stream(corpus, args.field or ["text"]):
                yield row
                progress.update(done - before)
                before = done
    report = audit(rows(), registry, args.set, ngrams=args.ngram or (8, 13), fuzzy=args.fuzzy)
    say(json.dumps(report, indent=2) if args.json else text_of(report, corpus))
    return 1 if report["contaminated"] else 0


def text_of(report: dict, corpus: Path) -> str:
    """The report as lines: each set and screen, the first hits, the verdict."""
    lines = []
    for name, s in report["sets"].items():
        lines.append(f"{name}: {s['n_items']} items; template n-grams (in more than {s['max_items']} items) dropped: "
                     f"{s['dropped']['template']}, background: {s['dropped']['background']}")
        for screen, r in s["screens"].items():
            low, high = r["interval"]
            lines.append(f"  {screen:<8} {r['items_hit']:>6} of {r['n']} items {r['rate']:7.2%} [{low:.2%}, {high:.2%}]"
                         + (f"  {r['unscreened']} cannot be screened" if r["unscreened"] else ""))
    strongest = f"{max(report['ngrams'])}-gram"
    hits = sorted(report["hits"], key=lambda h: h["screen"].endswith("gram") and h["screen"] != strongest)
    for h in hits[:SHOWN]:
        lines.append(f"  row {h['row']} (id {h['id']}): {h['screen']} of {h['set']} {h['item']} {h['part']}, "
                     f"score {h['score']:.2f}, {h['rows']} row(s)")
    if len(hits) > SHOWN:
        lines.append(f"  and {len(hits) - SHOWN} more; --json lists all")
    verdict = ("CONTAMINATED" if report["contaminated"] else
               "no leak found; shorter overlaps are above" if hits else "no overlap found")
    return "\n".join([*lines, f"{corpus}: {report['rows_hit']} of {report['n_rows']} rows hold an item: {verdict}"])


def cmd_register(args: argparse.Namespace) -> int:
    """Make or refresh one set's entry."""
    from lifecycle_lib.corpus.contamination import SUSPECTS, Registry, read_items, stream
    from lifecycle_lib.corpus.screens import make_set

    if args.name == SUSPECTS:
        raise ValueError(f"name {args.name!r}: is kept for texts noted with data suspect; give another name")
    registry = Registry.read(args.registry) if Path(args.registry).exists() else Registry(args.registry, {})
    items = read_items(args.file, args.part or ["prompt", "answer"])
    background = (row["text"] for row, _ in stream(args.background, args.field or ["text"])) if args.background else ()
    made = registry.add(make_set(args.name, items, ngrams=args.ngram or (8, 13), max_items=args.max_items,
                                 background=background, canaries=args.canary), args.file)
    registry.write()
    print(f"{args.name}: {made.n_items} items in {args.registry}; dropped {made.dropped}; cannot be screened "
          f"{made.unscreened()}")
    return 0


def cmd_suspect(args: argparse.Namespace) -> int:
    """Write a suspected leak to the registry; the next audit stops rows that hold it."""
    from lifecycle_lib.corpus.contamination import Registry

    registry = Registry.read(args.registry)
    registry.suspect(args.text, args.why)
    registry.write()
    print(f"{args.registry}: suspects now hold {registry.sets['suspects'].n_items} texts")
    return 0


def register(commands: "argparse._SubParsersAction") -> None:
    """Add these commands to the command line."""
    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--registry", default=REGISTRY, help=f"the registry file (default {REGISTRY})")
        sub.set_defaults(function=function)
        return sub

    sub = command("audit", cmd_audit, "does a corpus hold items of the registered evaluation sets")
    sub.add_argument("corpus", help="JSONL, one object with a text a line")
    sub.add_argument("--set", action="append", default=[], help="only this set (repeat for more; default: all)")
    sub.add_argument("--field", action="append", help="field with the text (repeat to join several; default text)")
    sub.add_argument("--ngram", action="append", type=int, help="run of so many words (repeat; default 8 and 13)")
    sub.add_argument("--fuzzy", type=float, default=0.8, help="share of an item's shingles that is a hit (default 0.8)")
    sub.add_argument("--evals", help="folder whose JSONL files must all be registered (default: the registry's)")
    sub.add_argument("--json", action="store_true", help="as JSON, with every hit")
    sub = command("register", cmd_register, "put an evaluation set into the registry, as hashes")
    sub.add_argument("name")
    sub.add_argument("file", help="JSONL, one item a line")
    sub.add_argument("--part", action="append", help="field of an item (repeat; default prompt and answer)")
    sub.add_argument("--background", help="JSONL of text known to be clean; n-grams it shares are no leak")
    sub.add_argument("--field", action="append", help="field with the background's text (default text)")
    sub.add_argument("--ngram", action="append", type=int, help="run of so many words (repeat; default 8 and 13)")
    sub.add_argument("--max-items", type=int, default=3, help="n-grams in more items are template (default 3)")
    sub.add_argument("--canary", action="append", default=[], help="marker string that must not occur (repeat)")
    sub = command("suspect", cmd_suspect, "note a text that seems to leak, so that the next audit stops it")
    sub.add_argument("text")
    sub.add_argument("--why", required=True, help="who saw it where; kept with the hashes")
