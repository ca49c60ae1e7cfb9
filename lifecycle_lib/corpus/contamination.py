"""Does training text contain evaluation items? The registry of evaluation sets, the audit, what each screen catches.

The registry (data/evals/registry.json) holds the hashes of `screens.py` and each set's sha256: others audit without
reading the items. It is no vault: who can guess an item can check the guess. An evaluation set that is not registered,
or whose file has changed, stops the audit: a clean answer about the wrong set is worse than none. A text suspected to
leak goes into the same file (`Registry.suspect`), so that the next ingestion stops it.

`ngram_table` counts shared n-grams between two files at any n, without a registry; `detection` plants leaks of several
kinds and says which screen finds which. Left out: reading compressed corpora, audits spread over machines (screens are
read-only: run one a shard and add the counts).
"""

import hashlib
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lifecycle_lib.core.fingerprints import fingerprint
from lifecycle_lib.core.records import read_json, read_jsonl, write_json
from lifecycle_lib.core.seeds import rng
from lifecycle_lib.core.stats import wilson
from lifecycle_lib.corpus.dedupe import bare_words
from lifecycle_lib.corpus.rows import Problem, lines_of, parse_object
from lifecycle_lib.corpus.screens import MIN_WORDS, NGRAMS, EvalSet, Part, Screen, Words, among, as_hex, make_set

FORMAT = "lifecycle-registry-1"
SUSPECTS = "suspects"
MAX_LINE_BYTES = 1 << 26
HASHED = ("n_items", "ngrams", "max_items", "canaries", "parts")


class Registry:
    """The evaluation sets in one JSON file, which names each set's file relative to its own folder."""

    def __init__(self, path: str | Path, sets: Mapping[str, EvalSet]) -> None:
        self.path, self.sets = Path(path), dict(sets)

    @classmethod
    def read(cls, path: str | Path) -> "Registry":
        """Raises ValueError where the file is missing, of another format, or its hashes are not those written."""
        raw = read_json(path)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f"{path}: not a registry of evaluation sets ({FORMAT}); make one with data register")
        sets = {}
        try:
            for name, one in raw["sets"].items():
                if fingerprint([one[k] for k in HASHED]) != one["digest"]:
                    raise ValueError(f"{path}: the entries of set {name!r} were changed by hand or cut; register it "
                                     "again")
                sets[name] = EvalSet(name=name, parts=[Part.from_json(p) for p in one["parts"]],
                                     ngrams=tuple(one["ngrams"]), canaries=[(n, int(h, 16)) for n, h in
                                                                            one["canaries"]],
                                     **{k: one[k] for k in ("file", "sha256", "n_items", "max_items", "dropped")})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: an entry is missing or of another kind ({error!r}); take the file from its "
                             "source again, or register the sets again") from error
        return cls(path, sets)

    def write(self) -> None:
        sets = {}
        for name, s in sorted(self.sets.items()):
            one = {"file": s.file, "sha256": s.sha256, "n_items": s.n_items, "ngrams": list(s.ngrams),
                   "max_items": s.max_items, "dropped": s.dropped, "unscreened": s.unscreened(),
                   "canaries": [[n, as_hex(h)] for n, h in s.canaries], "parts": [p.as_json() for p in s.parts]}
            sets[name] = {"digest": fingerprint([one[k] for k in HASHED])} | one
        write_json(self.path, {"format": FORMAT, "words": "lower case, runs of letters and digits", "sets": sets})

    def add(self, made: EvalSet, file: str | Path | None = None) -> EvalSet:
        """Take in a set made of `file` (None for texts without a file); its sha256 is noted now."""
        if file is not None:
            path = Path(file).resolve()
            made = replace(made, sha256=_sha256(path), file=os.path.relpath(path, self.path.resolve().parent))
        self.sets[made.name] = made
        return made

    def suspect(self, text: str, why: str) -> None:
        """Note a text that seems to leak: the next audit stops rows that hold it. Same text, same entry.

        Raises ValueError for a text under MIN_WORDS words: screening it would stop half of any corpus."""
        words = Words(text)
        if words.n < MIN_WORDS:
            raise ValueError(f"suspect {text[:60]!r} has {words.n} words: give {MIN_WORDS} or more")
        item = f"{why} #{as_hex(words.run(0, words.n))}"
        new = make_set(SUSPECTS, [{"id": item, "text": text}])
        if old := self.sets.get(SUSPECTS):
            parts = [p for p in old.parts if p.item != item] + new.parts
            new = replace(old, parts=parts, n_items=len({p.item for p in parts}))
        self.sets[SUSPECTS] = new

    def check(self, names: Iterable[str] = (), folder: str | Path | None = None, ignore: str | Path = "") -> None:
        """Raises ValueError when a name is not registered, a JSONL file of `folder` (but `ignore`) is not, or a
        registered file is gone or has changed."""
        for name in names:
            if name not in self.sets:
                raise ValueError(f"{self.path}: evaluation set {name!r} is not registered (there are "
                                 f"{', '.join(self.sets) or 'none'}); register it, an audit without it proves nothing")
        at = {name: self.path.parent / s.file for name, s in self.sets.items() if s.file}
        known = {p.resolve() for p in at.values()}
        if folder and not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder; --evals names the folder of the evaluation sets")
        for path in sorted(Path(folder).glob("*.jsonl")) if folder else ():
            if path.resolve() not in known | {Path(ignore).resolve()}:
                raise ValueError(f"{path}: this evaluation set is not in {self.path}; register it before auditing "
                                 "(--evals names another folder of evaluation sets)")
        for name, path in at.items():
            if not path.is_file():
                raise ValueError(f"{path}: the file of set {name!r} is gone; put it back or register the set again")
            if _sha256(path) != self.sets[name].sha256:
                raise ValueError(f"{path}: changed since set {name!r} was registered; restore it or register it again")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def audit(rows: Iterable[Mapping[str, Any]], registry: Registry, sets: Sequence[str] = (), *,
          ngrams: Sequence[int] = NGRAMS, fuzzy: float = 0.8) -> dict[str, Any]:
    """Screen rows {"text", "id"?} against registered sets (all, or `sets`), one row at a time.

    Per set and screen: items hit, of how many, the rate with its Wilson interval; "hits": for each item and screen the
    first row that hit it and how many did. "contaminated" is an exact, canary or fuzzy hit, or one of the largest n;
    hits of a smaller n alone are overlap for a person to read. `Registry.check` runs first.

    Raises ValueError for no rows, a row without text, what `Registry.check` refuses, an n that was not registered."""
    registry.check(sets)
    chosen = [registry.sets[name] for name in dict.fromkeys(sets or registry.sets)]
    if not chosen:
        raise ValueError(f"{registry.path}: no evaluation set is registered; an audit against nothing proves nothing")
    if not 0 < fuzzy <= 1:
        raise ValueError(f"fuzzy={fuzzy}: a share above 0 and at most 1; 0.8 is usual")
    for s in chosen:
        if s.name != SUSPECTS and (not ngrams or set(ngrams) - set(s.ngrams)):
            raise ValueError(f"ngrams {list(ngrams)}: set {s.name!r} holds {list(s.ngrams)}; "
                             "register it with those, or ask for what it holds")
    wanted = {f"{n}-gram" for n in ngrams} | {"exact", "fuzzy", "canary"}
    strong = wanted - {f"{n}-gram" for n in ngrams if n != max(ngrams)}
    screen, hits, n_rows, n_hit = Screen(chosen), {}, 0, 0
    for n_rows, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise ValueError(f"row {n_rows} ({row.get('id')}): field 'text' is {row.get('text')!r}; give a string")
        found = [m for m in screen.match(row["text"])
                 if m.screen in wanted and (m.screen != "fuzzy" or m.score >= fuzzy)]
        n_hit += bool({m.screen for m in found} & strong)
        for m in found:
            hit = hits.setdefault((m.set, m.item, m.screen), asdict(m) | {"row": n_rows, "id": row.get("id"),
                                                                          "rows": 0, "last": 0})
            hit["rows"], hit["last"] = hit["rows"] + (hit["last"] != n_rows), n_rows
    if not n_rows:
        raise ValueError("no rows to audit; an audit of nothing proves nothing")
    report = {}
    for s in chosen:
        missed = s.unscreened()
        report[s.name] = {"n_items": s.n_items, "max_items": s.max_items, "dropped": s.dropped, "screens": {}}
        for name in sorted(wanted, key=lambda w: (w.endswith("gram"), len(w), w)):
            if name == "canary" and not s.canaries:
                continue
            n = len(s.canaries) if name == "canary" else s.n_items
            k = sum(key[0] == s.name and key[2] == name for key in hits)
            report[s.name]["screens"][name] = {"items_hit": k, "n": n, "rate": k / n, "interval": wilson(k, n),
                                               "unscreened": missed.get(name, 0)}
    listed = [{k: v for k, v in hit.items() if k != "last"} for hit in hits.values()]
    return {"n_rows": n_rows, "rows_hit": n_hit, "rows_hit_interval": wilson(n_hit, n_rows), "ngrams": list(ngrams),
            "fuzzy": fuzzy, "sets": report, "hits": sorted(listed, key=lambda h: (h["row"], h["item"], h["screen"])),
            "contaminated": any(h["screen"] in strong for h in listed)}


def read_items(path: str | Path, parts: Sequence[str] = ("prompt", "answer")) -> list[dict[str, str]]:
    """Items {"id", parts ...} of an evaluation file, JSONL; the id is its `case_id`, `id` or line number.

    Raises ValueError naming file and line for a part that is missing or no string."""
    rows = read_jsonl(path, required=dict.fromkeys(parts, str))
    return [{"id": str(row.get("case_id", row.get("id", f"line {i}")))} | {p: row[p] for p in parts}
            for i, row in enumerate(rows, 1)]


def stream(path: str | Path, fields: Sequence[str] = ("text",)) -> Iterator[tuple[dict[str, Any], int]]:
    """({"id", "text"}, bytes read so far) of a JSONL file, one line in memory at a time; `fields` are joined.

    Blank lines are passed over. Raises ValueError as FILE:LINE for what is no row: an audit that skips rows cannot say
    a corpus is clean; and for a file that `rows.read_rows` would not take."""
    done = 0

    def count(piece: bytes) -> None:
        nonlocal done
        done += len(piece)

    for number, line in lines_of(path, MAX_LINE_BYTES, count):
        row = parse_object(line) if line is not None else Problem(code="too_many_bytes", message=(
            f"longer than {MAX_LINE_BYTES:,} bytes; is this JSONL?"))
        if isinstance(row, Problem):
            if row.code == "blank_line":
                continue
            raise ValueError(f"{path}:{number}: {row.message}; correct the line, or gate the file first")
        for f in fields:
            if not isinstance(row.get(f), str):
                raise ValueError(f"{path}:{number}: field {f!r} is {'missing' if f not in row else 'no string'}; name "
                                 f"the text with --field (there are {', '.join(map(str, row)):.60})")
        yield {"id": row.get("id", number), "text": " ".join([row[f] for f in fields])}, done


def ngram_table(items: Sequence[str], rows: Sequence[str], ns: Iterable[int] = range(5, 16)) -> list[dict[str, Any]]:
    """Per n: items that share an n-gram of words with some row, their share with a Wilson interval, and the rows.

    "too_short" items have no n-gram; they count in the share as not hit. Raises ValueError for no items or rows."""
    if not items or not rows:
        raise ValueError(f"{len(items)} items, {len(rows)} rows: give both; an overlap with nothing is no evidence")
    left, right, table = [Words(t) for t in items], [Words(t) for t in rows], []
    for n in ns:
        a, b = [np.unique(w.runs(n)) for w in left], [np.unique(w.runs(n)) for w in right]
        shared = np.intersect1d(np.concatenate(a), np.concatenate(b))
        k = sum(bool(among(g, shared).any()) for g in a)
        table.append({"n": n, "items_hit": k, "n_items": len(items), "rate": k / len(items),
                      "interval": wilson(k, len(items)), "rows_hit": sum(bool(among(g, shared).any()) for g in b),
                      "n_rows": len(rows), "too_short": sum(not len(g) for g in a)})
    return table


LEAKS = ("verbatim", "paraphrase", "answer_only")


def reword(text: str, share: float, words: Sequence[str], random_: random.Random) -> str:
    """`text` with about `share` of its words touched: left out, swapped with the next, or another of `words`."""
    out = text.split()
    for i in range(len(out)):
        if random_.random() < share:
            kind = random_.randrange(3)
            if kind == 0:
                out[i] = ""
            elif kind == 1 and i + 1 < len(out):
                out[i], out[i + 1] = out[i + 1], out[i]
            else:
                out[i] = random_.choice(words)
    return " ".join(w for w in out if w)


def plant(items: Sequence[Mapping[str, str]], kind: str, carriers: Sequence[str], seed: int = 0,
          share: float = 0.35) -> list[str]:
    """One leaked row per item {"prompt", "answer"}, behind a clean text of `carriers`: the item as it is, its prompt
    reworded (`share` of the words) without the answer, or the answer alone. Raises ValueError for an unknown kind."""
    if kind not in LEAKS:
        raise ValueError(f"kind={kind!r}: use one of {', '.join(LEAKS)}")
    random_, words = rng(seed, "plant", kind), " ".join(carriers).split()
    leak = {"verbatim": lambda x: f"{x['prompt']} {x['answer']}", "answer_only": lambda x: x["answer"],
            "paraphrase": lambda x: reword(x["prompt"], share, words, random_)}[kind]
    return [f"{random_.choice(carriers)} {leak(item)}" for item in items]


def detection(items: Sequence[Mapping[str, str]], leaks: Mapping[str, Sequence[str]], clean: Sequence[str],
              ngrams: Sequence[int] = NGRAMS, max_items: int = 3, background: Iterable[str] = (),
              allow: float = 0.01) -> dict[str, dict[str, dict[str, Any]]]:
    """Which screen finds which leak: {kind: {screen: {"auc", "threshold", "found", "n", "rate", "interval",
    "false_alarms", "curve"}}}.

    A row's score is its best match: 0 or 1 for exact, else the share of a part's n-grams (or shingles; or words,
    weighted by rarity: the bag of words) in it. `threshold` is the lowest at which at most `allow` of the clean rows
    would be stopped; "found" counts leaks at it. "curve": (threshold, share of clean rows, share of leaks). `clean`
    must be other rows than `background`. Raises ValueError for a kind without rows, or no clean rows."""
    if not clean or not leaks or not all(leaks.values()):
        raise ValueError(f"{len(clean)} clean rows, leaks {({k: len(v) for k, v in leaks.items()})}: give rows of "
                         "each, a detection rate needs both")
    screen = Screen([make_set("planted", items, ngrams=ngrams, max_items=max_items, background=background)])
    bag, names = _bag(items), ["exact", *(f"{n}-gram" for n in ngrams), "fuzzy", "words"]

    def scores(texts: Sequence[str]) -> np.ndarray:
        out = np.zeros((len(texts), len(names)))
        for i, text in enumerate(texts):
            for m in screen.match(text):
                j = names.index(m.screen)
                out[i, j] = max(out[i, j], m.score)
            out[i, -1] = bag(text)
        return out  # (rows, screens)

    quiet, result = scores(clean), {}
    for kind, texts in leaks.items():
        loud, result[kind] = scores(texts), {}
        for j, name in enumerate(names):
            a, b = np.sort(quiet[:, j]), loud[:, j]
            grid = np.unique(np.concatenate([a, b, [np.nextafter(max(1, a.max(), b.max()), np.inf)]]))
            alarms = 1 - np.searchsorted(a, grid, "left") / len(a)
            caught = 1 - np.searchsorted(np.sort(b), grid, "left") / len(b)
            at = int(np.flatnonzero((alarms <= allow) & (grid > 0))[0])
            k = int((b >= grid[at]).sum())
            below, tied = np.searchsorted(a, b, "left"), np.searchsorted(a, b, "right")
            result[kind][name] = {"auc": float((below + tied).mean() / 2 / len(a)), "threshold": float(grid[at]),
                                  "found": k, "n": len(b), "rate": k / len(b), "interval": wilson(k, len(b)),
                                  "false_alarms": int((a >= grid[at]).sum()),
                                  "curve": list(zip(grid.tolist(), alarms.tolist(), caught.tolist()))}
    return result


def _bag(items: Sequence[Mapping[str, str]]):
    """Score of a text: the largest share of an item's words in it, each word weighing log(items / items with it)."""
    bags = [set(bare_words(" ".join(t for k, t in item.items() if k != "id")).split()) for item in items]
    counts = Counter(w for bag in bags for w in bag)
    place = {w: i for i, w in enumerate(counts)}
    weight = np.array([math.log((1 + len(bags)) / n) for n in counts.values()])
    table = np.zeros((len(bags), len(place)))  # (items, words)
    for i, bag in enumerate(bags):
        table[i, [place[w] for w in bag]] = weight[[place[w] for w in bag]]
    table /= np.maximum(table.sum(1, keepdims=True), 1e-12)

    def score(text: str) -> float:
        here = [place[w] for w in set(bare_words(text).split()) if w in place]
        return float(table[:, here].sum(1).max()) if here else 0.0
    return score
