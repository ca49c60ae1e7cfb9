"""The paper a job leaves: a proof that every row was admissible, and the attribution notice.

A proof holds the job, the version of the rules, the state of the claims log, the root of a Merkle tree over the rows
in their order (leaf: id, SHA-256 of the text, source, licence, terms; hashed as in RFC 6962, so no inner node passes
for a leaf), counts for every source and licence, refusals by row, and conflicts of the mix. `check_proof` reads the
rows again and recomputes all of it.

What it proves: these rows, in this order, under these rules, comply (or not) with this job. Without a key it does not
say who made it or when: whoever can run this code can make another valid proof for other rows or a milder job, so a
checker who knows the job passes it as `spec`. With a key (HMAC-SHA256, RFC 2104) it was made by a holder of the key,
which includes the checker: it settles nothing between two holders. It never proves that the licences are true.

One pass, memory in the number of sources, not of rows; refused rows beyond the first 1,000 are counted, not listed.
Left out: ids that occur twice (the gate's work) and proofs that a single row is in the tree.
"""

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lifecycle_lib.core.fingerprints import plain
from lifecycle_lib.corpus.licences import Policy, base_tag, policy, text_of
from lifecycle_lib.corpus.rights import RULES, JobSpec, Part, compose, n_tokens, verdict
from lifecycle_lib.corpus.rights_log import ClaimsLog

FORMAT = "lifecycle-rights-proof-1"
MAX_LISTED = 1000
MIN_KEY_BYTES = 16
SEALS = ("seal", "signature")


class MerkleTree:
    """The root over leaves added one by one; memory grows with the logarithm of their number."""

    def __init__(self) -> None:
        self.full: list[tuple[int, bytes]] = []  # (height, hash) of the full subtrees, left to right

    def add(self, leaf: bytes) -> None:
        height, node = 0, hashlib.sha256(b"\0" + leaf).digest()
        while self.full and self.full[-1][0] == height:
            node = hashlib.sha256(b"\1" + self.full.pop()[1] + node).digest()
            height += 1
        self.full.append((height, node))

    def root(self) -> str:
        """64 hex digits. Raises ValueError for no leaf."""
        if not self.full:
            raise ValueError("no rows: nothing to prove; check the file")
        node = self.full[-1][1]
        for _, left in reversed(self.full[:-1]):
            node = hashlib.sha256(b"\1" + left + node).digest()
        return node.hex()


def leaf_of(row: Mapping[str, Any], terms: str) -> bytes:
    """What the tree says about a row."""
    text = hashlib.sha256(row["text"].encode("utf-8", "surrogatepass")).hexdigest()
    return _canonical([row["id"], text, row.get("source"), row.get("licence"), terms])


def prove(spec: JobSpec, rows: Iterable[Mapping[str, Any]], log: ClaimsLog | None = None, rules: Policy | None = None,
          key: bytes | None = None, where: str = "row") -> dict[str, Any]:
    """The proof, a JSON object; `complies` tells whether the job may use all rows, together.

    Raises ValueError, as "{where}:{number}: ...", for a row without an `id` or a `text`, for no rows, a short key.
    A row without source or licence is refused, not an error.
    """
    rules = rules or policy()
    tree, n_rows, refused_rows = MerkleTree(), 0, 0
    counts: dict[tuple[str, str], list[int]] = {}
    judged: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {}
    refused: list[dict[str, Any]] = []
    for n_rows, row in enumerate(rows, start=1):
        for field in ("id", "text"):
            if not isinstance(row.get(field), str) or (field == "id" and not row["id"]):
                raise ValueError(f"{where}:{n_rows}: {field}={row.get(field)!r}; give every row an {field} (text)")
        pair = _text(row.get("source")), _text(row.get("licence"))
        if pair not in judged:
            judged[pair] = text_of(rules.parse(pair[1]).terms), verdict(spec, *pair, log, rules).problems
        terms, problems = judged[pair]
        tree.add(leaf_of(row, terms))
        own = counts.setdefault(pair, [0, 0])
        own[0] += 1
        own[1] += n_tokens(row)
        if problems:
            refused_rows += 1
            if len(refused) < MAX_LISTED:
                refused.append({"row": n_rows, "id": row["id"], "source": pair[0], "licence": pair[1],
                                "problems": list(problems)})
    root = tree.root()
    parts = [Part(*pair, *own) for pair, own in sorted(counts.items())]
    mix = compose(spec, parts, log, rules)
    return seal({
        "format": FORMAT, "rules": {"code": RULES, "table": rules.version, "table_fingerprint": rules.fingerprint},
        "job": plain(asdict(spec)), "claims_fingerprint": log.fingerprint if log else None,
        "complies": mix.ok, "rows": n_rows, "root": root,
        "sources": [{**asdict(part), "terms": judged[part.source, part.licence][0],
                     "problems": list(judged[part.source, part.licence][1])} for part in parts],
        "refused_rows": refused_rows, "refused": refused,
        "conflicts": [{"parts": [[p.source, p.licence] for p in found], "why": why} for found, why in mix.conflicts],
    }, key)


def seal(proof: Mapping[str, Any], key: bytes | None = None) -> dict[str, Any]:
    """The proof with the hash of its content, and with an HMAC of it if there is a key (16 bytes or more)."""
    if key is not None and len(key) < MIN_KEY_BYTES:
        raise ValueError(f"a key of {len(key)} bytes; give at least {MIN_KEY_BYTES}, from a random source")
    body = {name: value for name, value in proof.items() if name not in SEALS}
    signed = {"signature": hmac.new(key, _canonical(body), hashlib.sha256).hexdigest()} if key else {}
    return {**body, "seal": hashlib.sha256(_canonical(body)).hexdigest(), **signed}


def check_proof(proof: Any, rows: Iterable[Mapping[str, Any]], log: ClaimsLog | None = None,
                rules: Policy | None = None, key: bytes | None = None, spec: JobSpec | None = None,
                where: str = "row") -> list[str]:
    """Why the proof is not to be trusted for these rows; [] if recomputing gives the same. That it `complies` is
    another question. Raises ValueError for what is no proof at all, and as `prove` does."""
    if not isinstance(proof, Mapping) or proof.get("format") != FORMAT:
        raise ValueError(f"not a rights proof: format is not {FORMAT!r}; make one with prove")
    job, problems = JobSpec.of(proof.get("job"), "the proof's job"), []
    sealed = seal(proof, key)
    if proof.get("seal") != sealed["seal"]:
        problems.append("the proof was edited after it was sealed")
    if key and not hmac.compare_digest(str(proof.get("signature", "")).encode(), sealed["signature"].encode()):
        problems.append("it is not signed with this key" if proof.get("signature") else "it is not signed")
    if spec and (other := [f for f, value in plain(asdict(spec)).items() if plain(asdict(job))[f] != value]):
        problems.append(f"it is the proof of another job: {', '.join(other)} differ")
    fresh = prove(job, rows, log, rules, key, where)
    words = {"rules": "the rules changed", "claims_fingerprint": "the claims log is another", "rows": "the row count",
             "sources": "the counts or terms of the sources", "root": "a row: its id, text, source, licence or place",
             "refused_rows": "the number of refusals", "refused": "the refusals", "conflicts": "the conflicts",
             "complies": "the verdict"}
    for field, text in words.items():
        if _canonical(proof.get(field)) != _canonical(fresh[field]):
            shown = f" ({proof.get(field)!r}, recomputed {fresh[field]!r})" if field in ("rows", "complies") else ""
            problems.append(f"not as recomputed: {text}{shown}")
    if extra := sorted(set(proof) - set(fresh) - set(SEALS)):
        problems.append(f"it has fields no proof has: {', '.join(extra)}")
    return problems


def read_key(path: str | Path) -> bytes:
    """The key in a file, all its bytes but a last newline. Raises ValueError if it cannot be read or is too short."""
    try:
        key = Path(path).read_bytes().removesuffix(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a file with the key") from error
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(f"{path}: a key of {len(key)} bytes; give at least {MIN_KEY_BYTES}, from a random source")
    return key


def notice(name: str, entries: Iterable[Mapping[str, Any]], log: ClaimsLog | None = None, date: str | None = None,
           rules: Policy | None = None) -> tuple[str, list[str]]:
    """The attribution notice of a text or a checkpoint called `name`, and what is missing from it.

    `entries` are {source, licence, rows}, of parts or of lineage. Every source is listed with its licences; where a
    licence asks for attribution, with who holds it, from the claims log on `date`. Missing: a holder that is not on
    file, and a source of unknown rights, for which no notice can be given. Raises ValueError for no entries.
    """
    rules = rules or policy()
    rows: dict[tuple[str, str], int] = {}
    for entry in entries:
        pair = _text(entry.get("source")), _text(entry.get("licence"))
        rows[pair] = rows.get(pair, 0) + int(entry.get("rows", 0))
    if not rows:
        raise ValueError(f"{name}: no sources, so no notice; give parts of a file, or a checkpoint that records them")
    lines, gaps = [f"# Attribution notice for {name}", ""], []
    for (source, licence), n in sorted(rows.items()):
        parsed = rules.parse(licence)
        tags = {base_tag(tag) for option in parsed.terms for tag in option}
        holder = log.rights_on(source, date).holder if log and date and source else ""
        lines += [f"## {source or '(no source named)'}", f"- licence: {parsed.expression}", f"- rows: {n}"]
        lines += [f"- text: https://spdx.org/licenses/{key}.html" for key in rules.spdx_ids(licence)]
        if "attribution" in tags:
            lines.append(f"- by: {holder or 'NOT ON FILE'}")
            gaps += [] if holder else [f"{source}: who to name is not on file"]
        if "unknown" in tags:
            lines.append("- rights: UNKNOWN, no notice can be given")
            gaps.append(f"{source or '(no source named)'}: {parsed.problem or 'unknown rights'}")
        lines.append("")
    return "\n".join(lines), gaps


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
