"""Commands: rights of a corpus and of what was trained on it: data rights prove, check, compose, who, notice.

Exit status: 0 fine; 1 refused: the job may not use the file, the proof does not hold, the notice has gaps, or the store
has checkpoints that do not say what they hold; 2 for
input that cannot be used: a missing file, a line that is no row, a bad job, a store that records no sources. Files are
read once, line by line.
"""

import argparse
import datetime
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lifecycle_lib.lab.cli_data import say
from lifecycle_lib.lab.cli_store import existing_store

SHOWN = 5  # refusals printed; the proof lists more


def rows_of_file(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, with a progress bar; blank lines are passed over. Raises ValueError as FILE:LINE for
    the first line that is no row: a proof about part of a file would be none."""
    from lifecycle_lib.core.progress import bar
    from lifecycle_lib.corpus.rows import Problem, read_rows

    size, empty = Path(path).stat().st_size if Path(path).is_file() else 0, True
    with bar("rights", size) as progress:
        for line, row in read_rows(path, on_bytes=lambda data: progress.update(len(data))):
            if isinstance(row, Problem):
                if row.code == "blank_line":
                    continue
                raise ValueError(f"{path}:{line}: {row.message}; or run data gate first and give its kept.jsonl")
            empty = False
            yield row
    if empty:
        raise ValueError(f"{path}: no rows, only blank lines; give a JSONL file with rows")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """`log` and `rules` from the options."""
    from lifecycle_lib.corpus.licences import TABLE, policy
    from lifecycle_lib.corpus.rights_log import ClaimsLog

    return {"log": ClaimsLog.read(args.claims) if args.claims else None, "rules": policy(args.table or TABLE)}


def _job(path: str) -> Any:
    from lifecycle_lib.core.records import read_json
    from lifecycle_lib.corpus.rights import JobSpec

    return JobSpec.of(read_json(path), path)


def _proof(path: str) -> dict[str, Any]:
    from lifecycle_lib.core.records import read_json
    from lifecycle_lib.corpus.rights import JobSpec
    from lifecycle_lib.corpus.rights_proof import FORMAT

    proof = read_json(path)
    if not isinstance(proof, dict) or proof.get("format") != FORMAT:
        raise ValueError(f"{path}: not a rights proof (format {FORMAT}); make one with data rights prove")
    JobSpec.of(proof.get("job"), f"{path}: job")
    return proof


def _check_out(out: str | None, *inputs: str | None) -> None:
    """Raise ValueError, before the work, when the result would take the place of a folder or of something it is made
    from."""
    if not out:
        return
    if Path(out).is_dir():
        raise ValueError(f"--out {out}: is a folder; give a file in it")
    for given in inputs:
        if given and Path(out).exists() and Path(given).exists() and Path(out).samefile(given):
            raise ValueError(f"--out {out}: would overwrite {given}, which is read; give another file")


def _key(args: argparse.Namespace) -> bytes | None:
    from lifecycle_lib.corpus.rights_proof import read_key

    return read_key(args.key) if args.key else None


def cmd_prove(args: argparse.Namespace) -> int:
    from lifecycle_lib.core.records import write_json
    from lifecycle_lib.corpus.rights_proof import prove

    _check_out(args.out, args.file, args.job, args.claims, args.table, args.key)
    job, given, key = _job(args.job), _given(args), _key(args)
    proof = prove(job, rows_of_file(args.file), key=key, where=args.file, **given)
    write_json(args.out, proof)
    say(f"{args.out}: {proof['rows']:,} rows, {len(proof['sources'])} sources and licences, "
          f"root {proof['root'][:16]}, {'signed' if key else 'not signed'}")
    for row in proof["refused"][:SHOWN]:
        say(f"refused {row['id']} ({row['source'] or 'no source'}, {row['licence'] or 'no licence'}): "
              f"{'; '.join(row['problems'])}")
    if proof["refused_rows"] > SHOWN:
        say(f"and {proof['refused_rows'] - SHOWN:,} rows more")
    for found in proof["conflicts"]:
        say(f"conflict {' + '.join(f'{source} [{licence}]' for source, licence in found['parts'])}: {found['why']}")
    say(f"{job.name}: {'complies' if proof['complies'] else 'REFUSED'}")
    return 0 if proof["complies"] else 1


def cmd_check(args: argparse.Namespace) -> int:
    from lifecycle_lib.corpus.rights_proof import check_proof

    proof, given, key = _proof(args.proof), _given(args), _key(args)
    problems = check_proof(proof, rows_of_file(args.file), key=key, spec=_job(args.job) if args.job else None,
                           where=args.file, **given)
    for problem in problems:
        say(f"{args.proof}: {problem}")
    if not problems:
        signed = "signed with this key" if key else "signature not checked" if "signature" in proof else "not signed"
        say(f"{args.proof}: holds for {args.file} ({proof['rows']:,} rows; {signed}); the job "
              f"{'complies' if proof['complies'] else 'is REFUSED'}")
    return 1 if problems or not proof["complies"] else 0


def cmd_compose(args: argparse.Namespace) -> int:
    from lifecycle_lib.corpus.licences import text_of
    from lifecycle_lib.corpus.rights import certainty, compose, parts_of

    job, given = _job(args.job), _given(args)
    parts = parts_of(rows_of_file(args.file))
    mix, total = compose(job, parts, **given), max(1, sum(p.tokens for p in parts))
    for part, why in mix.refused:
        say(f"refused  {part}: {'; '.join(why)}")
    for found, why in mix.conflicts:
        say(f"conflict {' + '.join(map(str, found))}: {why}")
    for part in mix.remove:
        say(f"remove   {part}: {part.rows:,} rows, {part.tokens:,} tokens")
    left = sum(p.tokens for p in mix.kept)
    say(f"keep     {left:,} of {total:,} tokens ({left / total:.1%}) from {len(mix.kept)} of {len(parts)} parts"
          + (f"; terms: {text_of(mix.terms)}" if mix.terms else ""))
    sure = certainty(parts, job.date, **given) if any(p.tokens for p in parts) else {}
    say("rights   " + ", ".join(f"{name} {n / total:.1%}" for name, n in sure.items()) + " of all tokens")
    say(f"{job.name}: {'may be mixed' if mix.ok else 'REFUSED as it is'}")
    return 0 if mix.ok else 1


def cmd_who(args: argparse.Namespace) -> int:
    from lifecycle_lib.lab.lineage import CLEAN, HOLDS, NOT_RECORDED, delete_plan, has_weights, models_hit, recorded

    store = existing_store(args.store)
    hit, plan = models_hit(store, args.source), delete_plan(store, args.source)
    for step in plan["steps"]:
        floor = "at least " if step["cost_is_a_floor"] else ""
        say(f"{step['name']:<24} {step['fingerprint']}  {'weights' if step['weights'] else 'no weights':<10}  "
            f"{step['action']:<18}  {floor}{step['cpu_s']:.1f} CPU s")
    silent = [artifact for artifact in hit[NOT_RECORDED] if has_weights(artifact)]
    for artifact in silent[:SHOWN]:
        say(f"{artifact.name:<24} {artifact.fingerprint}  weights     does not say what it holds")
    if len(silent) > SHOWN:
        say(f"and {len(silent) - SHOWN:,} more with weights that do not say")
    say(f"{args.source}: held by {len(hit[HOLDS])}, not by {len(hit[CLEAN])}, not recorded for "
        f"{len(hit[NOT_RECORDED])} ({len(silent)} with weights); rebuilding what holds it took {plan['cpu_s']:.1f} CPU "
        "s the last time")
    if not hit[HOLDS]:
        known = sorted({source for own in hit.values() for a in own for source in recorded(a.card) or {}})
        say(f"no card names {args.source!r}; the cards name {', '.join(known[:20])}{' ...' if known[20:] else ''}")
    return 1 if silent else 0


def cmd_notice(args: argparse.Namespace) -> int:
    from lifecycle_lib.core.records import write_text
    from lifecycle_lib.corpus.rights_log import check_date
    from lifecycle_lib.corpus.rights_proof import notice

    _check_out(args.out, args.what, args.claims, args.table)
    given, gaps = _given(args), []
    day = check_date(args.date or datetime.date.today().isoformat(), "--date")
    if Path(args.what).is_file():
        from lifecycle_lib.corpus.rights import parts_of
        name = Path(args.what).name
        entries = [{"source": p.source, "licence": p.licence, "rows": p.rows}
                   for p in parts_of(rows_of_file(args.what))]
    else:
        from lifecycle_lib.lab.lineage import sources_of_model
        store = existing_store(args.store)
        artifact = store.find(args.what)
        found, name = sources_of_model(store, artifact), f"{artifact.name}-{artifact.fingerprint}"
        entries = [{"source": source, **use} for source, uses in found["sources"].items() for use in uses]
        gaps = [f"{stage} does not record its sources" for stage in found["not_recorded"]]
    text, more = notice(name, entries, date=day, **given)
    if args.out:
        write_text(args.out, text)
    else:
        say(text)
    for gap in gaps + more:
        say(f"not complete: {gap}", file=sys.stderr)
    return 1 if gaps + more else 0


def register(commands: "argparse._SubParsersAction") -> None:
    """Add these commands to the command line."""
    text = "what a corpus may be used for, and who holds it"
    rights = commands.add_parser("rights", help=text, description=text, allow_abbrev=False)
    own = rights.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Any, text: str, *places: tuple[str, str]) -> argparse.ArgumentParser:
        sub = own.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(function=function)
        for place, what in places:
            sub.add_argument(place, help=what)
        return sub

    file = ("file", "JSONL, one row a line: id, text, source, licence (SPDX)")
    prove = command("prove", cmd_prove, "prove that a job may use every row of a file, or list what it may not", file)
    check = command("check", cmd_check, "recompute a proof from the file", ("proof", "what prove wrote"), file)
    compose = command("compose", cmd_compose, "may these sources be one mix, and what is least to leave out", file)
    who = command("who", cmd_who, "which artifacts of the store hold a source, and what deleting it costs",
                  ("source", "source id, as the run cards name it"))
    notice = command("notice", cmd_notice, "the attribution notice of a file or a checkpoint",
                     ("what", "a JSONL file, or a fingerprint in the store"))
    for sub in (prove, compose, check):
        sub.add_argument("--job", required=sub is not check, help="the job, JSON (see data/rights/job_open.json)"
                         + ("; the proof must be of this job" if sub is check else ""))
    for sub in (prove, check):
        sub.add_argument("--key", help="file with a secret of 16 bytes or more, to sign or check the signature")
    for sub in (prove, check, compose, notice):
        sub.add_argument("--claims", help="claims log, JSONL (see data/rights/claims_example.jsonl)")
        sub.add_argument("--table", help="policy table (default: data/rights/policy_tags.json)")
    for sub in (who, notice):
        sub.add_argument("--store", help="the artifacts' folder (default: LIFECYCLE_STORE, else ./store)")
    prove.add_argument("--out", required=True, help="where the proof goes, JSON")
    notice.add_argument("--out", help="where the notice goes (default: printed)")
    notice.add_argument("--date", help="the day on which the claims are read, YYYY-MM-DD (default: today)")
