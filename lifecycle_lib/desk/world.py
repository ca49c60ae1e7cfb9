"""The returns desk: orders, policies and customer messages, made from one seed.

The desk serves many shops. Each shop numbers its own policies, so `P-7` means "damaged, 30 days"
in the running example and something else next door: an answer has to be read from the policy
lines in front of the model, never from memory.

Everything here is generated, by code in this folder, from a seed; no row copies real text.
"""

import random
from dataclasses import dataclass

WORLD_VERSION = "1"
LICENCE = "CC-BY-4.0"
PROVENANCE = {"source": "lifecycle_lib.desk (generated)", "licence": LICENCE, "world_version": WORLD_VERSION}

REASONS = ("damaged", "late", "unwanted", "wrong")
ITEMS = ("mug", "lamp", "chair", "kettle", "jacket", "clock", "radio", "vase", "rug", "pan")
POLICY_IDS = tuple(f"P-{i}" for i in range(1, 10))
DAYS = range(1, 90)
WINDOWS = range(5, 90)

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<policy>", "<order>", "<user>", "<bot>", "<note>")

PHRASES = {
    "damaged": ("my {item} arrived cracked", "the {item} came broken", "the {item} is smashed",
                "there is a crack in my {item}", "my {item} was dented on arrival", "the {item} came in pieces"),
    "late": ("my {item} came too late", "the {item} missed the date", "the {item} took weeks to come",
             "my {item} was delayed", "the {item} came after the party", "the {item} is overdue"),
    "unwanted": ("i changed my mind about the {item}", "i do not want the {item}", "i no longer need my {item}",
                 "the {item} is not for me", "i regret buying the {item}", "please take my {item} back"),
    "wrong": ("you sent a different {item}", "this is not the {item} i ordered", "my {item} is the wrong colour",
              "i got someone else's {item}", "the {item} is the wrong size", "you swapped my {item}"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One line of a shop's policy book: `reason` is covered by `policy_id` for `window_days` days."""

    reason: str
    policy_id: str
    window_days: int

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise ValueError(f"reason {self.reason!r} is unknown; use one of {', '.join(REASONS)}")
        if self.policy_id not in POLICY_IDS:
            raise ValueError(f"policy_id {self.policy_id!r} is unknown; use P-1 to P-9")
        if not 0 <= self.window_days <= 99:
            raise ValueError(f"window_days={self.window_days} must be 0 to 99")

    def line(self) -> str:
        """The line as the model reads it: key, id, number, each one token, side by side."""
        return f"{self.reason} {self.policy_id} {self.window_days:02d}d"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the order store knows. `damage_confirmed` is a trusted fact: no customer text may set it."""

    order_id: str
    item: str
    days: int
    damage_confirmed: bool

    def __post_init__(self) -> None:
        if not (len(self.order_id) == 6 and self.order_id[0] == "A" and self.order_id[1:].isdigit()):
            raise ValueError(f"order_id {self.order_id!r} must look like A10234")
        if not 0 <= self.days <= 99:
            raise ValueError(f"days={self.days} must be 0 to 99")

    def status(self) -> str:
        return f"{self.days:02d}d {'confirmed' if self.damage_confirmed else 'unconfirmed'}"

    def line(self) -> str:
        return f"{self.order_id} {self.item} {self.status()}"


def is_eligible(policy: Policy, order: Order) -> bool:
    """The rule of the desk: inside the window, and damage must have been confirmed."""
    return order.days <= policy.window_days and (policy.reason != "damaged" or order.damage_confirmed)


def held_out(days: int, window_days: int) -> bool:
    """True for the (days, window) pairs no training text may show: one in five, by a fixed rule."""
    return (days * 31 + window_days * 17) % 5 == 0


def draw_pair(rng: random.Random, unseen: bool, boundary: float = 0.1) -> tuple[int, int]:
    """(days, window): half inside the window, half past it, a share of them within two days of the edge."""
    while True:
        window = rng.choice(WINDOWS)
        if rng.random() < boundary:
            days = window + rng.randint(-2, 2)
        else:
            days = rng.randint(1, window) if rng.random() < 0.5 else rng.randint(window + 1, 99)
        if 1 <= days <= 99 and held_out(days, window) == unseen:
            return days, window


def draw_window(rng: random.Random, days: int, unseen: bool) -> int:
    """A window that makes a held-out pair with `days` (`unseen`) or a pair that training may show."""
    return rng.choice([w for w in WINDOWS if held_out(days, w) == unseen])


def draw_book(rng: random.Random, reasons: list[str], first_window: int, unseen: bool,
              days: int | None = None) -> list[Policy]:
    """One policy a reason, ids and windows drawn afresh; `first_window` belongs to reasons[0].

    With the `days` of the order beside it, every line makes a pair of the wanted kind, not only the one that counts."""
    ids = rng.sample(POLICY_IDS, len(reasons))
    windows = [first_window] + [draw_pair(rng, unseen)[1] if days is None else draw_window(rng, days, unseen)
                                for _ in reasons[1:]]
    return [Policy(reason=r, policy_id=i, window_days=w) for r, i, w in zip(reasons, ids, windows)]


def draw_order(rng: random.Random, days: int) -> Order:
    return Order(order_id=f"A{rng.randint(10000, 99999)}", item=rng.choice(ITEMS), days=days,
                 damage_confirmed=rng.random() < 0.7)


def draw_message(rng: random.Random, reason: str, item: str) -> str:
    return rng.choice(PHRASES[reason]).format(item=item)
