"""The failure router: from a symptom to the layer that owns it, and to the smallest next action (S1-57 to
S1-67).

Most product incidents are not training incidents. The router therefore keeps weights for last: it proposes to
change them only after `k` logged failures of one checkpoint whose context was right. `k` comes from
`failures_needed`. Left out: finding the symptom in free text; a person or a check names it, and the trace's
own fields confirm it.

    python -m lifecycle_lib.judge.trace_router traces.jsonl
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifecycle_lib.core.records import check_fields, read_jsonl

INVESTIGATE = "investigate with a labelled trace"
CONTRACT = "tighten the output contract and rerun format evals"

# symptom -> (owner, next action, may the owner end up changing weights?)
ROUTES: dict[str, tuple[str, str, bool]] = {
    "stale policy": ("retrieval index", "refresh the document and rerun policy evals", False),
    "missing policy_id": ("prompt contract or SFT data", CONTRACT, True),
    "invalid schema": ("prompt contract or SFT data", CONTRACT, True),
    "promised label": ("preference data and safety eval",
                       "block on the tool ledger, then review the pairs and rerun safety evals", True),
    "slow first token": ("inference serving", "profile queue and KV-cache pressure", False),
    "release regression": ("evaluation gate and rollback", "roll back and rerun the release gate", False),
    "wrong decision": ("SFT data or checkpoint choice",
                       "check the evidence shown, then rerun policy evals", True),
}
# the fields that show whether a reported symptom is really there
MEASURED_BY: dict[str, tuple[str, ...]] = {
    "stale policy": ("policy_version_shown", "policy_version_current"),
    "missing policy_id": ("missing_fields",),
    "invalid schema": ("schema_valid",),
    "promised label": ("claimed_effects", "tool_ledger"),
    "slow first token": ("ttft_ms", "ttft_limit_ms"),
    "release regression": ("previous_passes", "candidate_passes"),
    "wrong decision": ("decision_correct",),
}
REQUIRED = {"trace_id": str, "symptom": str}
OPTIONAL: dict[str, Any] = {
    "checkpoint": str, "policy_version_shown": str, "policy_version_current": str, "missing_fields": list,
    "schema_valid": bool, "claimed_effects": list, "tool_ledger": list,
    "ttft_ms": float, "ttft_limit_ms": float, "previous_passes": bool, "candidate_passes": bool,
    "decision_correct": bool, "note": str,
}


def _key(symptom: str) -> str:
    if not isinstance(symptom, str) or not symptom.strip():
        raise ValueError(f"symptom {symptom!r} is empty; describe what was seen, for example 'stale policy'")
    return " ".join(symptom.lower().split())


def owner_for_failure(symptom: str) -> str:
    """The layer that owns a symptom; a symptom that nobody has mapped goes to a labelled trace."""
    key = _key(symptom)
    return ROUTES[key][0] if key in ROUTES else INVESTIGATE


def action_for(trace: Mapping[str, Any] | str) -> str:
    """The next action for a trace (its `symptom` field), or for a symptom given as text."""
    symptom = trace if isinstance(trace, str) else trace.get("symptom", "")
    key = _key(symptom)
    return ROUTES[key][1] if key in ROUTES else INVESTIGATE


def failures_needed(background: float = 0.5, false_alarm: float = 0.05) -> int:
    """The k of "k failures in a row": smallest k with background**k <= false_alarm.

    `background` is how often such a request fails although the weights are fine (0.5 when nothing is known).
    """
    if not 0 < background < 1 or not 0 < false_alarm < 1:
        raise ValueError(f"background={background} and false_alarm={false_alarm} must lie between 0 and 1")
    return max(1, math.ceil(math.log(false_alarm) / math.log(background) - 1e-9))


@dataclass(frozen=True, slots=True)
class Routing:
    """Where one trace goes. `confidence`: "measured" (the trace's own fields show the symptom), "reported"
    (only its label does) or "none" (unknown symptom, or the fields contradict it). `evidence`: the facts that
    this rests on."""

    owner: str
    action: str
    confidence: str
    evidence: tuple[str, ...]
    changes_weights: bool


def check_trace(trace: Mapping[str, Any], where: str = "trace") -> None:
    """Raise ValueError, beginning with `where`, for a trace that lacks a field or has an unknown or mistyped
    one."""
    if not isinstance(trace, Mapping):
        raise ValueError(f"{where}: a {type(trace).__name__} where an object is needed; write it as {{...}}")
    check_fields(trace, REQUIRED, where)
    check_fields(trace, {name: OPTIONAL[name] for name in OPTIONAL if name in trace}, where)
    for name in ("trace_id", "symptom"):
        if not trace[name].strip():
            raise ValueError(f"{where}: field {name!r} is empty; fill it in")
    unknown = sorted(set(trace) - set(REQUIRED) - set(OPTIONAL))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; use {', '.join([*REQUIRED, *OPTIONAL])}")
    for name in ("ttft_ms", "ttft_limit_ms"):
        if name in trace and not (math.isfinite(trace[name]) and trace[name] >= 0):
            raise ValueError(f"{where}: field {name!r} is {trace[name]}; give milliseconds, 0 or more")


def _shown(trace: Mapping[str, Any], symptom: str) -> bool | None:
    """Does the trace itself show the symptom? None when the fields that would tell were not recorded."""
    if symptom not in MEASURED_BY or any(name not in trace for name in MEASURED_BY[symptom]):
        return None
    values = [trace[name] for name in MEASURED_BY[symptom]]
    match symptom:
        case "stale policy":
            return values[0] != values[1]
        case "missing policy_id":
            return "policy_id" in values[0]
        case "promised label":
            return any(effect not in values[1] for effect in values[0])
        case "slow first token":
            return values[0] > values[1]
        case "release regression":
            return values[0] and not values[1]
    return not values[0]  # schema_valid, decision_correct


def _context_was_right(trace: Mapping[str, Any]) -> bool:
    return _shown(trace, "stale policy") is False


def route(trace: Mapping[str, Any], history: Iterable[Mapping[str, Any]] = (),
          k: int | None = None) -> Routing:
    """Route one trace. `history`: earlier traces; `k`: logged failures (this one included) before weights may
    change.

    A failure counts toward k when it has the same symptom, measured, on the same checkpoint, and the policy
    version shown was the current one. Raises ValueError for a malformed trace, or k < 1.
    """
    k = failures_needed() if k is None else k
    if k < 1:
        raise ValueError(f"k={k} must be at least 1: no failure, no weight change")
    check_trace(trace)
    symptom = _key(trace["symptom"])
    if symptom not in ROUTES:
        return Routing(INVESTIGATE, INVESTIGATE, "none", (f"no route for symptom {symptom!r}",), False)
    owner, action, may_change = ROUTES[symptom]
    shown = _shown(trace, symptom)
    facts = tuple(f"{name}={trace[name]!r}" for name in MEASURED_BY[symptom] if name in trace)
    if shown is False:
        facts = (f"the trace contradicts {symptom!r}", *facts)
        return Routing(INVESTIGATE, INVESTIGATE, "none", facts, False)
    if shown is None:
        lacking = [name for name in MEASURED_BY[symptom] if name not in trace]
        return Routing(owner, action, "reported", (*facts, f"not recorded: {', '.join(lacking)}"), False)
    if not may_change:
        return Routing(owner, action, "measured", facts, False)
    counted = set()
    for past in (*history, trace):
        check_trace(past)
        if (_key(past["symptom"]) == symptom and _shown(past, symptom) and _context_was_right(past)
                and "checkpoint" in past and past["checkpoint"] == trace.get("checkpoint")):
            counted.add(past["trace_id"])
    allowed = len(counted) >= k and trace["trace_id"] in counted
    facts = (*facts, f"{len(counted)} of {k} failures with correct evidence")
    return Routing(owner, action, "measured", facts, allowed)


def route_file(path: str | Path, k: int | None = None) -> list[Routing]:
    """Route every trace of a JSONL file; each sees the ones above it. Errors start with FILE:LINE."""
    traces = read_jsonl(path, REQUIRED)
    first_seen: dict[str, int] = {}
    for line, trace in enumerate(traces, start=1):
        check_trace(trace, f"{path}:{line}")
        if trace["trace_id"] in first_seen:
            raise ValueError(f"{path}:{line}: trace_id {trace['trace_id']!r} already stands on line "
                             f"{first_seen[trace['trace_id']]}; a failure counts once, give each its own id")
        first_seen[trace["trace_id"]] = line
    return [route(trace, traces[:i], k) for i, trace in enumerate(traces)]


def main(argv: Sequence[str]) -> int:
    """Print one line a trace. Returns 2 when the arguments or the file are wrong."""
    if len(argv) != 1:
        print("usage: python -m lifecycle_lib.judge.trace_router traces.jsonl", file=sys.stderr)
        return 2
    try:
        routings = route_file(argv[0])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for line, r in enumerate(routings, start=1):
        weights = "weights may change" if r.changes_weights else "weights stay"
        print(f"{line}: {r.owner} -> {r.action} ({r.confidence}; {weights}; {'; '.join(r.evidence)})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
