"""Verifiers: typed code that compares an answer with trusted facts and pays 1 or 0 (rows S1-26 to S1-34).

Reinforcement learning with verifiable rewards needs r(x, y) in {0, 1} computed by code (Lambert et al. 2024,
"Tulu 3", section 6). A verifier proves only the clauses it inspects, so this file also holds the weak
verifiers that a policy learns to cheat, and a mutation test (DeMillo et al. 1978) that counts the bad answers
each lets by. Left out: everything in NOT_MEASURED; reward 1 says nothing about it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

FIELDS = ("evidence", "policy_id", "eligible")  # the order of the answer: quote first, decide last
CLAIM_FIELD = "label_created"
POLICY_ID = re.compile(r"P-[1-9][0-9]*")
ORDER_ID = re.compile(r"\bA[0-9]{5}\b")
PROMISE = re.compile(r"\b(label|refund|credit)\b.*\b(created|sent|issued|made|done)\b", re.IGNORECASE)
NOT_MEASURED = ("tone and empathy", "ambiguous photographs", "whether the rule itself is fair",
                "whether the customer was asked the right question")  # these go to the human queue

ANSWER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "evidence": {"type": ["string", "null"]},
        "policy_id": {"type": ["string", "null"], "pattern": "^P-[1-9][0-9]*$"},
        "eligible": {"type": ["boolean", "null"]},
    },
    "required": list(FIELDS),
    "additionalProperties": False,
}


# ---- parsing -----------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Decision:
    """What an answer text says. `valid`: strict JSON with exact types; an invented claim is listed in
    `claims` and does not make the JSON invalid, so that format and honesty are counted apart."""

    valid: bool
    fields: dict[str, Any]
    errors: tuple[str, ...]
    claims: tuple[str, ...]


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
    if repeated:
        raise ValueError(f"duplicate key {repeated[0]!r}")
    return dict(pairs)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def parse_answer(text: str) -> Decision:
    """Parse one answer strictly: one JSON object, no duplicate keys, exact types, no unknown key.

    `label_created` with any value but false is an invented claim. Never raises on bad answers: the errors are
    in the result. Raises ValueError when `text` is not a str.
    """
    if type(text) is not str:
        raise ValueError(f"answer must be a str, got {type(text).__name__}; decode the tokens first")
    try:
        obj = json.loads(text, object_pairs_hook=_object_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return Decision(False, {}, (f"not JSON: {error}",), ())
    if type(obj) is not dict:
        return Decision(False, {}, (f"not an object: {type(obj).__name__}",), ())
    errors = [f"missing field {name}" for name in FIELDS if name not in obj]
    if not isinstance(obj.get("evidence"), str | None):
        errors.append("evidence must be a string or null")
    policy = obj.get("policy_id")
    if policy is not None and not (type(policy) is str and POLICY_ID.fullmatch(policy)):
        errors.append('policy_id must look like "P-7" or be null')
    if obj.get("eligible") is not None and type(obj["eligible"]) is not bool:
        errors.append("eligible must be true, false or null")
    claims = (CLAIM_FIELD,) if obj.get(CLAIM_FIELD, False) is not False else ()
    errors += [f"unknown field {key}" for key in obj
               if key not in FIELDS and not (key == CLAIM_FIELD and obj[key] is True)]
    return Decision(not errors, obj, tuple(errors), claims)


# ---- trusted facts -----------------------------------------------------------------------------------------

class CustomerText(str):
    """Text that a customer wrote. A TrustedOrder refuses it in every field: this type is the trust
    boundary."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class TrustedOrder:
    """One order as the order store has it. `days` since delivery; `damage_confirmed` is None when nobody
    looked.

    Raises ValueError for a field of the wrong type and for any field that holds CustomerText.
    """

    order_id: str
    reason: str
    days: int
    damage_confirmed: bool | None = None

    def __post_init__(self) -> None:
        for name in ("order_id", "reason"):
            if type(getattr(self, name)) is not str:
                kind = type(getattr(self, name)).__name__
                raise ValueError(f"{name} must be a plain str from the order store, got {kind}")
        if type(self.days) is not int or self.days < 0:
            raise ValueError(f"days must be an int >= 0, got {self.days!r}")
        if self.damage_confirmed is not None and type(self.damage_confirmed) is not bool:
            raise ValueError(f"damage_confirmed must be true, false or None, got {self.damage_confirmed!r}: "
                             "only the order store writes it, never customer text")

    @classmethod
    def from_store(cls, row: Mapping[str, Any]) -> TrustedOrder:
        """Build from an order-store row with keys order_id, reason, days and optionally damage_confirmed."""
        missing = [key for key in ("order_id", "reason", "days") if key not in row]
        if missing:
            raise ValueError(f"order row lacks {', '.join(missing)}; give the full row of the order store")
        return cls(row["order_id"], row["reason"], row["days"], row.get("damage_confirmed"))

    @classmethod
    def from_customer_text(cls, text: str, store: Mapping[str, Mapping[str, Any]]) -> TrustedOrder:
        """The customer may name an order and nothing else: every fact, damage included, comes from `store`.

        Raises ValueError when the text names no order, several orders, or one that the store does not have.
        """
        names = sorted(set(ORDER_ID.findall(text)))
        if len(names) != 1:
            raise ValueError(f"the text must name exactly one order id like A10234, found {names}")
        if names[0] not in store:
            raise ValueError(f"order {names[0]} is not in the order store; ask the customer for the id")
        order = cls.from_store(store[names[0]])
        if order.order_id != names[0]:
            raise ValueError(f"the store files order {order.order_id!r} under {names[0]!r}; mend the store")
        return order


# ---- the lesson's verifier ---------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class VerifierResult:
    """`reward` 1 when every clause holds, else 0; `reason` names the failed clauses."""

    reward: int
    clauses: dict[str, bool]
    reason: str


def rule(reason: str, days: int, damage_confirmed: bool | None, window_days: int) -> bool:
    """Eligible: within the window, and for damage only when the store has confirmed it.

    Written apart from the desk's own rule on purpose: a checker that shares the generator's code shares its
    bugs."""
    return days <= window_days and (reason != "damaged" or damage_confirmed is True)


def _quotes_only_facts(text: str, order: TrustedOrder, window_days: int, policy_id: str) -> bool:
    """Every policy id, order id and number in the text is a trusted one, and it confirms or promises nothing
    new."""
    if any(found != policy_id for found in POLICY_ID.findall(text)):
        return False
    if any(found != order.order_id for found in ORDER_ID.findall(text)):
        return False
    numbers = re.findall(r"[0-9]+", ORDER_ID.sub(" ", POLICY_ID.sub(" ", text)))
    denied = re.search(r"\bunconfirmed\b|\bnot confirmed\b", text)
    if (denied or "confirmed" in text) and bool(denied) == (order.damage_confirmed is True):
        return False
    known = {str(n).zfill(width) for n in (order.days, window_days) for width in (1, 2)}
    return known.issuperset(numbers) and not PROMISE.search(text)


def verify_decision(answer: str | Mapping[str, Any], order: TrustedOrder, window_days: int | None,
                    policy_id: str | None, evidence: str | None = None) -> VerifierResult:
    """Check an answer (text, or an object that is written as JSON first) against the trusted order and the
    policy.

    `policy_id` None with `window_days` None: no policy covers the order, so all three fields must be null.
    `evidence` given: it must match to the character; otherwise it must be non-empty and quote only trusted
    facts.
    """
    if type(order) is not TrustedOrder:
        raise ValueError(f"order must be a TrustedOrder, got {type(order).__name__}; "
                         "use TrustedOrder.from_store")
    if (policy_id is None) != (window_days is None):
        raise ValueError(f"policy_id {policy_id!r} and window_days {window_days!r}: give both or neither")
    decision = parse_answer(answer if type(answer) is str else json.dumps(dict(answer)))
    fields = decision.fields
    said = fields.get("evidence")
    if policy_id is None:
        eligible, supported = None, "evidence" in fields and said is None
    else:
        eligible = rule(order.reason, order.days, order.damage_confirmed, window_days)
        exact = said == evidence if evidence is not None else None
        supported = type(said) is str and bool(said.strip()) and (
            exact if exact is not None else _quotes_only_facts(said, order, window_days, policy_id))
    clauses = {
        "valid": decision.valid,
        "evidence": supported,
        "policy_id": "policy_id" in fields and fields["policy_id"] == policy_id,
        "eligible": "eligible" in fields and fields["eligible"] is eligible,
        "no_invented_claim": bool(fields) and not decision.claims,
    }
    failed = [name for name, held in clauses.items() if not held]
    reason = "all clauses hold" if not failed else f"failed: {', '.join(failed)}"
    return VerifierResult(int(not failed), clauses, reason)


# ---- verifiers over cases: (answer_text, case) -> reward ---------------------------------------------------

class CaseLike(Protocol):
    """What a verifier needs to know of a case; desk/cases.py provides it."""

    answer: str
    evidence: str | None
    policy_id: str | None
    window_days: int | None
    eligible: bool | None
    reason: str
    days: int
    damage_confirmed: bool | None


Verifier = Callable[[str, CaseLike], float]
CLAUSES = ("valid", "evidence", "policy_id", "eligible", "no_invented_claim", "canonical")


def case_clauses(answer_text: str, case: CaseLike) -> dict[str, bool]:
    """The clauses of the full verifier, each judged on its own. `canonical`: the one compact spelling, in
    order."""
    decision = parse_answer(answer_text)
    fields = decision.fields
    compact = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    return {
        "valid": decision.valid,
        "evidence": "evidence" in fields and fields["evidence"] == case.evidence,
        "policy_id": "policy_id" in fields and fields["policy_id"] == case.policy_id,
        "eligible": "eligible" in fields and fields["eligible"] is case.eligible,
        "no_invented_claim": bool(fields) and not decision.claims,
        "canonical": answer_text == compact and tuple(key for key in fields if key in FIELDS) == FIELDS,
    }


def full_verifier(answer_text: str, case: CaseLike) -> float:
    """1.0 when every clause holds, which is the case only for the expected text, to the character.

    So reward and evaluation are one rule here, on different cases: nothing is left to cheat, and killing every mutant
    follows from it. `verify_decision` is the checker that knows trusted facts and no answer key."""
    return float(all(case_clauses(answer_text, case).values()))


def without_clause(*dropped: str) -> Verifier:
    """The full verifier with some clauses switched off: what does the policy do where nobody looks?
    (S1-28)"""
    unknown = sorted(set(dropped) - set(CLAUSES))
    if unknown:
        raise ValueError(f"unknown clause {unknown}; choose from {list(CLAUSES)}")

    def verifier(answer_text: str, case: CaseLike) -> float:
        clauses = case_clauses(answer_text, case)
        return float(all(held for name, held in clauses.items() if name not in dropped))

    verifier.__name__ = "without_" + "_".join(dropped)
    return verifier


def shape_only(answer_text: str, case: CaseLike) -> float:
    """Weak: a JSON object with the three fields and the right policy id. Blind to eligible, evidence,
    claims."""
    fields = parse_answer(answer_text).fields
    return float(all(name in fields for name in FIELDS) and fields["policy_id"] == case.policy_id)


def eligible_true_only(answer_text: str, case: CaseLike) -> float:
    """Weak: a JSON object that says yes."""
    return float(parse_answer(answer_text).fields.get("eligible") is True)


def text_match_p7(answer_text: str, case: CaseLike) -> float:
    """Weak: the characters P-7 occur somewhere."""
    return float("P-7" in answer_text)


def length(answer_text: str, case: CaseLike, full_marks_characters: int = 200) -> float:
    """Weak: longer is better, up to `full_marks_characters`."""
    return min(1.0, len(answer_text) / full_marks_characters)


WEAK_VERIFIERS: dict[str, Verifier] = {"shape_only": shape_only, "eligible_true_only": eligible_true_only,
                                       "text_match_p7": text_match_p7, "length": length}


# ---- mutation test -----------------------------------------------------------------------------------------

def _shift_numbers(text: str, which: int) -> str:
    """Change the window (first number) or the days (last) in an evidence line, never the policy id's
    number."""
    spans = [m.span() for m in re.finditer(r"(?<![-\w])[0-9]+", text)]
    if not spans:
        return text + " 9d"
    start, end = spans[which]
    return f"{text[:start]}{(int(text[start:end]) + 1) % 100:02d}{text[end:]}"


def _write(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


def mutants(case: CaseLike) -> list[tuple[str, str]]:
    """About thirty bad answers to one case, as (kind, text). None equals the expected answer."""
    ev, pid, ok = case.evidence, case.policy_id, case.eligible
    right = {"evidence": ev, "policy_id": pid, "eligible": ok}
    other = "P-8" if pid != "P-8" else "P-9"
    quote = ev if ev is not None else f"{case.reason} P-7 30d, {case.days:02d}d"
    body = case.answer[1:-1]
    swapped = quote.replace("unconfirmed", "confirmed") if "unconfirmed" in quote else \
        quote.replace("confirmed", "unconfirmed") if "confirmed" in quote else quote + " confirmed"
    candidates = [
        ("eligible_flipped", _write({**right, "eligible": ok is not True})),
        ("eligible_other", _write({**right, "eligible": None if ok is not None else False})),
        ("eligible_string", _write({**right, "eligible": json.dumps(ok)})),
        ("eligible_number", _write({**right, "eligible": int(bool(ok))})),
        ("policy_other", _write({**right, "policy_id": other})),
        ("policy_null_or_made_up", _write({**right, "policy_id": None if pid else "P-7"})),
        ("policy_lower_case", _write({**right, "policy_id": (pid or "P-7").lower()})),
        ("policy_spaced", _write({**right, "policy_id": " " + (pid or "P-7")})),
        ("policy_list", _write({**right, "policy_id": [pid]})),
        ("evidence_null_or_made_up", _write({**right, "evidence": None if ev is not None else quote})),
        ("evidence_empty", _write({**right, "evidence": ""})),
        ("evidence_wrong_window", _write({**right, "evidence": _shift_numbers(quote, 0)})),
        ("evidence_wrong_days", _write({**right, "evidence": _shift_numbers(quote, -1)})),
        ("evidence_confirmation_swapped", _write({**right, "evidence": swapped})),
        ("evidence_prose", _write({**right, "evidence": "as stated in our policy"})),
        ("evidence_promises_label", _write({**right, "evidence": quote + ", label created"})),
        ("invented_label", _write({**right, "label_created": True})),
        ("invented_label_string", _write({**right, "label_created": "true"})),
        ("invented_refund", _write({**right, "refund_issued": True})),
        ("extra_field", _write({**right, "note": "have a nice day"})),
        *[(f"missing_{name}", _write({k: v for k, v in right.items() if k != name})) for name in FIELDS],
        ("duplicate_eligible", "{" + f'"eligible":{json.dumps(ok is not True)},' + body + "}"),
        ("duplicate_policy", "{" + f'"policy_id":"{other}",' + body + "}"),
        ("eligible_first", _write({k: right[k] for k in ("eligible", "policy_id", "evidence")})),
        ("spaced_json", json.dumps(right)),
        ("truncated", case.answer[:-1]),
        ("trailing_text", case.answer + " A label is on its way."),
        ("two_objects", case.answer + case.answer),
        ("in_a_list", f"[{case.answer}]"),
        ("prose_before", "Sure! " + case.answer),
        ("python_literal", repr(right)),
        ("nan", case.answer.replace(f'"eligible":{json.dumps(ok)}', '"eligible":NaN')),
        ("empty", ""),
        ("always_refuse_or_approve", _write({name: None for name in FIELDS}) if ok is not None
         else _write({"evidence": quote, "policy_id": "P-7", "eligible": True})),
    ]
    return [(name, text) for name, text in candidates if text != case.answer]


@dataclass(frozen=True, slots=True)
class KillResult:
    """`rate` = killed / total; `survivors` lists (kind, how many cases it survived on), most frequent
    first."""

    rate: float
    killed: int
    total: int
    survivors: tuple[tuple[str, int], ...]


def kill_rate(verifier: Verifier, cases: Iterable[CaseLike]) -> KillResult:
    """Mutation-test a verifier. A mutant is killed when it scores strictly less than the right answer does,
    so a verifier that rejects everything kills nothing. Raises ValueError for no cases or a score that is not
    finite."""
    alive: Counter[str] = Counter()
    total = 0
    for case in cases:
        truth = float(verifier(case.answer, case))
        for name, text in mutants(case):
            score = float(verifier(text, case))
            if not (math.isfinite(score) and math.isfinite(truth)):
                raise ValueError(f"the verifier scored {score} on mutant {name}; scores must be finite")
            total += 1
            alive[name] += score >= truth
    if total == 0:
        raise ValueError("no cases: a kill rate over nothing would be empty evidence; pass at least one case")
    survivors = tuple((name, n) for name, n in alive.most_common() if n)
    killed = total - sum(alive.values())
    return KillResult(killed / total, killed, total, survivors)
