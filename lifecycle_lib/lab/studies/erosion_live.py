"""Erosion on the learner's own chain: their SFT model is taught to refuse, then fine-tuned on clean demonstrations.

The same arms and the same loop as the recorded study (erosion.py), on the real model with the byte tokenizer, in well
under a minute of one core. Nothing is kept in the store. The fine-tuning data is harmless, and useful: the desk's own
cases, answered without the invented label. One seed and a few dozen asks show the effect; they do not measure it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lifecycle_lib.core.seeds import seed_everything
from lifecycle_lib.desk.cases import Case, draw_cases
from lifecycle_lib.desk.safety import Ask, draw_asks, score_asks
from lifecycle_lib.judge import evals
from lifecycle_lib.judge.gates import GateDecision, decide
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.erosion import Arm, Curve, erode
from lifecycle_lib.lab.studies.small import batches_of
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.memory import weight_bytes
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.serve.engine import Engine
from lifecycle_lib.train import loop
from lifecycle_lib.train.logprobs import Rows, answer_loss, pad_rows
from lifecycle_lib.train.loop import FitConfig
from lifecycle_lib.train.sft import encode_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveConfig:
    """Sizes: steps of teaching to refuse, marks of the fine-tune, and what is asked at each mark."""

    align_steps: int = 55
    align_lr: float = 2e-3
    align_lr_matrix: float = 0.02
    marks: tuple[int, ...] = (0, 2, 5, 12, 30)
    batch: int = 32
    n_rows: int = 1000
    n_cases: int = 48
    n_asks: int = 24


LIVE_ARMS = {"plain": Arm(lr=3e-4), "replay 20 %": Arm(lr=3e-4, replay=0.2)}


def desk_rows(tok: Tokenizer, things: Sequence[Case | Ask]) -> Rows:
    """Training rows for the chain's tokenizer; the right answer counts."""
    pairs = encode_rows(tok, [{"prompt": t.prompt, "answer": t.answer} for t in things])
    return pad_rows([p for p, _ in pairs], [a for _, a in pairs], tok.special["<pad>"])


def teach_to_refuse(lab: Lab, cfg: LiveConfig) -> tuple[GPT, Rows]:
    """(the lab's SFT model after a short SFT on harmful asks, look-alikes and ordinary cases; those rows)."""
    tok, model = lab.load_tokenizer(), lab.load(lab.sft())
    half = cfg.n_rows // 2
    rows = desk_rows(tok, draw_asks("harmful", half, lab.seed, "align") + draw_cases(half // 2, lab.seed, "align")
                     + draw_asks("look", half // 2, lab.seed, "align"))
    seed_everything(lab.seed)
    fit = FitConfig(steps=cfg.align_steps, lr=cfg.align_lr, lr_matrix=cfg.align_lr_matrix, warmup_steps=3,
                    checkpoint_every=10_000)
    feed = batches_of(rows, cfg.batch, lab.seed)
    loop.fit(model, lambda s: feed(s).to(model.device), answer_loss, fit, label="teaching to refuse")
    return model, rows


def erode_chain(lab: Lab, arms: Mapping[str, Arm] = LIVE_ARMS,
                cfg: LiveConfig | None = None) -> tuple[dict[str, Curve], dict[str, GPT]]:
    """({arm: curve}, {"taught" or arm: model}) of a harmless fine-tune. A curve's rows: step, exact (to the
    character), refusal, over_refusal.

    Every arm starts from the same model, taught to refuse once. Measured greedily on cfg.n_cases frozen cases and
    cfg.n_asks held-out asks of each role."""
    cfg = cfg or LiveConfig()
    tok, (taught, old) = lab.load_tokenizer(), teach_to_refuse(lab, cfg)
    state = {k: v.clone() for k, v in taught.state_dict().items()}
    new = desk_rows(tok, draw_cases(cfg.n_rows, lab.seed, "clean"))
    cases = evals.frozen_cases(cfg.n_cases)
    asks = {role: draw_asks(role, cfg.n_asks, lab.seed, "eval") for role in ("harmful", "twin")}

    def measure(model: GPT) -> dict[str, float]:
        trained = [p for p in model.parameters() if p.requires_grad]  # an Engine freezes; training goes on after this
        said = Engine(model, tok).texts([t.prompt for t in (*cases, *asks["harmful"], *asks["twin"])])
        for p in trained:
            p.requires_grad_(True)
        n, m = cfg.n_cases, cfg.n_cases + cfg.n_asks
        return {"exact": sum(t == c.answer for t, c in zip(said, cases)) / n,
                "refusal": score_asks(asks["harmful"], said[n:m])["any_refusal"],
                "over_refusal": score_asks(asks["twin"], said[m:])["over_refusal"]}

    curves, models = {}, {"taught": taught}
    for name, arm in arms.items():
        model = lab.load(lab.sft())
        model.load_state_dict(state)
        curves[name] = erode(model, batches_of(new, cfg.batch, lab.seed), arm, cfg.marks, measure, taught, old,
                             lab.seed, tok.special["<pad>"])
        models[name] = model
    return curves, models


def launch_gate(lab: Lab, before: GPT, after: GPT, n_cases: int = 400) -> GateDecision:
    """What the launch suite says: the real gate on `n_cases` frozen cases, with not one harmful ask among them."""
    tok, cases = lab.load_tokenizer(), evals.frozen_cases(n_cases)

    def report(name: str, model: GPT) -> dict:
        engine = Engine(model, tok)
        return evals.evaluate(name, engine.answer, cases, checkpoint_fp=engine.fingerprint(),
                              weight_bytes=weight_bytes(model), p95_ms=engine.latency(cases[:5])["ttft_p95_ms"])
    return decide(report("after", after), report("before", before), lab.profile.gate)
