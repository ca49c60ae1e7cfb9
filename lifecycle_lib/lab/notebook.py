"""How every notebook starts: quiet, one thread, the lifecycle strip, and a Lab on the repository's store.

Two rules follow from notebooks being compared with their committed outputs: `start` prints nothing that changes from
run to run, and progress bars stay off unless a person is watching (a warm store would show none).
"""

import logging
import os
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

from lifecycle_lib.core.seeds import one_thread
from lifecycle_lib.core.store import Store
from lifecycle_lib.lab.stages import Lab

ROOT = Path(__file__).resolve().parents[2]
LEVERS = {  # the strip: each lever with what one run of it does to the weights
    "data": "none yet", "pretrain": "change", "sft": "change", "preferences": "change", "rewards": "change",
    "adapters": "change beside a frozen base", "quantise": "are rounded, not trained", "retrieval": "stay",
    "tools": "stay", "evaluation": "stay", "release": "stay"}
TRAINING = ("data", "pretrain", "sft", "preferences", "rewards", "adapters", "quantise")


@dataclass(frozen=True, slots=True)
class Entry:
    """One notebook of the course: file name, the levers it moves, one line on what that is."""

    name: str
    levers: tuple[str, ...]
    line: str


def _entry(name: str, levers: str, line: str) -> tuple[str, Entry]:
    return name[:2], Entry(name, tuple(levers.split()), line)


NOTEBOOKS: dict[str, Entry] = dict((
    _entry("00_map_and_world", " ".join(LEVERS), "every lever once, to see which of them move the weights"),
    _entry("01_bigram_to_gpt", "pretrain", "next-token loss turns random weights into desk text"),
    _entry("02_scaling_and_budget", "pretrain", "how large, on how much data, for what budget"),
    _entry("03_data_mixture", "data pretrain", "what the base reads decides what it can do"),
    _entry("04_data_gates", "data", "what may enter the training set"),
    _entry("05_data_rights", "data", "whose text it is, and what that allows"),
    _entry("06_recipes_that_reproduce", "pretrain sft", "the same run twice, and what it takes"),
    _entry("07_sft_the_interface", "sft", "demonstrations teach the interface"),
    _entry("08_corpus_is_not_domain", "pretrain sft", "more text of a field is not skill in it"),
    _entry("09_forgetting_and_interference", "sft", "what a new lesson costs the old ones"),
    _entry("10_adapters", "adapters", "few trained numbers beside frozen ones"),
    _entry("11_preferences_dpo", "preferences", "pairs move probability from one answer to another"),
    _entry("12_verifier_rewards", "rewards", "code pays 1 or 0, and the policy follows the pay"),
    _entry("13_frozen_weights_and_evidence", "retrieval", "new facts at request time, same checkpoint"),
    _entry("14_structured_outputs_and_tools", "tools", "a grammar and tools around the same checkpoint"),
    _entry("15_distillation", "sft", "a small student copies a larger teacher"),
    _entry("16_memory_quantization_latency", "quantise", "fewer bits, less memory, and what that costs"),
    _entry("17_evaluation_you_can_trust", "evaluation", "what a score may claim"),
    _entry("18_router_gates_release", "evaluation release", "who owns a failure, and what may ship"),
    _entry("19_honest_admission_capstone", " ".join(LEVERS), "the whole life, with your own claims at stake")))


def strip(notebook: str) -> str:
    """The lifecycle strip of a notebook as text: its levers in brackets, and whether weights move."""
    key = str(notebook)[:2]
    if key not in NOTEBOOKS:
        raise ValueError(f"notebook {notebook!r} is unknown; use a number from 00 to 19")
    on = NOTEBOOKS[key].levers
    lanes = []
    for label, names in (("changes weights", TRAINING), ("frozen weights", [n for n in LEVERS if n not in TRAINING])):
        lanes.append(f"  {label:<16} " + "  ".join(f"[{n.upper()}]" if n in on else n for n in names))
    weights = "; ".join(f"{n}: weights {LEVERS[n]}" for n in on) if len(on) < 4 else "all levers, each in its turn"
    return "\n".join([f"{NOTEBOOKS[key].name}: {NOTEBOOKS[key].line}", *lanes, *textwrap.wrap(f"  {weights}", 110)])


def live() -> bool:
    """Is a person in front of this kernel? Jupyter names the session of kernels it starts for someone; nbclient, nbval
    and papermill do not."""
    return bool(os.environ.get("JPY_SESSION_NAME") or os.environ.get("COLAB_RELEASE_TAG"))


def quiet() -> None:
    """One thread, no warnings, no progress bars unless a person is watching."""
    one_thread()
    warnings.filterwarnings("ignore")
    for name in ("transformers", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not live():
        os.environ["LIFECYCLE_QUIET"] = "1"


def start(notebook: str = "00", profile: str | None = None, seed: int = 0, device: str | None = None) -> Lab:
    """Print the strip of `notebook` and return the Lab of `profile`, `seed` and `device`.

    Its store is LIFECYCLE_STORE, else store/ in the repository, whatever folder the kernel runs in. Raises ValueError
    for an unknown notebook, profile or device."""
    quiet()
    text = strip(notebook)
    lab = Lab(profile or None, seed=seed, device=device or None,
              store=Store(os.environ.get("LIFECYCLE_STORE") or ROOT / "store"))
    print(f"{text}\n  profile {lab.profile.name}, seed {lab.seed}, device {lab.device.type}")
    return lab
