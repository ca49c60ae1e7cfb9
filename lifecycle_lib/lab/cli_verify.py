"""Commands: rebuild from a card, freeze a recipe and check it, the run diary, the closure gate.

Exit status: 0 when what was asked for holds, 1 when it does not (a level not reached, a missing field, a part that
moved), 2 for input that cannot be used.
"""

import argparse
import json
from pathlib import Path

from lifecycle_lib.lab.cli_store import existing_store


def _store(given: str | None) -> "Store":  # noqa: F821
    """The store, which must be there, and one thread: their number is part of what is compared."""
    from lifecycle_lib.core.seeds import one_thread
    one_thread()
    return existing_store(given)


def _budget(args: argparse.Namespace) -> float:
    if not args.budget_s > 0:
        raise ValueError(f"--budget-s {args.budget_s}: give seconds above 0")
    return args.budget_s


def cmd_verify(args: argparse.Namespace) -> int:
    from lifecycle_lib.lab import rebuild
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed {args.seed}: give 0 or more")
    cfg = rebuild.VerifyConfig(margin=args.margin, n_cases=args.cases)
    store = _store(args.store)
    artifact = rebuild.pick(store, args.checkpoint)
    before = rebuild.preflight(store, artifact, args.corpus)
    if not args.json:
        expected = "statistical (another seed)" if args.seed is not None else before["expected"]
        print(rebuild.before_text(artifact, before, expected), flush=True)
    result = rebuild.verify(store, artifact, deep=args.deep, seed=args.seed, corpus=args.corpus, cfg=cfg)
    print(json.dumps(result, indent=2) if args.json else rebuild.after_text(result))
    if not args.json:
        print("PASS" if result["ok"] else f"FAILED: {'; '.join(rebuild.why_not(result))}")
    return 0 if result["ok"] else 1


def cmd_freeze(args: argparse.Namespace) -> int:
    from lifecycle_lib.lab import rebuild, recipe
    store = _store(args.store)
    artifact = rebuild.pick(store, args.checkpoint)
    manifest = recipe.freeze(store, artifact, args.out, corpus=args.corpus, n_cases=args.cases)
    print(f"{args.out}: {artifact.name}-{artifact.fingerprint}, {len(manifest['files'])} files, "
          f"{len(manifest['code'])} modules, {len(manifest['data'])} data files, seal {manifest['seal']}")
    return 0


def cmd_check(args: argparse.Namespace) -> int:
    from lifecycle_lib.lab import recipe
    moved = recipe.check(args.folder, _store(args.store) if args.store else None)
    if args.json:
        print(json.dumps(moved, indent=2))
    else:
        for part, lines in moved.items():
            more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
            print(f"{part:<9} {'MOVED: ' + '; '.join(lines[:3]) + more if lines else 'as frozen'}")
    return 1 if any(moved.values()) else 0


def cmd_diary(args: argparse.Namespace) -> int:
    from lifecycle_lib.lab import recipe
    for entry in recipe.diary(_store(args.store), args.name):
        changed = "first of its name" if entry["changed"] is None else "; ".join(entry["changed"]) or "nothing changed"
        outcome = ", ".join(f"{k} {v:.4g}" for k, v in entry["outcome"].items())
        print(f"{entry['created']}  {entry['name']}-{entry['fingerprint'][:8]}  {entry['cpu_s']:.1f} CPU s  {outcome}\n"
              f"    {changed}")
    return 0


def cmd_closure(args: argparse.Namespace) -> int:
    from lifecycle_lib.lab import closure, rebuild
    budget_s = _budget(args)
    folder = Path(args.checkpoint)
    if (folder / "manifest.json").is_file():
        result = closure.clean_room(folder, budget_s=budget_s, deep=args.deep, n_cases=args.cases)
    else:
        store = _store(args.store)
        artifact = rebuild.pick(store, args.checkpoint)
        result = closure.gate(store, artifact, budget_s=budget_s, deep=args.deep, n_cases=args.cases,
                              corpus=args.corpus)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        if "agreement" in result:
            print(rebuild.after_text(result))
        print(f"{'PASS' if result['ok'] else 'REFUSED'}: {result['why']}")
    return 0 if result["ok"] else 1


def register(commands: "argparse._SubParsersAction") -> None:
    """Add these commands to the command line."""
    def command(group, name: str, function, text: str, *options: str) -> argparse.ArgumentParser:
        sub = group.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(function=function)
        if "checkpoint" in options:
            sub.add_argument("checkpoint", help="fingerprint (or its first digits), or a stage's name")
        if "store" in options:
            sub.add_argument("--store", help="the artifacts' folder (default: LIFECYCLE_STORE, else ./store)")
        if "corpus" in options:
            sub.add_argument("--corpus", help="the data file it was made from, if the card names one")
        if "cases" in options:
            sub.add_argument("--cases", type=int, default=512, help="cases of the frozen evaluation (default 512)")
        if "json" in options:
            sub.add_argument("--json", action="store_true", help="as JSON")
        return sub

    def group(name: str, text: str) -> "argparse._SubParsersAction":
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        return sub.add_subparsers(metavar="COMMAND", required=True)

    verify = command(commands, "verify", cmd_verify, "rebuild a checkpoint from its card and say how far the two agree",
                     "checkpoint", "store", "corpus", "cases", "json")
    verify.add_argument("--deep", action="store_true", help="rebuild its parents too")
    verify.add_argument("--seed", type=int, help="rebuild with this seed instead: the statistical level is expected")
    verify.add_argument("--margin", type=float, default=0.03, help="rates this close count as equivalent (default .03)")
    recipes = group("recipe", "freeze a recipe into a folder, check what moved since, read the run diary")
    freeze = command(recipes, "freeze", cmd_freeze, "write config, manifest, evaluation and baseline into one folder",
                     "checkpoint", "store", "corpus", "cases")
    freeze.add_argument("--out", required=True, help="an empty or new folder")
    check = command(recipes, "check", cmd_check, "which of the four moved since the freeze", "json")
    check.add_argument("folder", help="the bundle")
    check.add_argument("--store", help="also compare the checkpoint in this store")
    diary = command(recipes, "diary", cmd_diary, "what each run changed against the one before it", "store")
    diary.add_argument("--name", help="only artifacts of this name")
    closures = group("closure", "could anybody make this checkpoint again?")
    gate = command(closures, "check", cmd_closure,
                   "rebuild from the bundle alone, in a clean room: the gate before a push", "checkpoint", "store",
                   "corpus", "cases", "json")
    gate.add_argument("--deep", action="store_true", help="rebuild its parents too")
    gate.add_argument("--budget-s", type=float, default=600, help="seconds the rebuild may take (default 600)")
