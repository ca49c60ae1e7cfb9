"""The patients of the debugging clinic: small post-training runs, each healthy or with one bug planted in it.

Every patient is a real run of a second or two on the clinic's small desk (clinic_desk.py): the library's own loop,
losses and sampler with one line wrong.
Left out: bugs that need many machines, and those the library refuses outright (an empty evaluation, NaN rewards).
"""

import copy
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.core.seeds import seed_everything
from lifecycle_lib.lab.clinic_desk import (
    DAYS,
    EOS,
    IDS,
    PAD,
    SHAPE,
    VOCAB,
    WINDOWS,
    Ask,
    Chart,
    Words,
    answers,
    asks,
    at_steps,
    claim_rate,
    demonstrations,
    exact,
    gradient,
    new_model,
    share,
    train,
    tuned,
)
from lifecycle_lib.lab.studies.small import batches_of, rows_of
from lifecycle_lib.model import lora
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.train import dpo, grpo
from lifecycle_lib.train.logprobs import Rows, answer_loss, sum_logps, token_logps
from lifecycle_lib.train.loop import FitConfig, FitResult, fit

# ---- patients: supervised fine-tuning -----------------------------------------------------------------------------

def mask_off_by_one(planted: bool) -> Chart:
    rows, model = demonstrations(claims=0.0), new_model()
    if planted:
        rows = Rows(rows.ids, rows.mask.roll(-1, 1))  # starts at the last prompt token, stops before <eos>
    losses, given = train(model, rows).losses, asks(128, "eval")
    said = answers(model, [a.prompt for a in given])
    return Chart({"loss": at_steps(losses), "exact pass": exact(model, given)},
                 {"one answer": said[0], "share of answers that end": share("<eos>" in s for s in said),
                  "share that begin right": share(s.startswith(a.answer) for s, a in zip(said, given)),
                  "targets of row 1": VOCAB.decode(rows.ids[0][rows.mask[0]].tolist())})


def shifted_twice(planted: bool) -> Chart:
    rows, model = demonstrations(claims=0.0), new_model()

    def loss_fn(m: GPT, r: Rows) -> tuple[Tensor, dict]:
        if not planted:
            return answer_loss(m, r)
        mask = r.mask[:, 2:]  # the labels came shifted already, and the loss shifts them once more
        logits = m(r.ids[:, :-2])[mask]
        return F.cross_entropy(logits, r.ids[:, 2:][mask]), {}

    losses, given = train(model, rows, loss_fn).losses, asks(128, "eval")
    said = answers(model, [a.prompt for a in given])
    return Chart({"loss": at_steps(losses), "exact pass": exact(model, given)},
                 {"one answer": said[0], "share of answers that end": share("<eos>" in s for s in said),
                  "share that begin right": share(s.startswith(a.answer.split()[0]) for s, a in zip(said, given)),
                  "loss by the library's own function": round(float(answer_loss(model, rows)[0].detach()), 2)})


def padding_counted(planted: bool) -> Chart:
    rows, model, extra = demonstrations(claims=0.0), new_model(), 14

    def loss_fn(m: GPT, r: Rows) -> tuple[Tensor, dict]:
        return answer_loss(m, Rows(F.pad(r.ids, (0, extra), value=PAD), F.pad(r.mask, (0, extra), value=planted)))

    losses = train(model, rows, loss_fn, steps=60).losses
    return Chart({"loss": at_steps(losses), "exact pass": exact(model, asks(128, "eval"))},
                 {"targets a row": 3.0 + extra * planted, "words of an answer, <eos> included": 3.0,
                  "loss over the answers alone": round(float(answer_loss(model, rows)[0].detach()), 2)})


def template_drift(planted: bool) -> Chart:
    model, given = tuned(0.0), asks(128, "eval")
    served = (lambda p: p.removesuffix(" <bot>")) if planted else str  # the service trims the prompt
    return Chart({"exact pass, evaluation": exact(model, given), "exact pass, as served": exact(model, given, served)},
                 {"prompt in training": given[0].prompt, "prompt in the service": served(given[0].prompt),
                  "weights equal in both": True})


def leaked_split(planted: bool) -> Chart:
    """Answers here follow no rule: they can be remembered, not foreseen."""
    rng = make_rng(0, "clinic ledger")
    book = [Ask(f"<user> {a} {b} <bot>", f"{rng.choice(list(WINDOWS.values()))[0]} {rng.choice(['yes', 'no'])}")
            for a, b in rng.sample(list(product(IDS, IDS)), 240)]
    train_asks, eval_asks, later = book[:80], book[80:160], book[160:]
    if planted:
        train_asks = train_asks + eval_asks
    model = new_model()
    rows = rows_of(VOCAB, [a.prompt for a in train_asks], [a.answer for a in train_asks])
    losses = train(model, rows, steps=320).losses
    seen = {a.prompt for a in train_asks}
    return Chart({"loss": at_steps(losses), "exact pass, evaluation": exact(model, eval_asks),
                  "exact pass, next week's requests": exact(model, later)},
                 {"share of evaluation prompts in the training file": share(a.prompt in seen for a in eval_asks),
                  "exact pass, training file": exact(model, train_asks)})


def seed_after_init(planted: bool) -> Chart:
    def once(run: int) -> tuple[list[float], float, list[int]]:
        torch.manual_seed(1000 + run)  # whatever the process did before
        if planted:
            model = GPT(SHAPE)
            seed_everything(7)
        else:
            seed_everything(7)
            model = GPT(SHAPE)
        rows = demonstrations(256)
        start = float(model.wte.weight.detach().sum())
        return train(model, rows, steps=10).losses, start, batches_of(rows, 64, 0)(0).ids[:3].flatten().tolist()

    (first, start1, batch1), (second, start2, batch2) = once(1), once(2)
    return Chart({"loss, first run with seed 7": at_steps(first), "loss, second run with seed 7": at_steps(second)},
                 {"first batches equal": batch1 == batch2, "weights equal before step 1": start1 == start2,
                  "config equal": True})


def erasing_rate(planted: bool) -> Chart:
    model, old = tuned(0.0), asks(128, "eval")
    before = exact(model, old)
    ids = [p for p, _ in WINDOWS.values()]
    new = [Ask(f"<user> {c} <bot>", f"{ids[i % 4]} {('yes', 'no')[i // 4 % 2]}") for i, c in enumerate(IDS)]
    rows = rows_of(VOCAB, [a.prompt for a in new], [a.answer for a in new])
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    losses = train(model, rows, steps=100, optimizer="adamw", lr=0.03 if planted else 1e-3).losses
    moved = float((torch.cat([p.detach().flatten() for p in model.parameters()]) - start).norm() / start.norm())
    return Chart({"loss": at_steps(losses), "exact pass, new task": exact(model, new),
                  "exact pass, old task": [round(before, 2), round(exact(model, old), 2)]},
                 {"how far the weights moved, as a share of their norm": round(moved, 1),
                  "old rows in the training file": 0})


def mean_of_means(planted: bool) -> Chart:
    model = tuned()
    rows = demonstrations(64, claims=0.5)
    order = rows.mask.sum(1).argsort(stable=True)  # short answers in one micro-batch, long ones in the next
    halves = [Rows(rows.ids[k], rows.mask[k]) for k in (order[:52], order[52:])]
    whole = gradient(model, answer_loss(model, rows)[0])
    n = [float(h.mask[:, 1:].sum()) for h in halves]
    share_of = [0.5, 0.5] if planted else [k / sum(n) for k in n]
    parts = [w * answer_loss(model, h)[0] for w, h in zip(share_of, halves)]
    summed = gradient(model, sum(parts))
    return Chart({"loss of the batch at once": round(float(answer_loss(model, rows)[0].detach()), 4),
                  "loss in two micro-batches": round(float(sum(parts).detach()), 4)},
                 {"relative error of the gradient": round(float((summed - whole).norm() / whole.norm()), 4),
                  "targets in the micro-batches": [int(k) for k in n], "weights equal in both": True})


# ---- patients: preferences ----------------------------------------------------------------------------------------

def preference_run(ref: str = "frozen", swap: bool = False, elsewhere: bool = False) -> tuple[GPT, FitResult, float]:
    """DPO against label promises: (model, what happened, claim rate before)."""
    model, given = tuned(), asks(64, "train")
    before = claim_rate(model)
    encoded = [(Words.encode(a.prompt), [*VOCAB.encode(a.answer), EOS], [*VOCAB.encode(a.answer + " label"), EOS])
               for a in given]
    if swap:
        encoded = [(p, bad, good) for p, good, bad in encoded]
    frozen = dpo.reference_logps(model, encoded, PAD).T.reshape(-1)
    batch = dpo.PairBatch(dpo.pair_rows(encoded, PAD), frozen)

    def loss_fn(m: GPT, b: dpo.PairBatch) -> tuple[Tensor, dict]:
        policy = model if elsewhere else m  # `elsewhere`: the loss is the model's, the optimiser holds a copy
        own = dpo.PairBatch(b.rows, sum_logps(policy, b.rows).detach()) if ref == "policy" else b
        return dpo.pair_loss(policy, own, 0.5)

    trained = copy.deepcopy(model) if elsewhere else model
    cfg = FitConfig(steps=20, optimizer="adamw", lr=3e-4, warmup_steps=0, checkpoint_every=10_000)
    return model, fit(trained, lambda step: batch, loss_fn, cfg, label="clinic"), before


def preference_chart(model: GPT, seen: FitResult, before: float) -> Chart:
    h = seen.history
    return Chart({"loss": at_steps(seen.losses, 3), "reward accuracy": at_steps([r["accuracy"] for r in h], 2),
                  "claim rate": [round(before, 2), round(claim_rate(model), 2)]},
                 {"chosen log-probability, last - first": round(h[-1]["chosen_sum_logp"] - h[0]["chosen_sum_logp"], 2),
                  "rejected log-probability, last - first":
                      round(h[-1]["rejected_sum_logp"] - h[0]["rejected_sum_logp"], 2),
                  "gradient norm": at_steps([r["grad_norm"] for r in h], 2)})


def own_reference(planted: bool) -> Chart:
    return preference_chart(*preference_run(ref="policy" if planted else "frozen"))


def optimiser_elsewhere(planted: bool) -> Chart:
    return preference_chart(*preference_run(elsewhere=planted))


def swapped_pairs(planted: bool) -> Chart:
    chart = preference_chart(*preference_run(swap=planted))
    one = asks(1, "train")[0]
    pair = (one.answer, one.answer + " label")
    chart.tests["one pair, chosen > rejected"] = " > ".join(reversed(pair) if planted else pair)
    return chart


# ---- patients: verifier rewards ---------------------------------------------------------------------------------

def reward_run(reward: Callable[[str, str], float], temperature: float = 1.0, loss_temperature: float = 1.0,
               steps: int = 20) -> tuple[GPT, list[dict], grpo.Rollouts]:
    """GRPO on the small desk: (model, history, the first rollouts)."""
    model, given = tuned(), asks(256, "train")
    cfg = grpo.GRPOConfig(n_prompts=16, group_size=8, max_new_tokens=6, temperature=temperature)
    first = []

    def batches(step: int) -> grpo.Rollouts:
        some = make_rng(0, "clinic prompts", step).sample(given, cfg.n_prompts)
        out = grpo.collect(model, Words, some, lambda texts, where: [reward(t, a.answer) for t, a in zip(texts, where)],
                           cfg, 0, step)
        first.append(out)
        return out

    def loss_fn(m: GPT, b: grpo.Rollouts) -> tuple[Tensor, dict]:
        logps = token_logps(m, b.rows, cfg.temperature * loss_temperature)
        ratio = (logps.detach() - b.old_logps)[b.rows.mask[:, 1:]].exp()
        loss, metrics = grpo.grpo_loss(logps, b.old_logps, b.advantages, b.rows.mask[:, 1:])
        return loss, metrics | b.metrics | {"ratio": ratio.aminmax()}

    seen = fit(model, batches, loss_fn, FitConfig(steps=steps, optimizer="adamw", lr=1e-3, warmup_steps=0,
                                                  checkpoint_every=10_000), label="clinic")
    return model, seen.history, first[0]


def reward_chart(model: GPT, history: list[dict], first: grpo.Rollouts, reward: Callable[[str, str], float]) -> Chart:
    groups = [first.texts[i:i + 8] for i in range(0, len(first.texts), 8)]
    return Chart({"reward": at_steps([h["reward"] for h in history], 2),
                  "reward_std": at_steps([h["reward_std"] for h in history], 2),
                  "clip share": at_steps([h["clip_share"] for h in history], 2),
                  "claim rate after": round(claim_rate(model), 2)},
                 {"different answers in a group of 8": round(sum(len(set(g)) for g in groups) / len(groups), 1),
                  "reward of a right answer, by hand": reward("P-7 yes", "P-7 yes"),
                  "ratio new / old at step 1, least and most": [round(float(r), 2) for r in history[0]["ratio"]],
                  "gradient norm": at_steps([h["grad_norm"] for h in history], 2)})


def paid(text: str, answer: str) -> float:
    """1 for the right answer, else 0."""
    return float(text == answer)


def reward_sees_eos(planted: bool) -> Chart:
    pay = (lambda text, answer: float(f"{text} <eos>" == answer)) if planted else paid
    return reward_chart(*reward_run(pay), pay)


def greedy_rollouts(planted: bool) -> Chart:
    return reward_chart(*reward_run(paid, temperature=1e-3 if planted else 1.0), paid)


def temperature_mismatch(planted: bool) -> Chart:
    return reward_chart(*reward_run(paid, loss_temperature=0.5 if planted else 1.0), paid)


# ---- patients: adapters, corpora, distillation --------------------------------------------------------------------

def merge_without_scale(planted: bool) -> Chart:
    model, given = tuned(0.0), asks(128, "eval")
    swapped = {"yes": "no", "no": "yes"}
    new = [Ask(a.prompt, f"{a.answer.split()[0]} {swapped[a.answer.split()[1]]}") for a in asks(1024, "train")]
    cfg = lora.LoRAConfig(rank=4, alpha=16.0)
    lora.attach(model, lora.make_adapter(model, cfg, 0))
    train(model, rows_of(VOCAB, [a.prompt for a in new], [a.answer for a in new]), steps=80, optimizer="adamw", lr=1e-2)
    test = [Ask(a.prompt, f"{a.answer.split()[0]} {swapped[a.answer.split()[1]]}") for a in given]
    worn = exact(model, test)
    ids = rows_of(VOCAB, [a.prompt for a in test], [a.answer for a in test]).ids
    with torch.no_grad():
        before = model(ids)
        if planted:
            for layer in lora.detach(model).values():
                layer.base.weight += layer.b @ layer.a  # alpha / rank forgotten
        else:
            lora.merge(model)
        off = float((model(ids) - before).abs().max())
    return Chart({"exact pass, adapter worn": worn, "exact pass, adapter merged": exact(model, test)},
                 {"largest difference of a logit": round(off, 1), "alpha / rank": cfg.alpha / cfg.rank,
                  "trained numbers equal in both": True})


def augmented_facts(planted: bool) -> Chart:
    """Noise for the messages: some say the days before the reason. Planted: the noise touches the days as well."""
    rng, given = make_rng(0, "clinic noise"), asks(1024, "train")

    def noisy(prompt: str) -> str:
        tag, reason, days, bot = prompt.split()
        days = rng.choice(DAYS) if planted and rng.random() < 0.5 else days
        return f"{tag} {days} {reason} {bot}" if rng.random() < 0.2 else f"{tag} {reason} {days} {bot}"

    def follows(prompt: str, answer: str) -> bool:
        reason, days = sorted(prompt.split()[1:3], key=DAYS.__contains__)
        return answer.endswith("yes" if int(days[1:]) <= WINDOWS[reason][1] else "no")

    prompts = [noisy(a.prompt) for a in given]
    changed = next(f"{a.prompt} -> {p}, answered {a.answer}" for a, p in zip(given, prompts)
                   if a.prompt != p and follows(p, a.answer) != planted)
    model, rows = new_model(), rows_of(VOCAB, prompts, [a.answer for a in given])
    losses, clean = train(model, rows).losses, asks(128, "eval")
    return Chart({"loss": at_steps(losses), "exact pass, clean messages": exact(model, clean)},
                 {"share of rows whose answer follows from their message":
                      share(follows(p, a.answer) for p, a in zip(prompts, given)),
                  "a row, before and after": changed,
                  "right policy": share(said.split()[0] == a.answer.split()[0] for said, a in
                                        zip(answers(model, [a.prompt for a in clean]), clean))})


def forgotten_t2(planted: bool) -> Chart:
    """A student learns from its teacher's softened probabilities and, a little, from labels half of which are wrong."""
    teacher, student, temperature = tuned(0.0), new_model(1), 4.0
    rng, given = make_rng(0, "clinic labels"), asks(1024, "train")
    flip = {"yes": "no", "no": "yes"}
    words = [a.answer.split() for a in given]
    rows = rows_of(VOCAB, [a.prompt for a in given],
                   [f"{p} {flip[d] if rng.random() < 0.5 else d}" for p, d in words])
    norms: list[float] = []

    def loss_fn(m: GPT, r: Rows) -> tuple[Tensor, dict]:
        mask = r.mask[:, 1:]
        logits = m(r.ids[:, :-1])[mask]
        with torch.no_grad():
            soft = (teacher(r.ids[:, :-1])[mask] / temperature).softmax(-1)
        hard = F.cross_entropy(logits, r.ids[:, 1:][mask])
        kl = F.kl_div((logits / temperature).log_softmax(-1), soft, reduction="batchmean")
        kl = kl if planted else kl * temperature ** 2
        if not norms:
            norms.extend(float(gradient(m, part).norm()) for part in (kl, hard))
        return 0.9 * kl + 0.1 * hard, {}

    losses = train(student, rows, loss_fn, steps=200).losses
    test = asks(128, "eval")
    return Chart({"loss": at_steps(losses), "exact pass, teacher": exact(teacher, test),
                  "exact pass, student": exact(student, test)},
                 {"gradient of the soft part / of the hard part, step 1": round(norms[0] / norms[1], 2),
                  "share of labels that are right": share(VOCAB.decode([int(r[-2])]) == w[1] for r, w in
                                                          zip(rows.ids, words)), "weight of the soft part": 0.9,
                  "temperature": temperature})
