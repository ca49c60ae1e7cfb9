"""Controls for what demonstrations teach: the first of them, and conversations that need no memory.

START, from the chain's base: three arms of one seed take the same steps of 16 rows. All rows different; as many steps
over 64 of them, again and again (after LIMA, Zhou et al. 2023: few demonstrations for manner); all different, with the
loss on the prompt as well as on the answer (Shi et al. 2024 report gains from that on other tasks). On the way each arm
is asked for valid JSON at temperature 1, where it is all or nothing, and for its loss a token, which is not (Schaeffer
et al. 2023).

TURNS, from the chain's SFT checkpoint: the three-turn dialogues of sft_contract against conversations as long, in the
same words, whose every turn names its reason. Both hold two and three answers to read past; only dialogues need them.

Left out: flawed answers (sft_contract), other learning rates, more than one number of repeated rows.
"""

import copy
import sys
from itertools import count
from statistics import mean

import torch
from torch import Tensor

from lifecycle_lib.core.store import Artifact
from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.judge import evals, verifiers
from lifecycle_lib.judge.evals import frozen_cases
from lifecycle_lib.judge.verifiers import parse_answer
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import sft_contract
from lifecycle_lib.lab.studies.sft_contract import replies
from lifecycle_lib.lab.studies.small import small_stage
from lifecycle_lib.model import sampling
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train import sft
from lifecycle_lib.train.logprobs import Rows, answer_loss, pad_rows
from lifecycle_lib.train.loop import FitConfig

ARMS = ("all different", "64 rows again", "prompt counted")
STEPS, BATCH, FEW, N_CASES = 180, 16, 64, 128
LOOKS = (0, 20, 28, 34, 48, 60, 90)  # and the end
FIT = FitConfig(steps=STEPS, checkpoint_every=10_000)


@torch.no_grad()
def look(model: GPT, tok: Tokenizer, n: int, seed: int, greedy: bool = False) -> Row:
    """Frozen cases: valid JSON and exact pass at temperature 1, or `greedy` too; loss a token of the right answer."""
    model, cases = copy.deepcopy(model).eval(), frozen_cases(n)
    coded = sft.encode_rows(tok, [{"prompt": c.prompt, "answer": c.answer} for c in cases])
    prompts = [p for p, _ in coded]
    row: Row = {"loss": float(answer_loss(model, pad_rows(prompts, [a for _, a in coded], tok.special["<pad>"]))[0])}
    for name, temperature in (("", 1.0), ("greedy ", 0.0))[:1 + greedy]:
        texts = replies(model, tok, prompts, temperature, seed, 48)
        row |= {f"{name}valid": mean(parse_answer(t).valid for t in texts),
                f"{name}exact": mean(t == c.answer for t, c in zip(texts, cases))}
    return row


def demonstrations(arm: str, steps: int, seed: int) -> list[dict]:
    """Clean rows of an arm, in the order in which they are shown."""
    rows = sft.make_demonstrations(draw_cases(steps * BATCH, seed, "start"), 0.0, seed)
    return rows[:FEW] if arm == "64 rows again" else rows


def start_arm(lab: Lab, arm: str) -> Artifact:
    """One arm: its looks on the way, and at the end."""
    tok, done, curve = lab.load_tokenizer(), count(), {}
    steps, n = (STEPS, N_CASES) if lab.profile.name != "smoke" else (2, 8)

    def batches():
        rows = sft.encode_rows(tok, demonstrations(arm, steps, lab.seed))
        return sft.sft_batches(rows, BATCH, lab.seed, tok.special["<pad>"], lab.profile.gpt.block_size)

    def loss_fn(model: GPT, rows: Rows) -> tuple[Tensor, dict]:
        if (step := next(done)) in LOOKS:
            curve[str(step)] = look(model, tok, n, lab.seed)
        whole = Rows(rows.ids, rows.ids != tok.special["<pad>"])
        return answer_loss(model, whole if arm == "prompt counted" else rows)

    return small_stage(lab, "sft-start", {"arm": arm, "steps": steps, "n": n}, batches,
                       lambda model: curve | {"end": look(model, tok, n, lab.seed, True)}, gpt=lab.profile.gpt,
                       fit=FIT if steps == STEPS else FitConfig(steps=steps), start=lab.base(), loss_fn=loss_fn,
                       parents={"tokenizer": lab.tokenizer()}, code=CODE)


def measure_turns(lab: Lab) -> tuple[Row, list[Artifact]]:
    """Dialogues, and conversations that need no memory."""
    cfg, tok = sft_contract.SIZES[lab.profile.name], lab.load_tokenizer()
    made = {arm: sft_contract.turn_arm(lab, arm, cfg) for arm in ("dialogues", "own reasons")}
    row = {f"{arm}.{key}": value for arm, a in made.items() for key, value in a.card["measured"].items()}
    single = sft_contract.tokens_of(tok, "single", cfg, lab.seed)
    return row | {f"single.{key}": value for key, value in single.items()}, list(made.values())


def measure_start(lab: Lab) -> tuple[Row, list[Artifact]]:
    """All arms of one seed."""
    made = {arm: start_arm(lab, arm) for arm in ARMS}
    return {f"{arm}.{at}.{key}": value for arm, a in made.items() for at, part in a.card["measured"].items()
            for key, value in part.items()}, list(made.values())


CODE = (sft, sampling, evals, verifiers, sft_contract, sys.modules[__name__])
START = Design(
    measure=measure_start, notebook="07", smallest=0.10, equivalence=True, n_items=N_CASES, rows=("S1-12",),
    claim="64 demonstrations shown 45 times each buy the format as 2,880 different ones do (valid JSON at temperature "
          "1 within 10 points) and not the skill (greedy exact pass at least 10 points lower)",
    falsifier="valid JSON differs by more than 10 points, or greedy exact pass is less than 10 points lower",
    also=(("exact pass greedy: all different - 64 rows again", 0.10),),
    effects=(("valid JSON: 64 rows again - all different", "64 rows again.end.valid", "all different.end.valid",
              "share"),
             ("exact pass greedy: all different - 64 rows again", "all different.end.greedy exact",
              "64 rows again.end.greedy exact", "share"),
             ("exact pass greedy: all different - prompt counted", "all different.end.greedy exact",
              "prompt counted.end.greedy exact", "share"),
             ("valid JSON: all different - prompt counted", "all different.end.valid", "prompt counted.end.valid",
              "share"),
             *((f"{what}: {arm}", f"{arm}.end.{key}", None, unit) for arm in ARMS for what, key, unit in (
                 ("valid JSON", "valid", "share"), ("exact pass greedy", "greedy exact", "share"),
                 ("exact pass, temperature 1", "exact", "share"), ("loss a token", "loss", "nats")))))
TURNS = Design(
    measure=measure_turns, notebook="07", smallest=0.20, n_items=96, items="unseen dialogues of each kind",
    rows=("S3-7.08",),
    claim="rows that need memory teach memory: dialogues keep the goal at turn 3 in at least 20 points more cases than "
          "three-turn conversations in the same words whose every turn names its reason",
    falsifier="goal kept at turn 3 gains less than 20 points",
    effects=(("goal kept, turn 3: dialogues - own reasons", "dialogues.keep.t3", "own reasons.keep.t3", "share"),
             *((f"{name}: {arm}", f"{arm}.{key}", None, "share") for name, key in sft_contract.ASKED
               for arm in ("dialogues", "own reasons")),
             *((f"tokens {what}: {arm}", f"{arm}.{what}", None, "tokens") for what in ("read", "taught")
               for arm in ("single", "own reasons", "dialogues"))))
