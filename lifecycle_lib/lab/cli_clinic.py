"""`lifecycle clinic`: the debugging clinic on the command line. Exit status 1 for a wrong diagnosis."""

import argparse
import os
from pathlib import Path

from lifecycle_lib.lab.cli_store import store_root


def register(commands: "argparse._SubParsersAction") -> None:
    text = "seventeen broken runs: read the chart, order tests, name the cause"
    sub = commands.add_parser(
        "clinic", help=text, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{text}.\nA right name is worth 5 points, less 1 for each test ordered and 2 for each wrong name.",
        epilog="""first   lifecycle clinic                              who is waiting
then    lifecycle clinic 3                            a chart, its tests, and the causes to choose from
        lifecycle clinic 3 --test "healthy twin"      the same run without the bug
        lifecycle clinic 3 --test "reward of"         any test, by the start of its name
        lifecycle clinic 3 --cause leaked_split       your diagnosis; a wrong one is told why""")
    sub.add_argument("patient", nargs="?", help="1 to 17; without it, the waiting room and your points")
    sub.add_argument("--test", metavar="NAME", help="order a test (costs a point); its name, or the start of it")
    sub.add_argument("--cause", metavar="NAME", help="your diagnosis")
    sub.add_argument("--book", default=None, help="the case book (default: clinic.json in the store)")
    sub.set_defaults(function=cmd_clinic)


def cmd_clinic(args: argparse.Namespace) -> int:
    os.environ.setdefault("LIFECYCLE_QUIET", "1")
    from lifecycle_lib.lab import clinic

    path = Path(args.book) if args.book else store_root(None) / "clinic.json"
    book = clinic.read_book(path)
    if args.patient is None:
        if args.test or args.cause:
            raise ValueError("--test and --cause need a patient: lifecycle clinic 3 --cause NAME")
        for number, one in enumerate(clinic.PATIENTS, 1):
            print(f"{number:3}  {_standing(book.get(str(number)))}  {one.complaint}")
        print(f"{sum(e.get('points', 0) for e in book.values())} of {clinic.FULL_POINTS * len(clinic.PATIENTS)} points")
        return 0
    clinic.patient(args.patient)
    number = int(args.patient)
    if args.test:
        every = (*clinic.chart(number).tests, clinic.TWIN)
        names = [t for t in every if t == args.test] or [t for t in every if t.startswith(args.test)]
        if len(names) > 1:
            raise ValueError(f"test {args.test!r} could be {' or '.join(map(repr, names))}; give more of its name")
        name = names[0] if names else args.test
        print(f"{name}: {clinic.order_test(number, name, book)}")
    if args.cause:
        right = clinic.show_verdict(number, args.cause, book)
    if args.test or args.cause:
        path.parent.mkdir(parents=True, exist_ok=True)
        clinic.write_book(path, book)
        return 0 if not args.cause or right else 1
    clinic.show(number)
    print("causes:", *(f"  {name:20} {text}" for name, text in sorted(clinic.CAUSES.items())), sep="\n")
    return 0


def _standing(entry: dict | None) -> str:
    if not entry:
        return "waiting     "
    return f"solved, {entry['points']} pts" if "points" in entry else "under way   "
