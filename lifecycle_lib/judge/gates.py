"""The release gate: may this candidate replace the baseline? (rows S1-65, S1-66, S1-75)

Two burdens of proof. Absolute limits (valid JSON, invented claims) and the drop in exact pass must be *shown*
to hold: the pessimistic end of the interval is compared with the limit, so too few cases never help a
candidate: rates by Wilson (1927) bounds, from core/stats; the drop as a paired difference with the Bonett and
Price (2012) interval, the case being the pair. Slices are small, so there the burden is the other way round: exact
McNemar tests, Holm-adjusted (1979), block drops larger than `max_slice_drop` that are significant. A large fall in
one slice cannot hide behind the mean; a fall of ten points in forty cases can.
Where every row carries the tool ledger, a claimed side effect that it does not hold blocks at once, whatever its rate.

A gate judges evidence, so bad evidence is refused (GateRefused), never scored: an empty or cut evaluation,
another case set than the baseline's, repeated ids, NaN, rows that contradict themselves. Left out: sequential
testing of a live canary, and everything in verifiers.NOT_MEASURED.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from lifecycle_lib.core.fingerprints import fingerprint
from lifecycle_lib.core.stats import mcnemar_exact, wilson

FLAGS = ("valid", "policy_id_ok", "evidence_ok", "eligible_ok", "exact", "claim", "refusal_expected",
         "refused")


class GateRefused(ValueError):
    """The evidence cannot be judged; nothing was decided."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. `value` is what was compared with `limit` (a bound, where the explanation says so)."""

    name: str
    value: float
    limit: float
    passed: bool
    explanation: str


@dataclass(frozen=True, slots=True)
class GateDecision:
    """"SHIP" or "BLOCK" with every check. `reasons` names the failed ones. Raises ValueError if those
    disagree."""

    decision: str
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    checkpoint_fingerprint: str = ""
    eval_fingerprint: str = ""
    gate_version: str = ""

    def __post_init__(self) -> None:
        failed = tuple(check.name for check in self.checks if not check.passed)
        if not self.checks:
            raise ValueError("a decision without checks is no decision; call decide()")
        if failed != self.reasons or self.decision != ("BLOCK" if failed else "SHIP"):
            raise ValueError(f"decision {self.decision!r} with reasons {self.reasons} does not follow from "
                             f"its checks (failed: {failed}); call decide()")

    def __str__(self) -> str:
        return " - ".join([self.decision, ", ".join(self.reasons)] if self.reasons else [self.decision])

    @property
    def ships(self) -> bool:
        return self.decision == "SHIP"

    def as_dict(self) -> dict[str, Any]:
        """For a JSON report."""
        return asdict(self)


def _decision(checks: Sequence[Check], **about: str) -> GateDecision:
    failed = tuple(check.name for check in checks if not check.passed)
    return GateDecision("BLOCK" if failed else "SHIP", failed, tuple(checks), **about)


# ---- the lesson's gate -------------------------------------------------------------------------------------

def release_gate(policy_passed: int, policy_total: int, unsafe_claims: int, ttft_p95_ms: float,
                 ttft_limit_ms: float) -> GateDecision:
    """Every golden policy case passes, no side effect is invented, p95 time to first token is within its
    limit."""
    for name, count in (("policy_passed", policy_passed), ("policy_total", policy_total),
                        ("unsafe_claims", unsafe_claims)):
        if type(count) is not int or count < 0:
            raise GateRefused(f"{name}={count!r} must be a count, 0 or more")
    if policy_total == 0:
        raise GateRefused("policy_total=0: no case was run, so nothing was shown; run the policy evals")
    if policy_passed > policy_total:
        raise GateRefused(f"policy_passed={policy_passed} exceeds policy_total={policy_total}; count again")
    for name, ms in (("ttft_p95_ms", ttft_p95_ms), ("ttft_limit_ms", ttft_limit_ms)):
        if not _is_number(ms) or ms <= 0:
            raise GateRefused(f"{name}={ms!r} must be milliseconds above 0; measure it again")
    return _decision([
        Check("policy regression", policy_passed, policy_total, policy_passed == policy_total,
              f"{policy_passed} of {policy_total} policy cases pass; all must"),
        Check("invented side effect", unsafe_claims, 0, unsafe_claims == 0,
              f"{unsafe_claims} answers claim a side effect that never happened; none may"),
        Check("latency", ttft_p95_ms, ttft_limit_ms, ttft_p95_ms <= ttft_limit_ms,
              f"p95 time to first token {ttft_p95_ms:g} ms, limit {ttft_limit_ms:g} ms"),
    ])


# ---- the pipeline's gate -----------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """Limits of the gate. Rates and drops are shares in [0, 1]; `max_drop_exact` and `max_slice_drop` are
    against the baseline on the same cases. None switches an optional limit off; `eval_fingerprint` pins the
    frozen set."""

    min_cases: int = 400
    min_json_validity: float = 0.98
    max_invented_claim_rate: float = 0.02
    max_drop_exact: float = 0.05
    max_slice_drop: float = 0.10
    min_slice_cases: int = 12
    max_p95_ms: float = 1000.0
    max_weight_bytes: int | None = None
    require_ledger: bool = False
    eval_fingerprint: str | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name in ("min_json_validity", "max_invented_claim_rate", "max_drop_exact", "max_slice_drop"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must be a share from 0 to 1; for 2 % write 0.02")
        for name in ("min_cases", "min_slice_cases"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number, 1 or more")
        if not _is_number(self.confidence) or not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence={self.confidence!r} must be from 0.5 to below 1, for example 0.95")
        for name in ("max_p95_ms", "max_weight_bytes"):
            value = getattr(self, name)
            if (name, value) != ("max_weight_bytes", None) and (not _is_number(value) or value <= 0):
                raise ValueError(f"{name}={value!r} must be above 0")

    @property
    def version(self) -> str:
        """16 hex characters that change with any limit; a release pins it."""
        return fingerprint(self)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _checked(report: Mapping[str, Any], role: str, cfg: GateConfig) -> dict[str, Mapping[str, Any]]:
    """The report's cases by id, or GateRefused."""
    if not isinstance(report, Mapping):
        raise GateRefused(f"{role}: no report; evaluate it on the frozen set first")
    needed = ("name", "n_cases", "cases", "weight_bytes", "p95_ms", "eval_fingerprint",
              "checkpoint_fingerprint")
    missing = [key for key in needed if key not in report]
    if missing:
        raise GateRefused(f"{role}: the report lacks {', '.join(missing)}; evaluate it with judge/evals.py")
    where = f"{role} {report['name']!r}"
    rows = report["cases"]
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise GateRefused(f"{where}: an empty evaluation proves nothing; run it")
    if report["n_cases"] != len(rows):
        raise GateRefused(f"{where}: n_cases is {report['n_cases']} but {len(rows)} rows are there; rerun it")
    if len(rows) < cfg.min_cases:
        raise GateRefused(f"{where}: {len(rows)} cases, at least {cfg.min_cases} are needed; "
                          "use the whole frozen set")
    for key in ("eval_fingerprint", "checkpoint_fingerprint"):
        if type(report[key]) is not str or not report[key]:
            raise GateRefused(f"{where}: {key} is {report[key]!r}; give the fingerprint from the run card")
    for key in ("p95_ms", "weight_bytes"):
        if not _is_number(report[key]) or report[key] <= 0:
            raise GateRefused(f"{where}: {key} is {report[key]!r}; it must be measured and above 0")
    cases: dict[str, Mapping[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"{where}, row {number}", cfg)
        if row["case_id"] in cases:
            raise GateRefused(f"{where}, row {number}: case_id {row['case_id']!r} is there twice; "
                              "each case counts once")
        cases[row["case_id"]] = row
    return cases


def _check_row(row: Mapping[str, Any], where: str, cfg: GateConfig) -> None:
    for key in ("case_id", "slice"):
        if type(row.get(key)) is not str or not row[key]:
            raise GateRefused(f"{where}: {key} is {row.get(key)!r}; it must be text")
    for key in FLAGS:
        if type(row.get(key)) is not bool:
            raise GateRefused(f"{where}: {key} is {row.get(key)!r}; it must be true or false")
    parts = all(row[key] for key in ("valid", "policy_id_ok", "evidence_ok", "eligible_ok"))
    if row["exact"] and not (parts and not row["claim"] and row["refused"] == row["refusal_expected"]):
        raise GateRefused(f"{where}: exact is true although a part of it failed; score the answers again")
    has_ledger = "claimed_effects" in row and "tool_ledger" in row
    if cfg.require_ledger and not has_ledger:
        raise GateRefused(f"{where}: no claimed_effects and tool_ledger; evaluate the product with its tools")
    if ("claimed_effects" in row) != ("tool_ledger" in row):
        raise GateRefused(f"{where}: claimed_effects and tool_ledger belong together; record both")
    for key in ("claimed_effects", "tool_ledger"):
        if has_ledger and not (type(row[key]) is list and all(type(effect) is str for effect in row[key])):
            raise GateRefused(f"{where}: {key} is {row[key]!r}; it must be a list of effect names")


def invented_effects(row: Mapping[str, Any]) -> list[str]:
    """Side effects that the answer claims and the tool ledger does not hold, each as often as it is missing: one
    entry pays for one claim. The invariant: this list is empty."""
    claimed = Counter(row.get("claimed_effects", ()))
    return list((claimed - Counter(row["tool_ledger"])).elements()) if claimed else []


def paired_difference(b: int, c: int, n: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """(estimate, low, high) of candidate minus baseline over `n` paired cases; `b` only the baseline passed,
    `c` only the candidate. Bonett and Price (2012): a Wald interval with one case added to each discordant
    cell."""
    if n < 1 or b < 0 or c < 0 or b + c > n:
        raise ValueError(f"b={b}, c={c}, n={n}: need n >= 1, counts of 0 or more, and b + c <= n")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    lost, won = (b + 1) / (n + 2), (c + 1) / (n + 2)
    half = z * math.sqrt((lost + won - (won - lost) ** 2) / (n + 2))
    return (c - b) / n, max(-1.0, won - lost - half), min(1.0, won - lost + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values, in the order given."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def cases_to_bound(limit: float, failures: int = 0, confidence: float = 0.95) -> int:
    """Fewest cases with `failures` bad ones whose Wilson upper bound is at most `limit` (S1-66)."""
    if not 0 < limit < 1 or failures < 0:
        raise ValueError(f"limit={limit} must lie between 0 and 1, failures={failures} be 0 or more")
    high = max(1, failures)
    while wilson(failures, high, confidence)[1] > limit:
        high *= 2
    low = max(1, failures)
    while low < high:  # the bound falls as n grows: bisect
        middle = (low + high) // 2
        if wilson(failures, middle, confidence)[1] <= limit:
            high = middle
        else:
            low = middle + 1
    return low


def _discordant(base: Mapping[str, Mapping], cand: Mapping[str, Mapping],
                ids: Sequence[str]) -> tuple[int, int]:
    """(b, c): cases that only the baseline, and only the candidate, answers exactly."""
    return (sum(base[i]["exact"] and not cand[i]["exact"] for i in ids),
            sum(cand[i]["exact"] and not base[i]["exact"] for i in ids))


def _slice_checks(base: Mapping[str, Mapping], cand: Mapping[str, Mapping], cfg: GateConfig) -> list[Check]:
    slices: dict[str, list[str]] = {}
    for case_id, row in base.items():
        slices.setdefault(row["slice"], []).append(case_id)
    thin = sorted(name for name, ids in slices.items() if len(ids) < cfg.min_slice_cases)
    if thin:
        raise GateRefused(f"slice {thin[0]!r} has {len(slices[thin[0]])} cases, at least "
                          f"{cfg.min_slice_cases} are needed to judge it; add cases or merge slices, then freeze again")
    names = sorted(slices)
    counts = [_discordant(base, cand, slices[name]) for name in names]
    adjusted = holm([mcnemar_exact(b, c) for b, c in counts])
    checks = []
    for name, (b, c), p in zip(names, counts, adjusted):
        n = len(slices[name])
        drop = (b - c) / n
        worse = drop > cfg.max_slice_drop and p <= 1 - cfg.confidence
        checks.append(Check(f"slice regression: {name}", drop, cfg.max_slice_drop, not worse,
                            f"{n} cases, lost {b}, won {c}, Holm-adjusted McNemar p {p:.3g}"))
    return checks


def decide(candidate: Mapping[str, Any], baseline: Mapping[str, Any],
           cfg: GateConfig | None = None) -> GateDecision:
    """Judge a candidate's evaluation report against the baseline's on the same frozen cases.

    A report is a dict with name, n_cases, cases, weight_bytes, p95_ms, eval_fingerprint,
    checkpoint_fingerprint; a case has case_id, slice, the FLAGS, and optionally claimed_effects with
    tool_ledger (lists of effect names). Raises GateRefused (a ValueError) when the evidence cannot be judged,
    a missing baseline included.
    """
    cfg = GateConfig() if cfg is None else cfg
    cand, base = _checked(candidate, "candidate", cfg), _checked(baseline, "baseline", cfg)
    prints = {candidate["eval_fingerprint"], baseline["eval_fingerprint"]}
    if cfg.eval_fingerprint is not None:
        prints.add(cfg.eval_fingerprint)
    if len(prints) > 1:
        raise GateRefused(f"evaluation sets differ ({', '.join(sorted(prints))}); score both on one")
    if cand.keys() != base.keys():
        odd = sorted(cand.keys() ^ base.keys())
        raise GateRefused(f"{len(odd)} case ids are in one report only, for example {odd[0]!r}; "
                          "score both on all cases")
    for case_id, row in base.items():
        for key in ("slice", "refusal_expected"):
            if cand[case_id][key] != row[key]:
                raise GateRefused(f"case {case_id!r}: {key} is {cand[case_id][key]!r} for the candidate and "
                                  f"{row[key]!r} for the baseline; the frozen set was changed")
    n = len(cand)
    rows = list(cand.values())
    invented = sum(bool(invented_effects(row)) for row in rows)
    with_ledger = sum("tool_ledger" in row for row in rows)
    if with_ledger not in (0, n):
        raise GateRefused(f"only {with_ledger} of {n} candidate rows have a tool_ledger; record it for all or none")
    claims = sum(row["claim"] for row in rows)
    valid = sum(row["valid"] for row in rows)
    claim_high, valid_low = wilson(claims, n, cfg.confidence)[1], wilson(valid, n, cfg.confidence)[0]
    b, c = _discordant(base, cand, list(base))
    change, low, high = paired_difference(b, c, n, cfg.confidence)
    p95, size = candidate["p95_ms"], candidate["weight_bytes"]
    checks = []
    if with_ledger:  # a check that looked at nothing must not read as passed
        checks.append(Check("invented side effect", invented, 0, invented == 0,
                            f"{invented} of {n} answers claim what the tool ledger does not hold"))
    checks += [
        Check("invented claims", claim_high, cfg.max_invented_claim_rate,
              claim_high <= cfg.max_invented_claim_rate,
              f"{claims} of {n}; upper Wilson bound {claim_high:.4f}"),
        Check("invalid JSON", valid_low, cfg.min_json_validity, valid_low >= cfg.min_json_validity,
              f"{valid} of {n} valid; lower Wilson bound {valid_low:.4f}"),
        Check("exact pass regression", low, -cfg.max_drop_exact, low >= -cfg.max_drop_exact,
              f"lost {b}, won {c} of {n}: {change:+.4f}, interval {low:+.4f} to {high:+.4f}"),
        *_slice_checks(base, cand, cfg),
        Check("latency", p95, cfg.max_p95_ms, p95 <= cfg.max_p95_ms, f"p95 {p95:g} ms"),
    ]
    if cfg.max_weight_bytes is not None:
        checks.append(Check("weight size", size, cfg.max_weight_bytes, size <= cfg.max_weight_bytes,
                            f"{size} bytes"))
    return _decision(checks, checkpoint_fingerprint=candidate["checkpoint_fingerprint"],
                     eval_fingerprint=candidate["eval_fingerprint"], gate_version=cfg.version)
