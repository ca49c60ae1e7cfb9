"""The command line: run the whole life, read its report, look into the store, route failures, check the evaluation.

Exit status: 0 when it ran through (whatever the gate decided), 2 for input that cannot be used (one line on stderr),
130 when it was stopped. LIFECYCLE_DEBUG=1 shows tracebacks. Imports are inside the commands, so that help and
`report` do not wait for torch.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lifecycle_lib.lab import cli_audit, cli_clinic, cli_data, cli_messy, cli_rights, cli_verify
from lifecycle_lib.lab.cli_store import existing_store, store_root

RESUME = "lifecycle: stopped; the same command goes on from where it was"
STOPPED = "lifecycle: stopped; no result was written, the same command starts over"


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are a ValueError, handled like any other bad input."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(f"{message}; see {self.prog} --help")


def cmd_run(args: argparse.Namespace) -> int:
    """Every input is checked before the store is touched."""
    import time

    from lifecycle_lib.core.seeds import pick_device
    from lifecycle_lib.core.store import Store
    from lifecycle_lib.corpus.text import read_corpus
    from lifecycle_lib.lab import release_run
    from lifecycle_lib.lab.profiles import pick_profile
    from lifecycle_lib.lab.report import render_text, time_text
    from lifecycle_lib.lab.stages import Lab

    start = time.perf_counter()
    device = pick_device(args.device)
    profile = pick_profile(args.profile, device)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: give 0 or more")
    if args.corpus:
        read_corpus(args.corpus)
    if args.base and not (Path(args.base) / "config.json").is_file():
        raise ValueError(f"--base {args.base}: no config.json; give the folder of a transformers checkpoint on disk")
    lab = Lab(profile=profile, seed=args.seed, device=device, store=Store(store_root(args.store)), corpus=args.corpus,
              base_folder=args.base)
    report = release_run.run(lab)
    folder = lab.store.root / "reports" / report["run"]
    print(f"\n{render_text(report)}\n{folder / 'report.html'}\nthis run took {time_text(time.perf_counter() - start)}")
    return 0


def cmd_report(args: argparse.Namespace) -> int:
    from lifecycle_lib.core.records import read_json
    from lifecycle_lib.lab.report import find_report, render_text

    path = find_report(store_root(args.store), args.profile, args.seed)
    report = read_json(path)
    print(json.dumps(report, ensure_ascii=False, indent=2) if args.json else
          f"{render_text(report)}\n{path.with_name('report.html')}")
    return 0


def cmd_list(args: argparse.Namespace) -> int:
    store = existing_store(args.store)
    for a in store.list():
        print(f"{a.name:<10} {a.fingerprint}  {a.card['created'][:19]}  {a.card['wall_s']:9.1f} s")
    return 0


def cmd_lineage(args: argparse.Namespace) -> int:
    store = existing_store(args.store)
    artifact = store.find(args.fingerprint)
    for a in (*store.lineage(artifact), artifact):
        parents = ", ".join(f"{role} {fp}" for role, fp in a.card["parents"].items()) or "no parents"
        print(f"{a.name:<10} {a.fingerprint}  {a.card['wall_s']:9.1f} s  from {parents}")
    return 0


def cmd_route(args: argparse.Namespace) -> int:
    from lifecycle_lib.judge.trace_router import route_file

    for line, r in enumerate(route_file(args.file), start=1):
        weights = "weights may change" if r.changes_weights else "weights stay"
        print(f"{line}: {r.owner} -> {r.action} ({r.confidence}; {weights}; {'; '.join(r.evidence)})")
    return 0


def cmd_verify_eval(args: argparse.Namespace) -> int:
    from lifecycle_lib.judge.evals import check_frozen_file

    print(f"{args.file}: {check_frozen_file(Path(args.file))} rows, all as frozen")
    return 0


def cmd_evidence(args: argparse.Namespace) -> int:
    from lifecycle_lib.lab import evidence

    args.store = str(store_root(args.store))
    return evidence.main(args)


def make_parser() -> Parser:
    parser = Parser(prog="lifecycle", description="One tiny GPT from random weights to a released returns assistant.",
                    allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(function=function)
        return sub

    def option(sub: argparse.ArgumentParser, *names: str) -> None:
        texts = {"profile": ("smoke, laptop or gpu (default: gpu on CUDA, else laptop)", str),
                 "seed": ("one whole number makes everything (default 0)", int),
                 "device": ("cpu, cuda or mps (default: the best there is)", str),
                 "store": ("the artifacts' folder (default: LIFECYCLE_STORE, else ./store)", str)}
        for name in names:
            text, kind = texts[name]
            sub.add_argument(f"--{name}", type=kind, help=text)

    run = command("run", cmd_run, "build, evaluate, gate and release; what is in the store already is not made again")
    option(run, "profile", "device", "seed", "store")
    run.set_defaults(seed=0)
    start = run.add_mutually_exclusive_group()
    start.add_argument("--corpus", help="a text file of yours (.txt, .csv, .jsonl with a text field) for pretraining")
    start.add_argument("--base", help="folder of a public checkpoint on disk, in place of our own pretraining")
    report = command("report", cmd_report, "print the last run's report")
    report.add_argument("--json", action="store_true", help="as JSON")
    option(report, "profile", "seed", "store")
    option(command("list", cmd_list, "what the store holds"), "store")
    lineage = command("lineage", cmd_lineage, "an artifact's ancestry, oldest first")
    lineage.add_argument("fingerprint", help="its fingerprint, or the first digits")
    option(lineage, "store")
    command("route", cmd_route, "who owns each failure of a JSONL file, and what to do next").add_argument("file")
    command("verify-eval", cmd_verify_eval, "is this JSONL file the frozen evaluation, row by row").add_argument("file")
    evidence = command("evidence", cmd_evidence, "measure recorded evidence over seeds (up to an hour a name; resumes)")
    evidence.add_argument("names", nargs="*", help="names in data/results, such as D9 (default: all, many hours)")
    option(evidence, "device", "store")
    evidence.add_argument("--profile", default="laptop", help="smoke, laptop or gpu (default laptop)")
    evidence.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    evidence.add_argument("--workers", type=int, default=2, help="processes side by side (default 2)")
    evidence.add_argument("--from-rows", action="store_true", help="train nothing: conclude again from the kept rows")
    evidence.add_argument("--out", default="data/results", help="folder of the result files (default data/results)")
    text = "gates, rights and audits of a corpus of your own (JSONL)"
    data = commands.add_parser("data", help=text, description=text, allow_abbrev=False)
    data_commands = data.add_subparsers(metavar="COMMAND", required=True)
    for module in (cli_data, cli_rights, cli_audit, cli_messy):
        module.register(data_commands)
    cli_verify.register(commands)
    cli_clinic.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; see the top of this file."""
    debug = os.environ.get("LIFECYCLE_DEBUG") == "1"
    os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files
    function = None
    try:
        args = make_parser().parse_args(argv)
        function = args.function
        return function(args)
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"\n{RESUME if function in (cmd_run, cmd_evidence) else STOPPED}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"lifecycle: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
