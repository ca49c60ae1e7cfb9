"""Which checkpoints hold this source? Answered from the run cards of the store (rows S3-8.11, S3-2.29).

The convention: a stage that reads text returns from its `make` the card field

    sources: {source_id: {"rows": n, "sha256": ..., "licence": SPDX expression}}       made by sources_of(rows)

and a stage that reads none but changes weights (quantising, merging) returns `sources: {}`. A study on
`small_stage`, whose `measure` fills the card's `measured`, may put it there: `measured["sources"]` counts too.
Sources pass to every descendant: an adapter, a quantised child, a distilled student of a checkpoint hold what it
holds. An artifact without the field, or with an ancestor without it, is "not recorded": never "does not hold".

Left out: how much of a source survives in the weights (membership and exposure are measured elsewhere), and text
that entered through generated answers of another model, unless the stage names that model's sources too.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

from lifecycle_lib.core.store import Artifact, Store
from lifecycle_lib.corpus.licences import UNKNOWN, Policy, Terms, join, policy, text_of
from lifecycle_lib.corpus.rights import RESEARCH
from lifecycle_lib.corpus.rights_log import ClaimsLog, must_delete, serves

HOLDS, CLEAN, NOT_RECORDED = "holds", "does not hold", "not recorded"
ENTRY = {"rows", "sha256", "licence"}  # of a source, in a card


def sources_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The card field `sources` for the rows a stage trains on: {source: {"rows", "sha256", "licence"}}, sorted.

    `sha256` is over the sorted pairs (text, licence) of the source's rows, so their order is free and nothing else
    is. Rows of one source under several licences are bound by all of them: "A AND B". A row without a licence
    counts as NOASSERTION. Raises ValueError for no rows, and for a row without a text or a source.
    """
    digests: dict[str, list[bytes]] = {}
    licences: dict[str, set[str]] = {}
    for number, row in enumerate(rows, start=1):
        for field in ("text", "source"):
            if not isinstance(row.get(field), str) or (field == "source" and not row[field].strip()):
                raise ValueError(f"row {number}: {field}={row.get(field)!r}; give every training row a {field} (text), "
                                 "or quarantine it")
        licence = row.get("licence") or "NOASSERTION"
        digests.setdefault(row["source"], []).append(hashlib.sha256(f"{licence}\n{row['text']}".encode(
            "utf-8", "surrogatepass")).digest())
        licences.setdefault(row["source"], set()).add(licence)
    if not digests:
        raise ValueError("no rows: a stage that reads no text returns sources={} itself; check the rows given")
    return {source: {"rows": len(own), "sha256": hashlib.sha256(b"".join(sorted(own))).hexdigest(),
                     "licence": " AND ".join(name if len(licences[source]) == 1 else f"({name})"
                                             for name in sorted(licences[source]))}
            for source, own in sorted(digests.items())}


def recorded(card: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The sources a card records for its own stage; {} if it read none, None if it does not say. A `sources` field of
    another shape (a study's own measurement of that name) says nothing."""
    measured = card.get("measured")
    for place in (card, measured if isinstance(measured, Mapping) else {}):
        own = place.get("sources")
        if isinstance(own, Mapping) and all(isinstance(e, Mapping) and ENTRY <= set(e) for e in own.values()):
            return dict(own)
    return None


@dataclass(frozen=True, slots=True)
class Graph:
    """The cards of a store at one moment, parents before children."""

    artifacts: dict[str, Artifact]

    @classmethod
    def of(cls, store: Store) -> "Graph":
        """Reads every card once; the files are not summed (`Store.verify` does that)."""
        found = {a.fingerprint: a for a in store.list()}
        order = TopologicalSorter({fp: [p for p in a.card["parents"].values() if p in found]
                                   for fp, a in found.items()})
        return cls({fp: found[fp] for fp in order.static_order()})

    def ancestry(self, fingerprint: str) -> dict[str, Artifact | None]:
        """The artifact and all it was made from, ancestors first; None for a parent that is not in the store."""
        seen: dict[str, Artifact | None] = {}

        def visit(fp: str) -> None:
            if fp in seen:
                return
            own = self.artifacts.get(fp)
            for parent in sorted(own.card["parents"].values()) if own else ():
                visit(parent)
            seen[fp] = own

        visit(fingerprint)
        return seen

    def holds(self, source: str) -> dict[str, str]:
        """HOLDS, CLEAN or NOT_RECORDED for every artifact, parents before children."""
        state: dict[str, str] = {}
        for fp, artifact in self.artifacts.items():
            own = recorded(artifact.card)
            parents = [state.get(p, NOT_RECORDED) for p in artifact.card["parents"].values()]
            if HOLDS in parents or source in (own or {}):
                state[fp] = HOLDS
            else:
                state[fp] = NOT_RECORDED if own is None or NOT_RECORDED in parents else CLEAN
        return state


def sources_of_model(store: Store, artifact: Artifact) -> dict[str, Any]:
    """Query 1, what went into a model: {"sources": {source: [{stage, fingerprint, created, rows, sha256, licence}]},
    "not_recorded": [stage names]}, over its whole ancestry. The list is complete only if `not_recorded` is empty."""
    sources: dict[str, list[dict[str, Any]]] = {}
    missing = []
    for fp, stage in Graph.of(store).ancestry(artifact.fingerprint).items():
        own = recorded(stage.card) if stage else None
        if own is None:
            missing.append(f"{stage.name}-{fp}" if stage else f"(missing)-{fp}")
        for source, entry in (own or {}).items():
            sources.setdefault(source, []).append({"stage": stage.name, "fingerprint": fp,
                                                   "created": stage.card["created"], **entry})
    return {"sources": dict(sorted(sources.items())), "not_recorded": missing}


def models_hit(store: Store, source: str) -> dict[str, list[Artifact]]:
    """Query 3, whom a revocation of `source` hits: every artifact of the store under HOLDS, CLEAN or NOT_RECORDED,
    parents first. Raises ValueError for an empty source, and for a store in which nothing records sources."""
    if not source.strip():
        raise ValueError(f"source {source!r}: give a source id as the cards name it")
    graph = Graph.of(store)
    known = sorted({s for a in graph.artifacts.values() for s in (recorded(a.card) or {})})
    if not known:
        raise ValueError(f"{store.root}: no artifact records its sources, so it cannot say who holds {source!r}; "
                         "return sources_of(rows) from the stages and build again")
    state = graph.holds(source)
    return {kind: [graph.artifacts[fp] for fp, own in state.items() if own == kind]
            for kind in (HOLDS, CLEAN, NOT_RECORDED)}


def terms_of_model(store: Store, artifact: Artifact, rules: Policy | None = None) -> Terms:
    """The rights tag of a checkpoint, adapter or merge: the join of all that went in; unknown for what is not
    recorded, and for a model of no source at all (its rights are nobody's knowledge)."""
    found, rules = sources_of_model(store, artifact), rules or policy()
    terms = [rules.parse(use["licence"]).terms for uses in found["sources"].values() for use in uses]
    return join(*terms, *([UNKNOWN] if found["not_recorded"] or not terms else []))


def terms_at_training(store: Store, artifact: Artifact, log: ClaimsLog | None = None,
                      rules: Policy | None = None) -> list[dict[str, Any]]:
    """Query 2, under which terms a model was trained: one entry a stage and source, oldest first, with the licence on
    the rows, its terms, and what the log claimed on the day the stage was built ("" without a log)."""
    rules, entries = rules or policy(), []
    for source, uses in sources_of_model(store, artifact)["sources"].items():
        for use in uses:
            day = use["created"][:10]
            claim = log.rights_on(source, day) if log else None
            entries.append({"source": source, "stage": use["stage"], "fingerprint": use["fingerprint"], "day": day,
                            "rows": use["rows"], "licence": use["licence"],
                            "terms": text_of(rules.parse(use["licence"]).terms),
                            "claim": claim.status if claim else "", "claimed_licence": claim.licence if claim else ""})
    return sorted(entries, key=lambda e: (e["day"], e["stage"], e["source"]))


def customer_report(store: Store, artifact: Artifact, customer: str, log: ClaimsLog, date: str,
                    rules: Policy | None = None) -> dict[str, Any]:
    """Query 4, what a customer may see of a model: its ancestry, sources and terms at training, and what has changed.

    `no_longer_granted`: sources whose claim on `date` is not "granted"; `delete_due`: those a contract says must be
    deleted by now; `of_other_customers`: sources under another customer's contract, empty if tenants are separate. The
    report is complete only if `not_recorded` is empty. Raises ValueError for an empty customer or a bad date.
    """
    if not customer.strip():
        raise ValueError(f"customer {customer!r}: name whom the report is for")
    found = sources_of_model(store, artifact)
    now = {source: log.rights_on(source, date) for source in found["sources"]}
    ancestry = Graph.of(store).ancestry(artifact.fingerprint)
    return {
        "model": f"{artifact.name}-{artifact.fingerprint}", "customer": customer, "date": date,
        "ancestry": [{"stage": a.name, "fingerprint": fp, "created": a.card["created"]}
                     for fp, a in ancestry.items() if a],
        "terms": text_of(terms_of_model(store, artifact, rules)),
        "sources": terms_at_training(store, artifact, log, rules), "not_recorded": found["not_recorded"],
        "no_longer_granted": [{"source": s, "status": c.status, "since": c.since} for s, c in now.items()
                              if c.status != "granted"],
        "delete_due": [s for s, c in now.items() if c.contract and must_delete(c.contract, date)],
        "of_other_customers": [s for s, c in now.items() if c.contract and not serves(c.contract, customer)],
    }


def promotion_problems(store: Store, artifact: Artifact, rules: Policy | None = None) -> list[str]:
    """Why a checkpoint may not be promoted on its rights; [] if it may: a research ancestor (the lane's name is on it),
    sources that are not recorded, and unknown rights with no other choice."""
    ancestry = Graph.of(store).ancestry(artifact.fingerprint)
    problems = [f"{a.name}-{fp} is of the research lane" for fp, a in ancestry.items()
                if a and a.name.startswith(RESEARCH)]
    found = sources_of_model(store, artifact)
    problems += [f"{name} does not record its sources" for name in found["not_recorded"]]
    if all("unknown" in option for option in terms_of_model(store, artifact, rules)):
        problems.append("its rights are unknown")
    return problems


def has_weights(artifact: Artifact) -> bool:
    """Does it hold weights, or only what was measured or built beside them?"""
    return any(name.endswith(".safetensors") for name in artifact.card["files"])


def delete_plan(store: Store, source: str) -> dict[str, Any]:
    """What a deletion of `source` must touch, in the order of the work, and what rebuilding it cost the last time.

    {"source", "steps": [{name, fingerprint, action, weights, cpu_s, cost_is_a_floor}], "cpu_s", "unsettled"}.
    `action`: "retrain without it" where the stage read the source itself, "rebuild" for what descends from there.
    cpu_s is of the card, one process; `cost_is_a_floor` when an attempt was killed unclocked. `unsettled` names the
    artifacts that do not say what they hold: a plan is complete only when it is empty.
    """
    hit = models_hit(store, source)
    steps = [{"name": a.name, "fingerprint": a.fingerprint,
              "action": "retrain without it" if source in (recorded(a.card) or {}) else "rebuild",
              "weights": has_weights(a), "cpu_s": a.card["cpu_s"],
              "cost_is_a_floor": a.card["attempts_clocked"] < a.card["attempts"]} for a in hit[HOLDS]]
    return {"source": source, "steps": steps, "cpu_s": sum(step["cpu_s"] for step in steps),
            "unsettled": [f"{a.name}-{a.fingerprint}" for a in hit[NOT_RECORDED]]}
