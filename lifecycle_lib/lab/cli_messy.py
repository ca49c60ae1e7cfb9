"""The command that counts how people type: `lifecycle data messy FOLDER`, rates out, no text.

Exit status 0, or 2 when a file is missing or is not what its name says.
"""

import argparse

from lifecycle_lib.lab.cli_data import say


def cmd_messy(args: argparse.Namespace) -> int:
    from lifecycle_lib.core.records import write_text
    from lifecycle_lib.desk.messy import calibrate
    from lifecycle_lib.desk.messy_measure import dumps

    rates = calibrate(args.folder)
    for name, of in rates["registers"].items():
        say(f"{name}: {of['texts']:,} texts of {of['file']}")
        for what in ("lower_start", "no_stop", "no_apostrophe", "several"):
            r = of[what]
            say(f"  {what:<14} {r['rate']:7.1%} [{r['low']:.1%}, {r['high']:.1%}]  {r['k']:,} of {r['n']:,}")
        n, k = (sum(r[key] for r in of["typo"].values()) for key in "nk")
        say(f"  {'typo':<14} {k / n:7.1%}  {k:,} of {n:,} words of five letters or more")
        u = rates["not_fitted"][name]
        say(f"  not fitted: trigrams {u['trigrams_generated_real']:.3f} bits from real ones, halves of the real file "
            f"{u['trigrams_real_real']:.3f}; words {u['words_mean'][0]:.1f} real, {u['words_mean'][1]:.1f} made")
    if args.out:
        write_text(args.out, dumps(rates))
        say(args.out)
    return 0


def register(commands: "argparse._SubParsersAction") -> None:
    """Add the command to the command line."""
    text = "count how people type, on public files: rates with intervals, none of their text"
    messy = commands.add_parser("messy", help=text, description=text, allow_abbrev=False)
    messy.set_defaults(function=cmd_messy)
    messy.add_argument("folder", help="folder with support/ and typos/ of the public data")
    messy.add_argument("--out", help="write the rates here, such as data/messy_rates.json (default: print a summary)")
