"""Rights as inputs of a job: what it may use, whether a mix may exist, under which plan the result may leave.

A JobSpec states purpose, plan, lane, stage, day and the tags it may use. `verdict` answers for one source under one
licence; `compose` for a whole mix, because terms that are fine alone can conflict together:

    - a contract that forbids mixing, with anything else;
    - two share-alike licences that cannot meet, or share-alike with a restriction its own licence does not have
      (weights leave the house under one licence, which cannot be both), where the plan hands out weights.

When a mix is refused, compose names the cheapest way out, the parts with the fewest tokens whose removal leaves nothing
to refuse, and for each of them a minimal conflict with those that stay (drop any one part and it is gone). It is exact:
every conflict but mixing is one between two tags, so a mix can come under a largest set of tags without a clash, of
which there are few; each is tried with all parts that fit it. Minimal sets are found by deletion.

Treated with care rather than law: a model counts as derived from every text it was trained on. Unknown rights are never
permitted in production; the research lane (plan NONE) may read them and its checkpoints carry the lane in their name.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lifecycle_lib.corpus.licences import PLANS, TAGS, Option, Policy, Terms, base_tag, join, policy
from lifecycle_lib.corpus.rights_log import Claim, ClaimsLog, check_date, contract_problems, mixing_allowed

RULES = "1.0.0"  # of the code below; raise it when a verdict can change
PURPOSES, LANES, STAGES = ("commercial", "research"), ("production", "research"), ("base", "fine-tune", "adapter")
RESEARCH = "research-"  # what a research checkpoint's name starts with
RESTRICTIONS = ("no-derivatives", "non-commercial", "partner-only", "research-only")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What a job states about itself. `allowed_tags` may name any policy tag but commercial-ok, which is a permission
    and asked for by the purpose; `date` is the day it runs."""

    name: str
    purpose: str
    distribution: str
    allowed_tags: tuple[str, ...]
    date: str
    lane: str = "production"
    stage: str = "base"
    customer: str = ""

    def __post_init__(self) -> None:
        for field, allowed in {"purpose": PURPOSES, "distribution": PLANS, "lane": LANES, "stage": STAGES}.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"job {field}={getattr(self, field)!r}; use one of {', '.join(allowed)}")
        if not isinstance(self.name, str) or not self.name.strip() or not isinstance(self.customer, str):
            raise ValueError(f"job name={self.name!r}, customer={self.customer!r}: name the job; customer is text")
        if not isinstance(self.allowed_tags, (list, tuple)) or (bad := [t for t in self.allowed_tags if t not in TAGS]):
            raise ValueError(f"job allowed_tags={self.allowed_tags!r}; give a list of {', '.join(TAGS)}"
                             + (f" (not {bad[0]!r})" if isinstance(self.allowed_tags, (list, tuple)) else ""))
        object.__setattr__(self, "allowed_tags", tuple(self.allowed_tags))
        check_date(self.date, "job date")
        if (self.lane == "research") != (self.distribution == "NONE"):
            raise ValueError(f"job lane={self.lane}, distribution={self.distribution}: the research lane goes with "
                             "NONE, and only it; what is distributed is production")
        if "unknown" in self.allowed_tags and self.lane != "research":
            raise ValueError("job allows unknown in production; find the licence out, or use lane research with NONE")

    @classmethod
    def of(cls, given: Any, where: str = "job") -> "JobSpec":
        """From a JSON object. Raises ValueError, starting with `where`, for a missing, unknown or wrong field."""
        known = {f.name for f in fields(cls)}
        needed = known - {"lane", "stage", "customer"}
        if not isinstance(given, Mapping) or not needed <= set(given) <= known:
            raise ValueError(f"{where}: fields are {', '.join(given) if isinstance(given, Mapping) else given!r}; give "
                             f"{', '.join(sorted(needed))}, and of lane, stage, customer what differs from the default")
        try:
            return cls(**given)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error


@dataclass(frozen=True, slots=True)
class Verdict:
    """May a job use a source under a licence? `options` are the choices it may take; none means `problems`."""

    options: Terms
    problems: tuple[str, ...]
    claim: Claim | None

    @property
    def ok(self) -> bool:
        return not self.problems


def option_problems(spec: JobSpec, option: Option, rules: Policy) -> list[str]:
    """Why the job may not use text that comes with these tags; [] if it may."""
    plan, problems = rules.plans[spec.distribution], []
    for tag in sorted(option - {"commercial-ok"}):
        if base_tag(tag) not in plan["admits"]:
            problems.append(f"plan {spec.distribution} does not admit {tag}")
        elif base_tag(tag) not in spec.allowed_tags:
            problems.append(f"the job does not allow {tag}")
    if "commercial-ok" not in option and (spec.purpose == "commercial" or "commercial-ok" in plan["requires"]):
        problems.append("no permission for commercial use")
    return problems


def verdict(spec: JobSpec, source: Any, licence: Any, log: ClaimsLog | None = None,
            rules: Policy | None = None) -> Verdict:
    """One source under one licence. With a log the row's licence and the log's claim on the job's day both bind."""
    rules = rules or policy()
    parsed, problems, claim = rules.parse(licence), [], None
    terms = parsed.terms
    if not isinstance(source, str) or not source.strip():
        problems.append("no source is named: quarantine")
    elif log is not None:
        claim = log.rights_on(source, spec.date)
        if claim.in_quarantine:
            problems.append("source is not in the claims log: quarantine until it is granted")
        elif claim.status != "granted":
            problems.append(f"source {claim.status} since {claim.since}")
        if claim.licence:
            terms = join(terms, rules.parse(claim.licence).terms)
        if claim.contract:
            problems += contract_problems(claim.contract, day=spec.date, customer=spec.customer, stage=spec.stage)
    contract = [] if claim and claim.contract else ["partner-only without a contract in the claims log"]
    by_option = {o: option_problems(spec, o, rules) + contract * any(base_tag(t) == "partner-only" for t in o)
                 for o in terms}
    options = frozenset(o for o, why in by_option.items() if not why)
    if not options:
        problems += min(by_option.values(), key=lambda why: (len(why), why))
        problems += [parsed.problem] if parsed.problem else []
    return Verdict(frozenset() if problems else options, tuple(problems), claim)


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one source under one licence: what a composer can take or leave. `tokens` are words where rows
    do not count their tokens."""

    source: str
    licence: str
    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.source} [{self.licence or 'no licence'}]"


def n_tokens(row: Mapping[str, Any]) -> int:
    """The row's own `tokens`, else its words."""
    own = row.get("tokens")
    return own if isinstance(own, int) and not isinstance(own, bool) else len(str(row.get("text", "")).split())


def parts_of(rows: Iterable[Mapping[str, Any]]) -> list[Part]:
    """Rows counted by source and licence, sorted. Raises ValueError for no rows."""
    counts: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        own = counts.setdefault((str(row.get("source") or ""), str(row.get("licence") or "")), [0, 0])
        own[0] += 1
        own[1] += n_tokens(row)
    if not counts:
        raise ValueError("no rows: nothing to compose; check the file")
    return [Part(*key, *own) for key, own in sorted(counts.items())]


def clash(a: str, b: str, rules: Policy) -> str:
    """Why one released work cannot come under both tags; "" if it can."""
    (kind_a, _, name_a), (kind_b, _, name_b) = a.partition(":"), b.partition(":")
    if kind_a == kind_b == "share-alike" and not rules.may_meet(name_a, name_b):
        return f"the weights cannot be passed on under {name_a} and under {name_b}"
    for kind, name, other in ((kind_a, name_a, kind_b), (kind_b, name_b, kind_a)):
        if kind == "share-alike" and other in RESTRICTIONS and other not in map(base_tag, rules.tags[name]):
            return f"{name} must be passed on without further restrictions, and {other} is one"
    return ""


def joint_problem(spec: JobSpec, option: Option, rules: Policy) -> str:
    """Why tags that are each admitted cannot hold for one released work; "" if they can."""
    if not rules.plans[spec.distribution]["weights_leave"]:
        return ""
    return next(filter(None, (clash(a, b, rules) for a, b in itertools.combinations(sorted(option), 2))), "")


def outcomes(spec: JobSpec, tags: frozenset[str], rules: Policy) -> list[frozenset[str]]:
    """The largest sets of these tags that one released work can come under: maximal cliques (Bron-Kerbosch 1973)."""
    if not rules.plans[spec.distribution]["weights_leave"]:
        return [tags]
    meets = {a: {b for b in tags if b != a and not clash(a, b, rules)} for a in tags}
    found: list[frozenset[str]] = []

    def grow(clique: frozenset[str], more: set[str], seen: set[str]) -> None:
        if not more and not seen:
            found.append(clique)
        pivot = max(more | seen, key=lambda tag: len(meets[tag] & more), default="")
        for tag in sorted(more - meets.get(pivot, set())):
            grow(clique | {tag}, more & meets[tag], seen & meets[tag])
            more, seen = more - {tag}, seen | {tag}

    grow(frozenset(), set(tags), set())
    return sorted(found, key=sorted)


def fits(options: Terms, outcome: frozenset[str]) -> bool:
    """Does some choice ask for nothing outside this outcome?"""
    return any(option - {"commercial-ok"} <= outcome for option in options)


def conflict(spec: JobSpec, parts: Sequence[tuple[Part, Verdict]], rules: Policy) -> str:
    """Why these admitted parts cannot be one mix; "" if they can. More parts never make a conflict go away."""
    sources = {part.source for part, _ in parts}
    for part, judged in parts:
        if judged.claim and judged.claim.contract and not mixing_allowed(judged.claim.contract, part.source, sources):
            return f"{part.source} may not be mixed"
    tags = frozenset(tag for _, judged in parts for option in judged.options for tag in option) - {"commercial-ok"}
    if any(all(fits(judged.options, outcome) for _, judged in parts) for outcome in outcomes(spec, tags, rules)):
        return ""
    chosen = [min(judged.options, key=sorted) for _, judged in parts]  # as good as any: every choice has a problem
    return joint_problem(spec, frozenset().union(*chosen), rules)


@dataclass(frozen=True, slots=True)
class Composition:
    """The answer for a mix. `refused`: parts that no mix of this job may hold; `remove`: those, and
    the cheapest further parts to leave out; `conflicts`: for each of the latter a minimal set of parts that cannot be
    together, itself first (parts that ask alike are named once); `kept`: the rest."""

    kept: tuple[Part, ...]
    refused: tuple[tuple[Part, tuple[str, ...]], ...]
    conflicts: tuple[tuple[tuple[Part, ...], str], ...]
    remove: tuple[Part, ...]
    terms: Terms | None  # of the kept mix; None if nothing is left

    @property
    def ok(self) -> bool:
        return not self.remove

    def check(self) -> None:
        """Raise ValueError with every refusal and minimal conflicting set, unless the whole mix may be made."""
        lines = [f"{part}: {'; '.join(why)}" for part, why in self.refused]
        lines += [f"{' + '.join(map(str, parts))}: {why}" for parts, why in self.conflicts]
        if lines:
            raise ValueError(f"mix refused: {'. '.join(lines)}. Removing {', '.join(map(str, self.remove))} "
                             f"({sum(p.tokens for p in self.remove)} tokens) is the least that resolves it")


def compose(spec: JobSpec, parts: Sequence[Part], log: ClaimsLog | None = None,
            rules: Policy | None = None) -> Composition:
    """May the job mix these parts? See the top of this file. Raises ValueError for no parts."""
    if not parts:
        raise ValueError("no parts: nothing to compose; give parts_of(rows)")
    rules = rules or policy()
    judged = {part: verdict(spec, part.source, part.licence, log, rules) for part in parts}
    groups: dict[Any, list[Part]] = {}  # parts that conflict alike stay or go together
    for part in sorted((part for part in parts if judged[part].ok), key=lambda p: (-p.tokens, str(p))):
        claim = judged[part].claim
        alone = claim and claim.contract and claim.contract.no_mixing
        groups.setdefault((part.source if alone else "", judged[part].options), []).append(part)
    tags = frozenset(tag for _, options in groups for option in options for tag in option) - {"commercial-ok"}
    ways = [[own for (source, options), own in groups.items() if source == alone and fits(options, outcome)]
            for outcome in outcomes(spec, tags, rules) for alone in sorted({source for source, _ in groups} | {""})]
    best = max(ways, key=lambda way: (sum(p.tokens for own in way for p in own), sum(map(len, way))))

    def why(some: Iterable[Part]) -> str:
        return conflict(spec, [(part, judged[part]) for part in some], rules)

    sets = []
    for own in (own for own in groups.values() if own not in best):  # who goes, and against which of those who stay
        found = [kept[0] for kept in best]
        for first in list(found):
            if why([own[0], *(fewer := [part for part in found if part != first])]):
                found = fewer
        sets.append(((own[0], *found), why([own[0], *found])))
    keep = {part for own in best for part in own}
    return Composition(tuple(part for part in parts if part in keep),
                       tuple((part, judged[part].problems) for part in parts if not judged[part].ok), tuple(sets),
                       tuple(part for part in parts if part not in keep),
                       join(*{judged[part].options for part in keep}) if keep else None)


@dataclass(frozen=True, slots=True)
class Gate:
    """May the result leave under a plan? `duties` go on after it has left."""

    plan: str
    problems: tuple[str, ...]
    duties: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def distribution_gate(spec: JobSpec, terms: Terms, evidence: Mapping[str, str], rules: Policy | None = None) -> Gate:
    """OPEN, RESTRICTED, API or ONPREM for a checkpoint under `terms` (of the composition, or of its lineage).

    `evidence` maps what the plan and the tags need ("contract", "access log", ...) to where it is on file; an empty
    entry counts as missing. The research lane never passes.
    """
    rules = rules or policy()
    plan = rules.plans[spec.distribution]
    tried = {o: option_problems(spec, o, rules) + ([p] if (p := joint_problem(spec, o, rules)) else []) for o in terms}
    option, problems = min(tried.items(), key=lambda item: (len(item[1]), sorted(item[0])))
    needs = [*plan["needs"], *(need for tag in sorted(option) for need in rules.needs.get(base_tag(tag), ()))]
    problems = problems + [f"missing: {need}" for need in dict.fromkeys(needs) if not evidence.get(need, "").strip()]
    if spec.lane == "research":
        problems.append("a research checkpoint is not promoted")
    alike = [f"pass the weights on under {tag.partition(':')[2]}" for tag in sorted(option)
             if base_tag(tag) == "share-alike" and plan["weights_leave"]]
    return Gate(spec.distribution, tuple(problems), (*plan["duties"], *alike))


def lane_name(spec: JobSpec, name: str) -> str:
    """The name a checkpoint of this job is stored under: the research lane shows in it."""
    return name if spec.lane == "production" or name.startswith(RESEARCH) else RESEARCH + name


def certainty(parts: Sequence[Part], day: str, log: ClaimsLog | None = None,
              rules: Policy | None = None) -> dict[str, int]:
    """Tokens by how sure their rights are. verified: known tags, granted that day, with evidence on file; partial:
    known tags, on someone's word; unknown: a tag is unknown, no source is named, or the claim is revoked or expired.
    Raises ValueError for no tokens."""
    rules, shares = rules or policy(), {"verified": 0, "partial": 0, "unknown": 0}
    for part in parts:
        claim = log.rights_on(part.source, day) if log and part.source.strip() else None
        stated = [part.licence, claim.licence] if claim and claim.licence else [part.licence]
        known = part.source.strip() and any("unknown" not in option for option in rules.mix(stated))
        if not known or (claim and claim.status in ("revoked", "expired")):
            shares["unknown"] += part.tokens
        else:
            shares["verified" if claim and claim.verified else "partial"] += part.tokens
    if not sum(shares.values()):
        raise ValueError("no tokens: nothing to measure; check the rows")
    return shares


def certainty_gate(shares: Mapping[str, int], max_unknown: float) -> str:
    """"" if the unknown share of the tokens is at most `max_unknown` (0 to 1), else why not."""
    if not 0 <= max_unknown <= 1:
        raise ValueError(f"max_unknown={max_unknown}: give a share from 0 to 1")
    share = shares["unknown"] / sum(shares.values())
    return "" if share <= max_unknown else f"{share:.1%} of the tokens have unknown rights, more than {max_unknown:.1%}"
