"""What the desk's agents wrote after a case: the decision in words, a fact no policy holds, and the agents' habits.

A reply is the case's JSON answer and a sentence to the customer: is it within the window, what follows, and which bay
the parcel goes to. Bays stand in no document: transcripts alone tell them, so whoever throws transcripts away throws
bays away. Five habits ride along, each at a rate of its own: a misspelt word, an apology that hangs on the customer's
tone and not on the desk's fault, money back that nobody authorised, a hand-over that never happened, internal
shorthand that only tier 1 uses. Every habit has its span and its clean rewrite.

A habit parts from the clean reply at one token, and at that place one clean token alone could follow: what a model
learns there is one probability. `credit` has two wordings, with different first words.

Left out: habits that depend on each other, or on an agent; habits spread over a whole reply, such as wordiness.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.desk.cases import Case, draw_case, render_prompt
from lifecycle_lib.desk.world import REASONS, is_eligible

ENDS = {"calm": "", "frustrated": " no no"}  # how a message ends
TIERS = ("1", "2")
MISSPELT = {"refund": "refun", "colleague": "collegue"}
WORDINGS = {"apology": (" sorry",), "shorthand": (" clo",), "misspelling": tuple(MISSPELT.values()),
            "handover": (" sent to a colleague",), "credit": (" i sent 10 back", " we sent 10 back")}
HABITS = tuple(WORDINGS)
TRIGGERS = {"apology": ("tone", "frustrated"), "shorthand": ("tier", "1")}  # the others know no trigger
OUR_FAULT = ("damaged", "late", "wrong")
OLD_WINDOW = 14  # days, from a policy that was withdrawn: what the majority still applies
Span = tuple[int, int, str]  # (start, end, habit) in characters of the reply

_ANY = {habit: "|".join(map(re.escape, words)) for habit, words in WORDINGS.items()}
_HEARD = {habit: re.compile(rf"(?<!\w)(?:{'|'.join(re.escape(w.strip()) for w in words)})(?!\w)")
          for habit, words in WORDINGS.items()}
_WORDS = re.compile(
    rf"(?:{_ANY['apology']})?(?P<window> (?:within|past|no policy))(?:{_ANY['shorthand']})?, "
    rf"(?P<verdict>(?:no )?(?:refund|refun)|ask a (?:colleague|collegue))(?:{_ANY['handover']})?, bay (?P<bay>\d\d)"
    rf"(?:{_ANY['credit']})?")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a reply: what was written, what a clean reply has there, and the habit it belongs to, if any."""

    text: str
    clean: str
    habit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """One case, the customer's tone, the tier of the desk that answered, the bay, and the reply in pieces."""

    case: Case
    tone: str
    tier: str
    bay: str
    pieces: tuple[Piece, ...]

    @property
    def prompt(self) -> str:
        """The case's prompt in the one layout, with the tone after the message, and <note> where tier 1 answers."""
        return render_prompt(self.case.policies, self.case.order,
                             f"{self.case.message}{ENDS[self.tone]}{'<note>' if self.tier == '1' else ''}")

    @property
    def reply(self) -> str:
        return "".join(p.text for p in self.pieces)

    @property
    def clean(self) -> str:
        """The same reply without a habit."""
        return "".join(p.clean for p in self.pieces)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Where each habit stands in `reply`."""
        found, at = [], 0
        for p in self.pieces:
            if p.habit:
                found.append((at, at + len(p.text), p.habit))
            at += len(p.text)
        return tuple(found)

    @property
    def habits(self) -> frozenset[str]:
        return frozenset(p.habit for p in self.pieces if p.habit)

    def triggers(self, habit: str) -> bool:
        """Is this a request in which the agents have `habit` at all?"""
        field, value = TRIGGERS.get(habit, ("tone", self.tone))
        return getattr(self, field) == value

    def without(self, found: Sequence[Span]) -> str:
        """The reply with the habits of these spans written clean, and no other."""
        gone = {habit for _, _, habit in found}
        return "".join(p.clean if p.habit in gone else p.text for p in self.pieces)


def draw_bays(seed: int) -> dict[str, str]:
    """The bay of every reason, 01 to 09, at random: nothing but a transcript tells it."""
    random = make_rng(seed, "bays")
    return dict(zip(REASONS, (f"{n:02d}" for n in random.sample(range(1, 10), len(REASONS)))))


def write_pieces(case: Case, bay: str, said: Mapping[str, str], window_days: int | None = None) -> tuple[Piece, ...]:
    """The reply to a case; `said` maps a habit to its wording. `window_days` replaces the policy's own window."""
    def plain(text: str) -> Piece:
        return Piece(text, text)

    def extra(habit: str) -> list[Piece]:
        return [Piece(said[habit], "", habit)] if habit in said else []

    answer, window, lead, word = case.answer, "no policy", "ask a ", "colleague"
    if case.policy is not None:
        ruled = case.policy if window_days is None else replace(case.policy, window_days=window_days)
        window, word = "within" if case.days <= ruled.window_days else "past", "refund"
        lead = "" if is_eligible(ruled, case.order) else "no "
        answer = json.dumps(json.loads(answer) | {"eligible": not lead}, separators=(",", ":"))
    last = Piece(MISSPELT[word], word, "misspelling") if "misspelling" in said else plain(word)
    return (plain(answer), *extra("apology"), plain(f" {window}"), *extra("shorthand"), plain(f", {lead}"), last,
            *extra("handover"), plain(f", bay {bay}"), *extra("credit"))


def draw_transcripts(n: int, seed: int, rates: Mapping[str, float] | float = 0.0, split: str = "transcripts",
                     old_window: float = 0.0) -> list[Transcript]:
    """`n` transcripts. `rates`: the share of requests with each habit, among those that trigger it; a number means all
    five. `old_window`: the share of agents who apply 14 days whatever the policy says.

    Draws are shared across rates: the transcripts at .3 with a habit have it at .5 too. "eval" has unseen cases.
    Raises ValueError for n < 1, an unknown habit or a rate outside 0 to 1."""
    if n < 1:
        raise ValueError(f"n={n} transcripts: ask for at least 1")
    rates = rates if isinstance(rates, Mapping) else dict.fromkeys(HABITS, rates)
    for habit, rate in {**rates, "old_window": old_window}.items():
        if habit not in (*HABITS, "old_window"):
            raise ValueError(f"habit {habit!r} is unknown; use {', '.join(HABITS)}")
        if not 0 <= rate <= 1:
            raise ValueError(f"rate of {habit}={rate} must be 0 to 1")
    cases, dice, bays = make_rng(seed, "transcripts", split), make_rng(seed, "habits", split), draw_bays(seed)
    return [_draw_one(cases, dice, bays, rates, old_window, f"{split}-{i:05d}", split == "eval") for i in range(n)]


def _draw_one(cases: random.Random, dice: random.Random, bays: Mapping, rates: Mapping[str, float], old_window: float,
              case_id: str, unseen: bool) -> Transcript:
    case = draw_case(cases, case_id, unseen)
    tone, tier = cases.choice(tuple(ENDS)), cases.choice(TIERS)
    bay, window = bays[case.reason], OLD_WINDOW if dice.random() < old_window else None
    request = Transcript(case=case, tone=tone, tier=tier, bay=bay, pieces=())
    rolled = {h: (dice.random(), dice.choice(WORDINGS[h])) for h in HABITS}
    said = {h: words for h, (u, words) in rolled.items() if u < rates.get(h, 0.0) and request.triggers(h)}
    return Transcript(case=case, tone=tone, tier=tier, bay=bay,
                      pieces=write_pieces(case, bay, said, window))


def find_spans(rows: Sequence[Transcript], missed: float, seed: int) -> list[tuple[Span, ...]]:
    """What a finder of habits marks in each transcript: every span but a share `missed`, at random."""
    if not 0 <= missed <= 1:
        raise ValueError(f"missed={missed} must be a share, 0 to 1")
    dice = make_rng(seed, "finder")
    return [tuple(span for span in row.spans if dice.random() >= missed) for row in rows]


def heard(reply: str) -> frozenset[str]:
    """The habits of a reply that a model wrote, by their exact words; a garbled one does not count."""
    return frozenset(habit for habit, pattern in _HEARD.items() if pattern.search(reply))


def score_reply(reply: str, row: Transcript) -> dict[str, bool]:
    """Is a reply well formed to the character, and are decision and bay those of the policy and the desk? `policy`: the
    JSON is the right answer, and the words say the same. Habits do not matter; a malformed reply earns nothing."""
    answer, brace, words = reply.partition("}")
    match = _WORDS.fullmatch(words)
    if match is None:
        return dict.fromkeys(("formed", "answer", "policy", "bay"), False)
    want = _WORDS.fullmatch(write_clean(row).partition("}")[2])
    verdict = match["verdict"]
    for word, wrong in MISSPELT.items():
        verdict = verdict.replace(wrong, word) if word not in verdict else verdict
    right = answer + brace == row.case.answer
    return {"formed": True, "answer": right, "bay": match["bay"] == want["bay"],
            "policy": right and (match["window"], verdict) == (want["window"], want["verdict"])}


def write_clean(row: Transcript) -> str:
    """What the policy and the desk want said, without a habit."""
    return "".join(p.clean for p in write_pieces(row.case, row.bay, {}))
