"""The claims log: a licence is a claim that can change, so it is kept as dated events and replayed to any day.

    {"source": "FORUM-1", "date": "2026-03-01", "event": "granted", "licence": "CC-BY-4.0",
     "holder": "who grants it", "evidence": "where that is on file", "contract": {...}}

    granted   from this day on, these terms          changed   other terms from this day on
    revoked   no terms from this day on              expired   the same, without anyone's notice

`granted` and `changed` state the whole terms, licence and contract: what they leave out no longer holds.
A source with no event up to that day is "unseen": it waits in quarantine until someone grants it. A later day never
rewrites an earlier one: what was admissible when a model was trained stays readable. A contract adds terms that no
SPDX id has, as five predicates, two of which need a clock (`within_window`, `must_delete`).

Left out: time zones (a day is a day), partial revocation of single rows (give them a source id of their own), and
whether a public licence can be revoked at all, which is for counsel.
"""

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lifecycle_lib.core.fingerprints import fingerprint
from lifecycle_lib.core.records import read_jsonl

EVENTS = ("granted", "changed", "revoked", "expired")
FOLLOWS = {"granted": ("unseen", "revoked", "expired"), "changed": ("granted",), "revoked": ("granted",),
           "expired": ("granted",)}  # event: the states it may follow
REQUIRED = {"source": str, "date": str, "event": str}
FIELDS = {*REQUIRED, "licence", "holder", "evidence", "contract"}


def check_date(text: Any, where: str) -> str:
    """`text` if it is a day, YYYY-MM-DD. Raises ValueError starting with `where`."""
    try:
        if len(text) == 10 and datetime.date.fromisoformat(text):
            return text
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{where}={text!r}: not a day; write YYYY-MM-DD")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What a partner's contract adds. `starts` and `ends` are its first and last day."""

    customer: str
    starts: str
    ends: str
    no_base: bool = False
    no_mixing: bool = False
    delete_on_exit: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.customer, str) or not self.customer.strip():
            raise ValueError(f"contract customer={self.customer!r}: name the one customer it serves")
        if check_date(self.starts, "contract starts") > check_date(self.ends, "contract ends"):
            raise ValueError(f"contract starts={self.starts} after ends={self.ends}; swap them")
        for field in ("no_base", "no_mixing", "delete_on_exit"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"contract {field}={getattr(self, field)!r}: write true or false")


def within_window(contract: Contract, day: str) -> bool:
    """Time window: may it be used on this day? Needs a clock."""
    return contract.starts <= day <= contract.ends


def serves(contract: Contract, customer: str) -> bool:
    """Single customer: is the model for the customer who signed?"""
    return contract.customer == customer


def stage_allowed(contract: Contract, stage: str) -> bool:
    """No base: a contract for fine-tuning keeps the text out of the base model."""
    return not (contract.no_base and stage == "base")


def mixing_allowed(contract: Contract, source: str, sources: Iterable[str]) -> bool:
    """No mixing: the source is alone in its run."""
    return not contract.no_mixing or set(sources) <= {source}


def must_delete(contract: Contract, day: str) -> bool:
    """Deletion on exit: is every checkpoint that holds it due? Needs a clock; lineage names the checkpoints."""
    return contract.delete_on_exit and day > contract.ends


@dataclass(frozen=True, slots=True)
class Claim:
    """What is known of a source on a day. `status`: unseen, granted, revoked or expired; `since` the event's day."""

    source: str
    day: str
    status: str
    since: str = ""
    licence: str = ""
    holder: str = ""
    evidence: str = ""
    contract: Contract | None = None

    @property
    def in_quarantine(self) -> bool:
        """Quarantine first: nothing of a source nobody granted goes further. The event `granted` releases it."""
        return self.status == "unseen"

    @property
    def verified(self) -> bool:
        """Granted, and the log says where that is on file."""
        return self.status == "granted" and bool(self.evidence.strip())


class ClaimsLog:
    """Events by source. Raises ValueError, naming the event, for a bad field or an event that cannot follow."""

    def __init__(self, events: Iterable[Mapping[str, Any]], where: str = "claims log") -> None:
        self.events: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
        self.rows = [dict(event) for event in events]
        for number, event in enumerate(self.rows, start=1):
            _check(event, f"{where}:{number}")
        for _, number in sorted((event["date"], i) for i, event in enumerate(self.rows)):  # same day: as written
            event = self.rows[number]
            own = self.events.setdefault(event["source"], [])
            before = {"changed": "granted"}.get(own[-1][1], own[-1][1]) if own else "unseen"
            if before not in FOLLOWS[event["event"]]:
                raise ValueError(f"{where}:{number + 1}: {event['source']} {event['event']} on {event['date']}, when "
                                 f"it was {before}; that event may follow {' or '.join(FOLLOWS[event['event']])}")
            own.append((event["date"], event["event"], event))
        self.fingerprint = fingerprint(self.rows)

    @classmethod
    def read(cls, path: str | Path) -> "ClaimsLog":
        """A JSONL file, one event a line; see the top of this file."""
        return cls(read_jsonl(path, REQUIRED), str(path))

    def rights_on(self, source: str, day: str) -> Claim:
        """The claim on `day`: the events up to it, replayed. A contract that has run out reads "expired"."""
        check_date(day, "day")
        claim = Claim(source, day, "unseen")
        for date, event, row in self.events.get(source, ()):
            if date > day:
                break
            if event in ("revoked", "expired"):
                claim = Claim(source, day, event, date, claim.licence, claim.holder, row.get("evidence", ""),
                              claim.contract)
                continue
            contract = Contract(**row["contract"]) if row.get("contract") else None
            claim = Claim(source, day, "granted", date, row["licence"], row.get("holder", claim.holder),
                          row.get("evidence", ""), contract)
        if claim.status == "granted" and claim.contract and day > claim.contract.ends:
            return Claim(source, day, "expired", claim.contract.ends, claim.licence, claim.holder, claim.evidence,
                         claim.contract)
        return claim


def contract_problems(contract: Contract, *, day: str, customer: str, stage: str) -> list[str]:
    """Which of the contract's terms a job breaks on its own; mixing is for the composer, which sees all sources."""
    problems = []
    if not within_window(contract, day):
        problems.append(f"contract runs {contract.starts} to {contract.ends}, the job is of {day}")
    if not serves(contract, customer):
        problems.append(f"contract serves {contract.customer} alone, the job is for {customer or 'nobody named'}")
    if not stage_allowed(contract, stage):
        problems.append("contract keeps it out of the base model")
    return problems


def _check(event: dict[str, Any], where: str) -> None:
    for field in REQUIRED:
        if not isinstance(event.get(field), str) or not event[field].strip():
            raise ValueError(f"{where}: {field}={event.get(field)!r}; give it as text")
    if extra := sorted(set(event) - FIELDS):
        raise ValueError(f"{where}: {extra[0]!r} is no field of an event; use {', '.join(sorted(FIELDS))}")
    check_date(event["date"], f"{where}: date")
    if event["event"] not in EVENTS:
        raise ValueError(f"{where}: event={event['event']!r}; use one of {', '.join(EVENTS)}")
    if event["event"] in ("granted", "changed") and not event.get("licence"):
        raise ValueError(f"{where}: a {event['event']} claim without licence; give the SPDX expression")
    for field in ("licence", "holder", "evidence"):
        if not isinstance(event.get(field, ""), str):
            raise ValueError(f"{where}: {field}={event[field]!r}; give it as text")
    if (contract := event.get("contract")) is not None:
        known = {f.name for f in fields(Contract)}
        if not isinstance(contract, dict) or not {"customer", "starts", "ends"} <= set(contract) <= known:
            raise ValueError(f"{where}: contract={contract!r}; give customer, starts, ends, and of no_base, no_mixing, "
                             "delete_on_exit what applies")
        try:
            Contract(**contract)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
