"""How good are the privacy detectors, what does a small classifier add, and how much leaks past both?

- `read_presidio`: rows and gold spans of the presidio-research synthetic file. Its texts are templates filled in, so
  `split_by_template` keeps all rows of a template on one side: detectors written on one half, reported on the other.
- `TokenClassifier`: logistic regression on hashed features of a token and its neighbours (feature hashing: Weinberger
  et al. 2009). It finds names without a cue word. `recall_gain` compares it with the patterns at a fixed precision,
  with a bootstrap over templates.
- `residual_leak`: people read a sample of admitted rows; the Clopper-Pearson (1934) upper bound says how much may still
  leak, and `n_to_bound` how many must be read.

Left out: transformers, gazetteers, and sequence models; the point is what fifty lines buy.
"""

import random
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import betaincinv

from lifecycle_lib.core.records import read_json
from lifecycle_lib.core.seeds import derive_seed, rng
from lifecycle_lib.core.stats import Effect
from lifecycle_lib.corpus.privacy import Span, find_pii

Rows = Sequence[Mapping[str, Any]]
PRESIDIO_KINDS = {"CREDIT_CARD": "CARD", "PHONE_NUMBER": "PHONE", "EMAIL_ADDRESS": "EMAIL", "DOMAIN_NAME": "URL",
                  "IBAN_CODE": "IBAN", "IP_ADDRESS": "IP", "STREET_ADDRESS": "ADDRESS", "ZIP_CODE": "ZIP",
                  "DATE_TIME": "DATE", "US_DRIVER_LICENSE": "ID_NUMBER"}
PRESIDIO_MERGE = {"BIRTH_DATE": "DATE"}  # that file does not tell them apart
NOT_PERSONAL = frozenset({"GPE", "ORGANIZATION", "NRP", "TITLE"})  # countries, companies, nationalities, "Mrs."
BUCKETS = 2**14


def read_presidio(path: str | Path) -> list[dict[str, Any]]:
    """Rows {"text", "spans", "template"} with our names of kinds; kinds we have no detector for keep theirs.

    Raises ValueError naming file and row where a span's text is not the text at its place."""
    rows = []
    for i, raw in enumerate(read_json(path)):
        text, spans = raw["full_text"], []
        for s in raw["spans"]:
            span = Span(s["start_position"], s["end_position"], PRESIDIO_KINDS.get(s["entity_type"], s["entity_type"]),
                        s["entity_value"])
            if text[span.start:span.end] != span.text:
                raise ValueError(f"{path}: row {i}: characters {span.start}..{span.end} are not {span.text!r}; "
                                 "get the file again")
            spans.append(span)
        rows.append({"text": text, "spans": sorted(spans, key=lambda s: s.start), "template": raw["template_id"]})
    return rows


def split_by_template(rows: Rows, seed: int = 0) -> tuple[list, list]:
    """(one half, the other half): every template is whole on one side. ValueError for fewer than 2 templates."""
    templates = sorted({row["template"] for row in rows})
    if len(templates) < 2:
        raise ValueError(f"{len(templates)} template in {len(rows)} rows: a split needs 2; give rows of more templates")
    random.Random(seed).shuffle(templates)  # the patterns were written on the first half of seed 0
    first = set(templates[:len(templates) // 2])
    return [r for r in rows if r["template"] in first], [r for r in rows if r["template"] not in first]


def tokens(text: str) -> list[Span]:
    """Words and numbers of a text, with their places; punctuation is left out."""
    return [Span(m.start(), m.end(), "", m[0]) for m in re.finditer(r"\w+(?:['’.-]\w+)*", text)]


def _shape(word: str) -> str:
    """"Mary" is Xx, "12" is d, "A4" is Xd: runs of the same class, shortened."""
    return re.sub(r"(.)\1+", r"\1", re.sub(r"[^\W\d_]", lambda m: "X" if m[0].isupper() else "x",
                                            re.sub(r"\d", "d", word)))


class TokenClassifier:
    """Probability that a token is personal: logistic regression on hashed features of it and its two neighbours on
    each side (their words, shapes, what a pattern said), fitted by full-batch Adam. 17 features, 2^14 weights."""

    def __init__(self) -> None:
        self.weights = np.zeros(BUCKETS)

    @staticmethod
    def features(text: str) -> np.ndarray:
        """(tokens, 17) buckets."""
        words, flags = tokens(text), _flags(text, find_pii(text))
        names = [("", "", "")] * 2 + [(w.text.lower(), _shape(w.text), str(f)) for w, f in zip(words, flags)]
        names += [("", "", "")] * 2
        rows = []
        for i, word in enumerate(words):
            near = [f"{d}{part}{value}" for d in range(5) for part, value in enumerate(names[i + d])]
            before = text[words[i - 1].end:word.start] if i else "^"
            rows.append([zlib.crc32(f.encode()) % BUCKETS for f in [*near, "b" + before, "e" + word.text[-3:].lower()]])
        return np.array(rows, dtype=np.int64).reshape(-1, 17)

    def fit(self, rows: Rows, steps: int = 150, rate: float = 0.05, decay: float = 1e-5) -> "TokenClassifier":
        x = np.concatenate([self.features(r["text"]) for r in rows])  # (T, 17)
        y = np.concatenate([_flags(r["text"], _personal(r)) for r in rows]).astype(float)  # (T,)
        mean, square = np.zeros(BUCKETS), np.zeros(BUCKETS)
        for step in range(1, steps + 1):
            error = self._probability(x) - y
            grad = np.bincount(x.ravel(), np.repeat(error, 17), BUCKETS) / len(y) + decay * self.weights
            mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
            self.weights -= rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        return self

    def _probability(self, x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-np.clip(self.weights[x].sum(1), -30, 30)))

    def __call__(self, text: str) -> np.ndarray:
        """(tokens,) probabilities, for the spans of `tokens(text)`."""
        return self._probability(self.features(text))


def _flags(text: str, spans: Sequence[Span]) -> np.ndarray:
    """(tokens,) whether a token lies in one of the spans."""
    return np.array([any(t.overlaps(s) for s in spans) for t in tokens(text)], dtype=bool)


def _personal(row: Mapping[str, Any]) -> list[Span]:
    return [s for s in row["spans"] if s.kind not in NOT_PERSONAL]


def recall_gain(train: Rows, test: Rows, precision: float = 0.9, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Token recall of patterns with the classifier minus patterns alone, on templates neither has seen.

    Half of `train`'s templates fit the classifier, the other half choose the threshold: from patterns alone downwards,
    the last before patterns and classifier together fall below `precision` there. On `test` the precision is measured,
    not guaranteed. Returns the gain as an Effect (95 % bootstrap over test templates), precision and recall of both,
    the threshold, and "curve": (threshold, precision, recall, share of rows with a token for review) on test. Raises
    ValueError where no threshold reaches the precision, and where `test` holds no personal token."""
    fit, choose = split_by_template(train, derive_seed(seed, "choose") % 2**31)
    model = TokenClassifier().fit(fit)

    def measure(rows: Rows) -> list[tuple[Any, np.ndarray, np.ndarray, np.ndarray]]:
        return [(r["template"], _flags(r["text"], _personal(r)), _flags(r["text"], find_pii(r["text"])),
                 model(r["text"])) for r in rows]

    def rates(parts: list, threshold: float) -> tuple[float, float]:
        truth = np.concatenate([p[1] for p in parts])
        said = np.concatenate([p[2] | (p[3] >= threshold) for p in parts])
        both = (truth & said).sum()
        return float(both / said.sum()) if said.any() else 1.0, float(both / max(1, truth.sum()))

    chosen, seen = measure(choose), measure(test)
    if not any(p[1].any() for p in seen):
        raise ValueError(f"{len(test)} test rows hold no personal token: recall has no evidence; give labelled rows")
    grid = [*np.round(np.arange(0.02, 1.0, 0.02), 2), 1.01]  # 1.01: the patterns alone
    good = list(takewhile(lambda t: rates(chosen, t)[0] >= precision, reversed(grid)))
    if not good:
        raise ValueError(f"precision={precision}: no threshold reaches it on held-out templates (patterns alone: "
                         f"{rates(chosen, 1.01)[0]:.3f}); ask for less")
    threshold = float(good[-1])
    by_template: dict[Any, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for template, truth, pattern, p in seen:
        by_template[template] += [truth.sum(), (truth & pattern).sum(), (truth & (pattern | (p >= threshold))).sum()]
    counts = np.array(list(by_template.values()))  # (templates, 3)
    weights = np.random.default_rng(derive_seed(seed, "bootstrap")).multinomial(
        len(counts), np.full(len(counts), 1 / len(counts)), draws)
    total = weights @ counts
    total = total[total[:, 0] > 0]
    low, high = np.percentile((total[:, 2] - total[:, 1]) / total[:, 0], [2.5, 97.5])
    before, after = rates(seen, 1.01), rates(seen, threshold)
    curve = [(float(t), *rates(seen, t), sum(bool((p[2] | (p[3] >= t)).any()) for p in seen) / len(seen)) for t in grid]
    return {"gain": Effect(after[1] - before[1], min(float(low), after[1] - before[1]),
                           max(float(high), after[1] - before[1]), len(counts)),
            "patterns": {"precision": before[0], "recall": before[1]},
            "both": {"precision": after[0], "recall": after[1]}, "threshold": threshold, "target": precision,
            "tokens": int(counts[:, 0].sum()), "curve": curve}


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval for k of n. ValueError for n < 1, k outside 0..n."""
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"k={k} of n={n}: n must be 1 or more and k 0..n; an empty sample bounds nothing")
    tail = (1 - confidence) / 2
    return (float(betaincinv(k, n - k + 1, tail)) if k else 0.0,
            float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0)


def n_to_bound(rate: float, leaks: int = 0, confidence: float = 0.95) -> int:
    """Rows to read so that `leaks` found bound the leak rate below `rate`, one-sided. 0 leaks, 0.5 %, 95 %: 598."""
    if not 0 < rate < 1 or leaks < 0 or not 0 < confidence < 1:
        raise ValueError(f"rate={rate}, leaks={leaks}, confidence={confidence}: rate and confidence between 0 and 1, "
                         "leaks 0 or more")
    low, high = leaks, leaks + 1

    def bound(n: int) -> float:
        return float(betaincinv(leaks + 1, n - leaks, confidence)) if n > leaks else 1.0

    while bound(high) >= rate:
        low, high = high, 2 * high
    while high - low > 1:  # bound(low) >= rate > bound(high)
        middle = (low + high) // 2
        low, high = (middle, high) if bound(middle) >= rate else (low, middle)
    return high


def residual_leak(rows: Rows, n: int, leaks: Callable[[Mapping[str, Any]], bool], seed: int = 0,
                  confidence: float = 0.95) -> dict[str, Any]:
    """Read `n` admitted rows drawn without replacement; `leaks(row)` is the reader's verdict.

    Returns k, n, the rate, its one-sided upper bound and which rows leaked (their positions). The bound treats the
    draw as binomial: a little wide where n is a good part of the rows. Raises ValueError for n outside 1..rows."""
    if not 1 <= n <= len(rows):
        raise ValueError(f"n={n} of {len(rows)} admitted rows: read at least one and no more than there are")
    drawn = sorted(rng(seed, "residual leak").sample(range(len(rows)), n))
    found = [i for i in drawn if leaks(rows[i])]
    k = len(found)
    return {"k": k, "n": n, "rate": k / n, "upper": clopper_pearson(k, n, 2 * confidence - 1)[1],
            "confidence": confidence, "rows": found}
