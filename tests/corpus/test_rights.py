"""Jobs, verdicts, composition with minimal conflicts, distribution, certainty."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.corpus import rights
from lifecycle_lib.corpus.licences import TABLE, TAGS, policy
from lifecycle_lib.corpus.rights import (
    JobSpec,
    Part,
    certainty,
    certainty_gate,
    compose,
    distribution_gate,
    lane_name,
    parts_of,
    verdict,
)
from lifecycle_lib.corpus.rights_log import ClaimsLog
from lifecycle_lib.desk.sources import draw_rows

OPEN = JobSpec(name="open", purpose="commercial", distribution="OPEN", allowed_tags=("attribution",), date="2026-06-01")
API = replace(OPEN, distribution="API", allowed_tags=("attribution", "share-alike", "partner-only"))
RESEARCH = replace(OPEN, purpose="research", distribution="NONE", lane="research", allowed_tags=tuple(TAGS[1:]))
EVENTS = [
    {"source": "F", "date": "2026-01-10", "event": "granted", "licence": "CC-BY-4.0", "evidence": "m", "holder": "f"},
    {"source": "F", "date": "2026-03-01", "event": "changed", "licence": "CC-BY-NC-4.0"},
    {"source": "F", "date": "2026-09-01", "event": "revoked"},
    {"source": "P", "date": "2026-02-01", "event": "granted", "licence": "LicenseRef-partner", "evidence": "contract 7",
     "contract": {"customer": "acme", "starts": "2026-02-01", "ends": "2026-12-31", "no_base": True, "no_mixing": True,
                  "delete_on_exit": True}},
]


def test_the_five_contract_predicates():
    log, job = ClaimsLog(EVENTS), replace(API, stage="adapter", customer="acme")
    def ask(**changes):
        return " ".join(verdict(replace(job, **changes), "P", "LicenseRef-partner", log).problems)
    assert ask() == ""
    assert "expired" in ask(date="2027-01-01") and "quarantine" in ask(date="2026-01-31")  # needs the clock
    assert "serves acme alone" in ask(customer="other")
    assert "out of the base model" in ask(stage="base")
    found = compose(job, [Part("P", "LicenseRef-partner", 1, 10), Part("M", "MIT", 1, 10)],
                    ClaimsLog([*EVENTS, {"source": "M", "date": "2026-01-01", "event": "granted", "licence": "MIT"}]))
    assert [why for _, why in found.conflicts] == ["P may not be mixed"]


def test_partner_text_needs_a_contract():
    assert "without a contract" in str(verdict(API, "P", "LicenseRef-partner").problems)


def test_notice_arrives_and_the_same_job_is_refused_the_day_after():
    log = ClaimsLog(EVENTS)
    assert verdict(replace(OPEN, date="2026-02-01"), "F", "CC-BY-4.0", log).ok
    assert not verdict(replace(OPEN, date="2026-04-01"), "F", "CC-BY-4.0", log).ok  # changed: both licences bind
    assert "revoked since 2026-09-01" in verdict(replace(OPEN, date="2026-09-01"), "F", "CC-BY-4.0", log).problems[0]


@pytest.mark.parametrize("changes, message", [
    ({"purpose": "fun"}, "purpose='fun'"), ({"distribution": "open"}, "distribution='open'"),
    ({"allowed_tags": ("free",)}, "not 'free'"), ({"allowed_tags": "attribution"}, "allowed_tags='attribution'"),
    ({"date": "tomorrow"}, "job date='tomorrow'"), ({"lane": "research"}, "research lane goes with NONE"),
    ({"allowed_tags": ("unknown",)}, "unknown in production"), ({"name": ""}, "name the job"),
])
def test_a_bad_job_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(OPEN, **changes)


def test_what_no_table_lists_is_permitted_in_no_production_plan():
    for plan in ("OPEN", "RESTRICTED", "API", "ONPREM"):
        job = replace(OPEN, distribution=plan, allowed_tags=tuple(TAGS[:-1]), purpose="research")
        assert not verdict(job, "X", "LicenseRef-mystery").ok
    assert verdict(RESEARCH, "X", "LicenseRef-mystery").ok


def test_plans_admit_less_the_further_the_weights_go():
    every = ["CC0-1.0", "MIT", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-ND-4.0", "LicenseRef-regulated", "C-UDA-1.0", ""]
    job = replace(OPEN, purpose="research", allowed_tags=tuple(TAGS[:-1]))
    found = {plan: {x for x in every if verdict(replace(job, distribution=plan), "S", x).ok}
             for plan in ("OPEN", "RESTRICTED", "API")}
    assert found["OPEN"] == {"CC0-1.0", "MIT", "CC-BY-SA-4.0"}
    assert found["RESTRICTED"] == {*found["OPEN"], "CC-BY-NC-4.0"}
    assert found["API"] == {*found["RESTRICTED"], "LicenseRef-regulated"}


def brute_force(spec, parts, log=None) -> tuple[int, set[frozenset[Part]]]:
    """Fewest tokens to remove, and every minimal conflicting set, by trying all subsets."""
    rules = policy()
    judged = {p: verdict(spec, p.source, p.licence, log) for p in parts}
    def bad(some) -> bool:
        return any(not judged[p].ok for p in some) or bool(rights.conflict(spec, [(p, judged[p]) for p in some], rules))
    subsets = [frozenset(s) for n in range(len(parts) + 1) for s in itertools.combinations(parts, n)]
    failing = {s for s in subsets if bad(s)}
    cost = min(sum(p.tokens for p in parts) - sum(p.tokens for p in s) for s in subsets if s not in failing)
    return cost, {s for s in failing if not any(s - {p} in failing for p in s)}


def test_compose_agrees_with_all_subsets():
    source, several = rng(2, "mixes"), 0
    pool = ["MIT", "CC0-1.0", "CC-BY-SA-4.0", "GPL-2.0-only", "GPL-3.0-only", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0",
            "ODbL-1.0", "CC-BY-SA-4.0 AND GPL-2.0-only", "GPL-2.0-only OR CC-BY-NC-4.0", "CC-BY-SA-4.0 OR ODbL-1.0", ""]
    grant = {"date": "2026-01-01", "event": "granted", "licence": "CC0-1.0"}
    alone = {"customer": "c", "starts": "2026-01-01", "ends": "2026-12-31", "no_mixing": True}
    log = ClaimsLog([*({"source": f"S{i}", **grant} for i in range(5)), {"source": "N", **grant, "contract": alone}])
    job = replace(OPEN, purpose="research", distribution="RESTRICTED", customer="c",
                  allowed_tags=("attribution", "share-alike", "non-commercial"))
    for _ in range(60):
        names = source.sample(["S0", "S1", "S2", "S3", "S4", "N"], 5)
        parts = [Part(name, source.choice(pool), 1, source.randint(1, 9)) for name in names]
        found, (cost, minimal) = compose(job, parts, log), brute_force(job, parts, log)
        assert sum(p.tokens for p in found.remove) == cost
        assert {frozenset(s) for s, _ in found.conflicts} <= minimal
        assert {frozenset({p}) for p, _ in found.refused} <= minimal
        assert found.ok == (not minimal)
        assert {*found.kept, *found.remove} == set(parts) and not {*found.kept} & {*found.remove}
        several += any(len(s) > 1 for s, _ in found.conflicts)
    assert several > 20


def test_a_conflict_of_three_that_no_pair_shows():
    job = replace(OPEN, allowed_tags=("attribution", "share-alike"))
    parts = [Part("A", "CC-BY-SA-4.0 OR ODbL-1.0", 1, 5), Part("B", "GPL-2.0-only OR ODbL-1.0", 1, 3),
             Part("C", "GPL-2.0-only OR CC-BY-SA-4.0", 1, 2)]
    assert all(compose(job, list(pair)).ok for pair in itertools.combinations(parts, 2))
    found = compose(job, parts)
    assert [set(s) for s, _ in found.conflicts] == [set(parts)] and found.remove == (parts[2],)
    with pytest.raises(ValueError, match=r"Removing C \[GPL-2.0-only OR CC-BY-SA-4.0\] \(2 tokens\) is the least"):
        found.check()


def test_share_alike_isolated_in_its_own_run_is_no_conflict():
    job = replace(OPEN, purpose="research", distribution="RESTRICTED",
                  allowed_tags=("attribution", "share-alike", "non-commercial"))
    sa, nc = Part("A", "CC-BY-SA-4.0", 1, 5), Part("B", "CC-BY-NC-4.0", 1, 4)
    assert compose(job, [sa]).ok and compose(job, [nc]).ok
    assert "without further restrictions" in compose(job, [sa, nc]).conflicts[0][1]
    assert compose(job, [Part("A", "CC-BY-NC-SA-4.0", 1, 5), nc]).ok  # its own licence has that restriction
    assert compose(replace(job, distribution="API"), [sa, nc]).ok  # no weights are passed on


def test_many_sources_in_one_mix():
    parts = [Part(f"S{i}", ("MIT", "CC-BY-SA-4.0", "ODbL-1.0")[i % 3], 1, 1 + i % 7) for i in range(3000)]
    found = compose(replace(OPEN, allowed_tags=("attribution", "share-alike")), parts)
    by_licence = {name: sum(p.tokens for p in parts if p.licence == name) for name in ("CC-BY-SA-4.0", "ODbL-1.0")}
    assert sum(p.tokens for p in found.remove) == min(by_licence.values()) and len(found.conflicts) == 1


def test_the_cheapest_way_out_is_not_the_smaller_of_each_pair():
    job = replace(OPEN, purpose="research", distribution="RESTRICTED",
                  allowed_tags=("attribution", "share-alike", "non-commercial"))
    hub, rest = Part("H", "CC-BY-SA-4.0", 1, 5), [Part("B", "CC-BY-NC-4.0", 1, 3), Part("C", "CC-BY-NC-SA-4.0", 1, 3)]
    found = compose(job, [hub, *rest])
    assert found.remove == (hub,) and len(found.conflicts) == 1
    greedy = {min((hub, part), key=lambda p: p.tokens) for part in rest}  # 6 tokens, where 5 are enough
    assert sum(p.tokens for p in greedy) == 6 and compose(job, [p for p in (hub, *rest) if p not in greedy]).ok


def test_every_share_alike_licence_in_one_mix():
    names = [name for name, tags in policy().tags.items() if f"share-alike:{name}" in tags and "commercial-ok" in tags]
    parts = [Part(name, name, 1, 10 + i) for i, name in enumerate(names)]
    found = compose(replace(OPEN, allowed_tags=("attribution", "share-alike")), parts)
    assert len(names) > 30 and len(found.conflicts) == len(found.remove) == len(names) - len(found.kept)
    assert all(policy().may_meet(a.licence, b.licence) for a, b in itertools.combinations(found.kept, 2))


def test_a_part_can_conflict_with_itself():
    found = compose(replace(OPEN, allowed_tags=("attribution", "share-alike")),
                    [Part("A", "CC-BY-SA-4.0 AND GPL-2.0-only", 1, 9), Part("B", "MIT", 1, 1)])
    assert [[p.source for p in parts] for parts, _ in found.conflicts] == [["A"]] and found.kept[0].source == "B"


def test_compose_nothing_raises():
    for call in (lambda: compose(OPEN, []), lambda: parts_of([])):
        with pytest.raises(ValueError, match="nothing to compose"):
            call()


def test_distribution_gates_want_evidence_and_name_duties():
    mit, regulated = policy().parse("MIT").terms, policy().parse("LicenseRef-regulated").terms
    assert distribution_gate(OPEN, mit, {}).problems == ("missing: released snapshot", "missing: attribution notice")
    passed = distribution_gate(OPEN, mit, {"released snapshot": "kept.jsonl", "attribution notice": "NOTICE"})
    assert passed.ok and any("cannot be recalled" in duty for duty in passed.duties)
    onprem = replace(API, distribution="ONPREM", allowed_tags=("regulated",))
    assert distribution_gate(onprem, regulated, {"contract": "7", "lineage report": " "}).problems == (
        "missing: lineage report", "missing: tenant separation", "missing: access log", "missing: output check")
    assert not distribution_gate(OPEN, policy().mix(["MIT", "CC-BY-NC-4.0"]), {}).ok
    assert "not promoted" in distribution_gate(RESEARCH, mit, {"attribution notice": "x"}).problems[0]


def test_research_lane_shows_in_the_name():
    assert lane_name(RESEARCH, "base") == "research-base" == lane_name(RESEARCH, "research-base")
    assert lane_name(OPEN, "base") == "base"


def test_certainty_by_hand():
    log = ClaimsLog([*EVENTS, {"source": "M", "date": "2026-01-01", "event": "granted", "licence": "MIT"}])
    parts = [Part("F", "CC-BY-4.0", 1, 10), Part("M", "MIT", 1, 20), Part("X", "MIT", 1, 30), Part("X", "", 1, 40)]
    assert certainty(parts, "2026-02-01", log) == {"verified": 10, "partial": 50, "unknown": 40}
    assert certainty(parts, "2026-09-01", log) == {"verified": 0, "partial": 50, "unknown": 50}
    assert certainty([Part("F", "", 1, 10)], "2026-02-01", log)["unknown"] == 10  # granted, but not these rows
    assert certainty(parts, "2026-02-01") == {"verified": 0, "partial": 60, "unknown": 40}
    assert certainty_gate({"verified": 1, "partial": 0, "unknown": 1}, 0.5) == ""
    assert "50.0% of the tokens" in certainty_gate({"verified": 1, "partial": 0, "unknown": 1}, 0.4)
    with pytest.raises(ValueError, match="no tokens"):
        certainty([Part("X", "MIT", 1, 0)], "2026-02-01")


def test_the_desk_sources_under_three_plans():
    """Tokens admitted fall with the strictness of the plan; what was planted as unlicensed is never kept."""
    log, rows = ClaimsLog.read(TABLE.parent / "claims_example.jsonl"), draw_rows(1000, 0)
    parts = parts_of(rows)
    job = replace(OPEN, purpose="research", allowed_tags=("attribution", "share-alike", "non-commercial"))
    before, after = (replace(job, date=day) for day in ("2026-08-31", "2026-09-01"))
    kept = {plan: {str(p) for p in compose(replace(before, distribution=plan), parts, log).kept}
            for plan in ("OPEN", "RESTRICTED", "API")}
    assert kept["OPEN"] < kept["API"] and "FORUM-3 [CC-BY-NC-4.0]" in kept["API"] - kept["OPEN"]
    assert not {"CHAT [no licence]", "FORUM-1 [no licence]", "MIRROR [NOASSERTION]"} & set().union(*kept.values())
    notice = {str(p) for p in compose(replace(after, distribution="API"), parts, log).kept}
    assert kept["API"] - notice == {"FORUM-3 [CC-BY-NC-4.0]"}
