"""Near-duplicate search over a million short rows: corpus/near_index beside rensa (Rust) and datasketch.

Made-up messages of about 60 characters in a JSONL file: a greeting and drawn words; a tenth are copies of an earlier
row (exact, one or two letters changed, another greeting), a tenth fill one of 40 frames, so are half alike by nature.
Character 5-grams, Jaccard 0.8, 25 bands of 5 minima on every side. Prints one JSON line. Rates are rows per second of
CPU, one thread, each side in a process of its own.

- full: ours over all rows, from the file to clusters, with the peak resident memory and what the imports alone take;
  `recall` of the planted pairs that truly reach 0.8, `false_pairs` among the links, counted anew with plain sets.
- flags: rensa's quickest route over the same file, shingles made in Python, rows streamed: a flag for each row that
  shares a band with another. It names no pair and checks none (`flagged` beside the rows in our clusters).
- subset: the same answer from all three, verified clusters, on the first rows; `ratio` is ours over rensa there.
- signatures: only MinHash. rensa also with the shingles given as lists of strings, and as our hashes.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from lifecycle_lib.core.records import write_jsonl
from lifecycle_lib.core.seeds import peak_memory_bytes, rng

K, THRESHOLD, BANDS, ROWS_PER_BAND, CHUNK = 5, 0.8, 25, 5, 20_000
PERMUTATIONS = BANDS * ROWS_PER_BAND
GREETINGS = ("hi, ", "hello, ", "hello there, ", "hey ", "good morning, ", "dear support team, ", "", "please help: ")


def rows(n: int, seed: int) -> tuple[list[dict], list[tuple[int, int]]]:
    """(rows, planted pairs): a pair is (earlier row, its copy)."""
    draw = rng(seed, "near-duplicates", n)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(20_000)]
    weights = list(itertools.accumulate(1 / rank**0.8 for rank in range(1, len(words) + 1)))
    frames = [draw.choices(words, k=6) for _ in range(40)]
    texts: list[tuple[str, str]] = []
    planted = []
    for i in range(n):
        greeting, kind = draw.choice(GREETINGS), draw.random()
        if i and kind < 0.1:
            original = draw.randrange(i)
            greeting, body = texts[original]
            family = draw.randrange(3)
            if family == 1:
                letters = list(body)
                for _ in range(draw.randint(1, 2)):
                    letters[draw.randrange(len(letters))] = draw.choice("aeiou")
                body = "".join(letters)
            elif family == 2:
                greeting = draw.choice(GREETINGS)
            planted.append((original, i))
        elif kind < 0.2:
            a, b, c = draw.choices(words, cum_weights=weights, k=3)
            frame = draw.choice(frames)
            body = " ".join((*frame[:2], a, *frame[2:4], b, *frame[4:], c))
        else:
            body = " ".join(draw.choices(words, cum_weights=weights, k=draw.randint(6, 11)))
        texts.append((greeting, body))
    return [{"id": str(i), "text": g + b} for i, (g, b) in enumerate(texts)], planted


def grams(text: str) -> set[str]:
    return {text[i:i + K] for i in range(max(1, len(text) - K + 1))}


def same(a: set[str], b: set[str]) -> bool:
    return len(a & b) >= THRESHOLD * len(a | b)


def read(path: str, n: int) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(n))]


def links(n: int, candidates, sets) -> int:
    """How many joins the candidate pairs that hold up make: what a peer needs to give our answer."""
    parent = list(range(n))
    made = 0
    for i, j in candidates:
        a, b = i, j
        while parent[a] != a:
            parent[a] = a = parent[parent[a]]
        while parent[b] != b:
            parent[b] = b = parent[parent[b]]
        if a != b and same(sets[i], sets[j]):
            parent[max(a, b)] = min(a, b)
            made += 1
    return made


def full(path: str, n: int, planted) -> dict:
    from lifecycle_lib.corpus.minhash import MinHash
    from lifecycle_lib.corpus.near_index import JsonlTexts, near_clusters

    imports = peak_memory_bytes()
    start = time.process_time()
    found = near_clusters(JsonlTexts(path), THRESHOLD, MinHash(permutations=128, k=K))
    seconds, peak = time.process_time() - start, peak_memory_bytes()
    texts = read(path, n)  # after the peak was read
    true = [(i, j) for i, j in planted if same(grams(texts[i]), grams(texts[j]))]
    pairs = found.edges.tolist()
    clusters = found.clusters()
    return {"rows": n, "rows_per_s": round(n / seconds), "cpu_s": round(seconds, 1), "peak_mib": peak >> 20,
            "imports_mib": imports >> 20, "planted": len(planted), "planted_at_threshold": len(true),
            "recall": sum(found.labels[i] == found.labels[j] for i, j in true) / len(true), "links": len(pairs),
            "false_pairs": sum(not same(grams(texts[i]), grams(texts[j])) for i, j in pairs),
            "candidates": found.candidates, "compared": found.compared, "beyond_window": found.beyond_window,
            "clusters": len(clusters), "rows_in_clusters": sum(map(len, clusters))}


def flags(path: str, n: int, planted) -> dict:
    import rensa

    index, flagged = rensa.RMinHashLSH(THRESHOLD, PERMUTATIONS, BANDS), 0
    start = time.process_time()
    with open(path, encoding="utf-8") as file:
        for at in range(0, n, CHUNK):
            texts = [json.loads(line)["text"] for line, _ in zip(file, range(CHUNK))]
            tokens = [[t[i:i + K] for i in range(max(1, len(t) - K + 1))] for t in texts]
            matrix = rensa.RMinHash.digest_matrix_from_token_sets(tokens, PERMUTATIONS, 0)
            flagged += sum(index.insert_matrix_and_query_duplicate_flags(matrix, at))
    return {"rows": n, "rows_per_s": round(n / (time.process_time() - start)), "flagged": flagged,
            "peak_mib": peak_memory_bytes() >> 20}


def subset_ours(path: str, n: int, planted) -> dict:
    from lifecycle_lib.corpus.minhash import MinHash
    from lifecycle_lib.corpus.near_index import near_clusters

    texts = read(path, n)
    start = time.process_time()
    found = near_clusters(texts, THRESHOLD, MinHash(permutations=128, k=K))
    seconds = time.process_time() - start
    start = time.process_time()
    MinHash(permutations=PERMUTATIONS, k=K).signatures(texts)
    signatures = time.process_time() - start
    return {"rows_per_s": round(n / seconds), "links": len(found.edges), "signatures_per_s": round(n / signatures)}


def subset_rensa(path: str, n: int, planted) -> dict:
    import numpy as np
    import rensa

    from lifecycle_lib.corpus.minhash import shingle_hashes

    texts = read(path, n)
    start = time.process_time()
    sets = [grams(t) for t in texts]
    hashes = rensa.RMinHash.from_token_sets([list(s) for s in sets], PERMUTATIONS, 0)
    index = rensa.RMinHashLSH(THRESHOLD, PERMUTATIONS, BANDS)
    index.insert_many(hashes)
    made = links(n, ((i, j) for i, near in enumerate(index.query_all(hashes)) for j in near if j < i), sets)
    seconds = time.process_time() - start
    start = time.process_time()
    tokens = [[t[i:i + K] for i in range(max(1, len(t) - K + 1))] for t in texts]
    ready = time.process_time()
    rensa.RMinHash.digest_matrix_from_token_sets(tokens, PERMUTATIONS, 0)
    end = time.process_time()
    flat, counts = shingle_hashes(texts, K, "char")
    flat, offsets = flat.astype(np.uint64), np.concatenate(([0], np.cumsum(counts)))
    before = time.process_time()
    rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, PERMUTATIONS, 0)
    return {"rows_per_s": round(n / seconds), "links": made,
            "signatures_per_s": round(n / (end - start)), "signatures_per_s_given_strings": round(n / (end - ready)),
            "signatures_per_s_given_hashes": round(n / (time.process_time() - before))}


def subset_datasketch(path: str, n: int, planted) -> dict:
    from datasketch import MinHash, MinHashLSH

    texts = read(path, n)
    start = time.process_time()
    sets = [grams(t) for t in texts]
    hashes = []
    for s in sets:
        hashes.append(MinHash(num_perm=PERMUTATIONS, seed=1))
        hashes[-1].update_batch([g.encode() for g in s])
    signatures = time.process_time() - start
    index, candidates = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS_PER_BAND)), []
    for i, h in enumerate(hashes):
        candidates += [(i, j) for j in index.query(h)]
        index.insert(i, h)
    made = links(n, candidates, sets)
    return {"rows_per_s": round(n / (time.process_time() - start)), "links": made,
            "signatures_per_s": round(n / signatures)}


def make(path: str, n: int, planted) -> dict:
    made, pairs = rows(n, seed=0)
    write_jsonl(path, made)
    Path(path).with_name("planted.json").write_text(json.dumps(pairs))
    return {}


SIDES = {f.__name__: f for f in (make, full, flags, subset_ours, subset_rensa, subset_datasketch)}


def side(name: str, folder: str, n: int) -> dict:
    """Run one side in a process of its own. This process stays small: a child's peak memory starts at its parent's."""
    done = subprocess.run([sys.executable, __file__, "--side", name, "--folder", folder, "--rows", str(n)],
                          check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 rows: shows that it runs, not the speed")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        planted = Path(args.folder) / "planted.json"
        planted = json.loads(planted.read_text()) if planted.is_file() else []
        print(json.dumps(SIDES[args.side](str(Path(args.folder) / "rows.jsonl"), args.rows, planted)))
        return

    n, n_subset, turns = (20_000, 5_000, 1) if args.quick else (1_000_000, 50_000, 3)
    runs = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        side("make", folder, n)
        whole, flagged, slowest = (side(*which) for which in (
            ("full", folder, n), ("flags", folder, n), ("subset_datasketch", folder, n_subset)))
        for turn in range(turns):
            for name in sorted(("subset_ours", "subset_rensa"), reverse=turn % 2 == 1):
                runs[name].append(side(name, folder, n_subset))
    ours, rensa = ({key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
                   for name in ("subset_ours", "subset_rensa"))
    print(json.dumps({
        "name": "near_duplicate_rows_per_cpu_s", "ours": ours["rows_per_s"], "peer": rensa["rows_per_s"],
        "ratio": round(ours["rows_per_s"] / rensa["rows_per_s"], 2),
        "ratio_to_datasketch": round(ours["rows_per_s"] / slowest["rows_per_s"], 1),
        "ratio_to_rensa_flags": round(whole["rows_per_s"] / flagged["rows_per_s"], 2),
        "full": whole, "flags": flagged,
        "subset": {"rows": n_subset, "ours": ours, "rensa": rensa, "datasketch": slowest}, "runs": dict(runs)}))


if __name__ == "__main__":
    main()
