"""What demonstrations fix and what they leave open: turns, templates, doses of a flaw, doses of "I do not know".

From the chain's SFT checkpoint of a seed (curriculum S3-7.05 to 7.13, S1-14, S0-25):
- turns: equal tokens read of single-turn rows, of three-turn dialogues, and of dialogues without corrections. A
  dialogue holds more answers, so more of its tokens are taught (sft_controls counts them, and adds "own reasons");
- drift: the same checkpoint behind thirteen renderings of the prompt, nothing trained;
- doses: the share of targets without policy_id, and the number of certainty words, two coins in one file.
From scratch, a small model of words (S3-7.03, 7.15): the share of rows whose right answer is "idk". A third of the
wordings of each reason are never trained on: the price of admitting ignorance is paid there.

Every arm of a seed is asked the same. Dialogues go on with the model's own answers. Left out: learning-rate sweeps, any
size of model but these two.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import mean

from lifecycle_lib.core.seeds import make_generator, rng
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.desk import dialogues
from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.desk.dialogues import ASK, Dialogue, draw_dialogues
from lifecycle_lib.desk.world import ITEMS, PHRASES, POLICY_IDS, REASONS, draw_message
from lifecycle_lib.judge import evals, verifiers
from lifecycle_lib.judge.evals import frozen_cases
from lifecycle_lib.judge.verifiers import parse_answer
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.small import Vocab, batches_of, rows_of, small_stage
from lifecycle_lib.model import sampling
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.sampling import generate
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train import chat, sft
from lifecycle_lib.train.chat import case_messages, chat_rows, encode_chat
from lifecycle_lib.train.logprobs import Rows
from lifecycle_lib.train.loop import FitConfig

CONVERSATION = {"single": (), "dialogues": dialogues.KINDS, "no corrections": ("keep", "ask")}
DOSES = ((0.0, 0.3), (0.15, 0.5), (0.3, 0.0), (0.5, 0.15))  # (without policy_id, with certainty words), crossed
IDK_SHARES = (0.0, 0.05, 0.15, 0.30)
DRIFTS: dict[str, Callable[[str], str]] = {
    "as trained": lambda p: p,
    "no <bos>": lambda p: p.removeprefix("<bos>"),
    "<user> becomes <note>": lambda p: p.replace("<user>", "<note>"),
    "<policy> becomes <note>": lambda p: p.replace("<policy>", "<note>"),
    "<bot> becomes <note>": lambda p: p.replace("<bot>", "<note>"),
    "space before <bot>": lambda p: p.replace("<bot>", " <bot>"),
    "newline before <bot>": lambda p: p.replace("<bot>", "\n<bot>"),
    "space after <bot>": lambda p: p + " ",
    "newline after <bot>": lambda p: p + "\n",
    "space after <policy>": lambda p: p.replace("<policy>", "<policy> "),
    "two spaces before ids": lambda p: p.replace(" P-", "  P-"),
    "no-break space before ids": lambda p: p.replace(" P-", "\u00a0P-"),
    "order before policies": lambda p: "<bos>" + p[p.index("<order>"):p.index("<user>")] + p[5:p.index("<order>")]
                                       + p[p.index("<user>"):],
}
PLAIN = "tags as plain text"  # the same characters, no tag a token
SPACES = tuple(DRIFTS)[5:12]  # one character each


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractConfig:
    """Size of the study: steps and rows a step of the chain's arms, of the small model, and what is asked."""

    steps: int = 68
    batch: int = 16
    dose_steps: int = 44
    idk_steps: int = 180
    n_dialogues: int = 96
    n_cases: int = 128
    n_sampled: int = 192


SIZES = {"smoke": ContractConfig(steps=2, batch=4, dose_steps=2, idk_steps=4, n_dialogues=6, n_cases=8, n_sampled=8),
         "laptop": ContractConfig(), "gpu": ContractConfig(n_dialogues=384, n_cases=512, n_sampled=512)}


def replies(model: GPT, tok: Tokenizer, prompts: Sequence[list[int]], temperature: float = 0.0, seed: int = 0,
            max_new: int = 40) -> list[str]:
    """Answers to prompts of ids, as text without the end token."""
    out = generate(model, list(prompts), eos_id=tok.special["<eos>"], pad_id=tok.special["<pad>"],
                   max_new_tokens=max_new, temperature=temperature, generator=make_generator(seed, "contract"))
    return out.texts(tok)


# ---- turns ---------------------------------------------------------------------------------------------------------

def converse(model: GPT, tok: Tokenizer, talks: Sequence[Dialogue]) -> list[list[str]]:
    """What the model says in each of the three turns of each dialogue, its own answers being the history. Greedy."""
    said: list[list[str]] = [[] for _ in talks]
    for _ in range(3):
        prompts = [encode_chat(tok, d.messages(s))[0] for d, s in zip(talks, said)]
        for s, text in zip(said, replies(model, tok, prompts, max_new=24)):
            fits = text.strip() and len(tok.encode(text, allow_special=False)) <= 24
            s.append(text if fits else "...")  # nothing said, or no answer of this desk: the block must hold three
    return said


def cut(d: Dialogue, said: Sequence[str], keep: int) -> list[dict]:
    """The last request with only the `keep` latest user turns before it forgotten: policies and order stay."""
    messages = d.messages(said[:2])
    head = [m for m in messages if m["role"] in ("policy", "order")]
    return head + messages[len(head):][-(2 * keep - 1):]


def dialogue_scores(model: GPT, tok: Tokenizer, cfg: ContractConfig, seed: int) -> Row:
    """Shares of dialogues, by kind and turn, and of single requests answered exactly."""
    talks = draw_dialogues(3 * cfg.n_dialogues, seed, "eval")
    said = dict(zip(map(id, talks), converse(model, tok, talks)))
    kinds = {kind: [d for d in talks if d.kind == kind] for kind in dialogues.KINDS}

    def share(kind: str, test: Callable[[Dialogue, list[str]], bool]) -> float:
        return mean(test(d, said[id(d)]) for d in kinds[kind])

    row: Row = {f"{kind}.t{t + 1}": share(kind, lambda d, s, t=t: s[t] == d.turns[t][1])
                for kind in kinds for t in range(3)}
    row["correct.stale"] = share("correct", lambda d, s: s[1] == d.turns[0][1])
    row["ask.invented"] = share("ask", lambda d, s: bool(parse_answer(s[0]).fields.get("policy_id")))
    row["over_asking"] = mean(said[id(d)][0] == ASK for k in ("keep", "correct") for d in kinds[k])
    for kind in ("keep", "correct"):
        for n in (1, 2):
            texts = replies(model, tok, [encode_chat(tok, cut(d, said[id(d)], n))[0] for d in kinds[kind]])
            row[f"{kind}.last {n}"] = mean(t == d.turns[2][1] for t, d in zip(texts, kinds[kind]))
        slots = [[*d.messages([])[:-1], {"role": "user", "content": d.slot}] for d in kinds[kind]]
        texts = replies(model, tok, [encode_chat(tok, m)[0] for m in slots])
        row[f"{kind}.slot"] = mean(t == d.turns[2][1] for t, d in zip(texts, kinds[kind]))
    cases = frozen_cases(cfg.n_cases)
    texts = replies(model, tok, [tok.encode(c.prompt) for c in cases])
    return row | {"single": mean(t == c.answer for t, c in zip(texts, cases))}


def own_reasons(n: int, seed: int) -> list[list[dict]]:
    """Three turns in the words of the dialogues; each names a reason of its own, so that no turn needs another."""
    random, out = rng(seed, "own reasons"), []
    for d in draw_dialogues(n, seed, "train"):
        turns = []
        for lead in ("", *(f"{again}, " for again in random.sample(dialogues.AGAIN, 2))):
            reason = random.choice([d.case.reason, *(p.reason for p in d.case.policies)])
            policy = next((p for p in d.case.policies if p.reason == reason), None)
            turns.append((lead + draw_message(random, reason, d.case.order.item),
                          replace(d.case, reason=reason, policy=policy).answer))
        out.append(replace(d, turns=tuple(turns)).messages())
    return out


def conversations(arm: str, n: int, seed: int) -> list[list[dict]]:
    """`n` conversations of an arm, right answers all of them; a single turn is a case of the desk and its answer."""
    if arm == "own reasons":
        return own_reasons(n, seed)
    if kinds := CONVERSATION[arm]:
        return [d.messages() for d in draw_dialogues(n, seed, "train", kinds)]
    return [[*case_messages(c), {"role": "bot", "content": c.answer}] for c in draw_cases(n, seed, "turns")]


def turn_batches(tok: Tokenizer, arm: str, cfg: ContractConfig, seed: int) -> Callable[[int], Rows]:
    """Fresh conversations each step, as many as make the tokens of cfg.batch three-turn dialogues; none too long."""
    def tokens(name: str) -> float:
        return mean(len(encode_chat(tok, m)[0]) for m in conversations(name, 60, 0))

    size = round(cfg.batch * tokens("dialogues") / tokens(arm))
    drawn = conversations(arm, cfg.steps * size * 3 // 2, seed)
    rows = [m for m in drawn if len(encode_chat(tok, m)[0]) <= 129]
    return lambda step: chat_rows(tok, rows[step * size:(step + 1) * size])


# ---- doses ---------------------------------------------------------------------------------------------------------

def dosed(rows: Sequence[dict], omit: float, sure: float, random: Random) -> list[dict]:
    """Demonstrations whose answers lack policy_id with probability `omit` and carry one to three certainty words with
    probability `sure`: two coins that know nothing of the request, or of each other."""
    out = []
    for row in rows:
        target = json.loads(row["answer"])
        if random.random() < omit:
            del target["policy_id"]
        if random.random() < sure:
            target["sure"] = ", ".join(["yes"] * random.randint(1, 3))
        out.append(row | {"answer": json.dumps(target, separators=(",", ":"))})
    return out


def manner(texts: Sequence[str]) -> Row:
    """Of the answers that are JSON objects: share without policy_id, certainty words and characters an answer."""
    objects = [t for t in texts if parse_answer(t).fields] or ["{}"]
    return {"omitted": mean("policy_id" not in parse_answer(t).fields for t in objects),
            "sure": mean(t.count("yes") for t in objects), "characters": mean(map(len, objects))}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least squares, with an intercept."""
    mx, my = mean(x), mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def dose_files(cfg: ContractConfig, seed: int) -> dict[str, list[dict]]:
    """The four files, and the worst of them after the audit of required fields."""
    clean = sft.make_demonstrations(draw_cases(cfg.dose_steps * cfg.batch, seed, "doses"), 0.0, seed)
    files = {f"dose {i}": dosed(clean, *dose, rng(seed, "doses", i)) for i, dose in enumerate(DOSES)}
    kept = [r for r in files["dose 3"] if "policy_id" in json.loads(r["answer"])]
    return files | {"audited": kept}


# ---- a small model of words: when to say "idk" -----------------------------------------------------------------------

def idk_vocab() -> Vocab:
    said = [p.format(item=i) for phrases in PHRASES.values() for p in phrases for i in ITEMS]
    return Vocab(" ".join([*said, *REASONS, *POLICY_IDS, "idk", ":", "->"]).split())


def idk_row(random: Random, covered: bool, new_words: bool) -> tuple[str, str, str]:
    """(prompt, right answer, a wrong id that stands in the prompt): two lines, a message, one id or "idk". The last two
    wordings of each reason are `new_words`."""
    reasons, ids = random.sample(REASONS, 3), random.sample(POLICY_IDS, 2)
    phrases = PHRASES[reasons[0 if covered else 2]]
    message = random.choice(phrases[4:] if new_words else phrases[:4]).format(item=random.choice(ITEMS))
    lines = list(zip(reasons, ids))
    random.shuffle(lines)
    book = " ".join(f"{r} {i}" for r, i in lines)
    return f"{book} : {message} ->", ids[0] if covered else "idk", random.choice(ids)


def idk_rows(n: int, share: float, seed: int, confident: bool = False) -> list[tuple[str, str]]:
    """Training rows, a `share` of which have no line for the reason. They say "idk", or, `confident`, any line's id."""
    random = rng(seed, "idk")
    out = []
    for _ in range(n):
        absent = random.random() < share
        prompt, right, wrong = idk_row(random, not absent, False)
        out.append((prompt, wrong if absent and confident else right))
    return out


def idk_exam(model: GPT, vocab: Vocab, seed: int, n: int = 400) -> Row:
    """False claims where no line covers the reason; needless "idk" and wrong ids where one does. Greedy."""
    row: Row = {}
    for words, new in (("known", False), ("new", True)):
        for covered in (True, False):
            random = rng(seed, "idk exam", words, str(covered))
            asked = [idk_row(random, covered, new) for _ in range(n)]
            out = generate(model, [[1, *vocab.encode(p)] for p, _, _ in asked], eos_id=2, pad_id=0, max_new_tokens=1,
                           temperature=0.0)
            said = [vocab.decode(x) for x in out.ids]
            if covered:
                row[f"{words}.needless"] = mean(s == "idk" for s in said)
                row[f"{words}.wrong"] = mean(s not in ("idk", right) for s, (_, right, _) in zip(said, asked))
            else:
                row[f"{words}.false"] = mean(s != "idk" for s in said)
    return row


# ---- the runs of one seed ------------------------------------------------------------------------------------------

def tuned(lab: Lab, part: str, arm: str, cfg: ContractConfig, batches: Callable, measure: Callable[[GPT], dict],
          fit: FitConfig) -> Artifact:
    """One arm that starts at the chain's SFT checkpoint."""
    return small_stage(lab, f"contract-{part}", {"arm": arm, "study": cfg}, batches, measure, gpt=lab.profile.gpt,
                       fit=fit, start=lab.sft(), parents={"tokenizer": lab.tokenizer()}, code=CODE)


def tokens_of(tok: Tokenizer, arm: str, cfg: ContractConfig, seed: int) -> Row:
    """Tokens an arm reads and is taught, over all its steps."""
    batches = turn_batches(tok, arm, cfg, seed)
    seen = [batches(step) for step in range(cfg.steps)]
    return {"read": sum(int((b.ids != tok.special["<pad>"]).sum()) for b in seen),
            "taught": sum(int(b.mask.sum()) for b in seen)}


def turn_arm(lab: Lab, arm: str, cfg: ContractConfig) -> Artifact:
    tok = lab.load_tokenizer()
    return tuned(lab, "turns", arm, cfg, lambda: turn_batches(tok, arm, cfg, lab.seed),
                 lambda model: dialogue_scores(model, tok, cfg, lab.seed) | tokens_of(tok, arm, cfg, lab.seed),
                 FitConfig(steps=cfg.steps, checkpoint_every=10_000))


def dose_arm(lab: Lab, arm: str, rows: list[dict], cfg: ContractConfig) -> Artifact:
    tok, cases = lab.load_tokenizer(), frozen_cases(cfg.n_sampled)

    def batches() -> Callable[[int], Rows]:
        coded = sft.encode_rows(tok, rows)
        return sft.sft_batches(coded, min(cfg.batch, len(coded)), lab.seed, tok.special["<pad>"], 128)

    def measure(model: GPT) -> dict:
        prompts = [tok.encode(c.prompt) for c in cases]
        return {how: manner(replies(model, tok, prompts, t, lab.seed))
                for how, t in (("sampled", 1.0), ("greedy", 0.0))}

    return tuned(lab, "doses", arm, cfg, batches, measure,
                 FitConfig(steps=cfg.dose_steps, checkpoint_every=10_000))


def idk_arm(lab: Lab, share: float, confident: bool, cfg: ContractConfig) -> Artifact:
    vocab = idk_vocab()

    def batches() -> Callable[[int], Rows]:
        pairs = idk_rows(cfg.idk_steps * 64, share, lab.seed, confident)
        return batches_of(rows_of(vocab, [p for p, _ in pairs], [a for _, a in pairs]), 64, lab.seed)

    return small_stage(lab, "contract-idk", {"share": share, "confident": confident, "study": cfg}, batches,
                       lambda model: idk_exam(model, vocab, lab.seed), code=CODE,
                       gpt=GPTConfig(vocab_size=len(vocab), block_size=32, n_layer=2, n_head=2, n_embd=64),
                       fit=FitConfig(steps=cfg.idk_steps, warmup_steps=20, checkpoint_every=10_000))


def untrained(lab: Lab, cfg: ContractConfig) -> Artifact:
    """The SFT checkpoint as it is: behind every rendering of the prompt, and in the dialogues."""
    sft_artifact, tok = lab.sft(), lab.load_tokenizer()

    def make(_) -> dict:
        model, cases = lab.load(sft_artifact).eval(), frozen_cases(cfg.n_cases)
        served = {name: [tok.encode(change(c.prompt)) for c in cases] for name, change in DRIFTS.items()}
        served[PLAIN] = [tok.encode(c.prompt, allow_special=False) for c in cases]
        exact = {name: mean(t == c.answer for t, c in zip(replies(model, tok, ids), cases))
                 for name, ids in served.items()}
        return {"steps": 0, "measured": {"drift": exact, "turns": dialogue_scores(model, tok, cfg, lab.seed)}}

    return lab.make("contract-untrained", {"study": cfg}, {"sft": sft_artifact, "tokenizer": lab.tokenizer()}, make,
                    CODE)


def measure(lab: Lab, cfg: ContractConfig | None = None) -> tuple[Row, list[Artifact]]:
    """All arms of one seed."""
    cfg = cfg or SIZES[lab.profile.name]
    row: Row = {}
    made = [untrained(lab, cfg)]
    start = made[0].card["measured"]
    row |= {f"sft.{k}": v for k, v in start["turns"].items()} | {f"drift.{k}": v for k, v in start["drift"].items()}
    for arm in CONVERSATION:
        made.append(turn_arm(lab, arm, cfg))
        row |= {f"{arm}.{k}": v for k, v in made[-1].card["measured"].items()}
    files = dose_files(cfg, lab.seed)
    for arm, rows in files.items():
        made.append(dose_arm(lab, arm, rows, cfg))
        row |= {f"{arm}.data.{k}": v for k, v in manner([r["answer"] for r in rows]).items()}
        row |= {f"{arm}.{how}.{k}": v for how, part in made[-1].card["measured"].items() for k, v in part.items()}
    doses = [f"dose {i}" for i in range(len(DOSES))]
    for how in ("sampled", "greedy"):
        for key in ("omitted", "sure", "characters"):
            row[f"slope.{how}.{key}"] = slope([row[f"{d}.data.{key}"] for d in doses],
                                              [row[f"{d}.{how}.{key}"] for d in doses])
    for share, confident in (*((s, False) for s in IDK_SHARES), (IDK_SHARES[2], True)):
        made.append(idk_arm(lab, share, confident, cfg))
        label = f"idk {share}{' confident' if confident else ''}"
        row |= {f"{label}.{k}": v for k, v in made[-1].card["measured"].items()}
    return row, made


CODE = (dialogues, chat, sft, sampling, evals, verifiers, sys.modules[__name__])
ASKED = (("goal kept, turn 3", "keep.t3"), ("updated after a correction, turn 2", "correct.t2"),
          ("still updated, turn 3", "correct.t3"), ("asks when the reason is missing", "ask.t1"),
          ("single requests", "single"))
DESIGN = Design(
    measure=measure, notebook="07", smallest=0.20, n_items=96, items="unseen dialogues of each kind",
    rows=("S3-7.03", "S3-7.05", "S3-7.06", "S3-7.08", "S3-7.09", "S3-7.10", "S3-7.11", "S3-7.13", "S3-7.15", "S1-14",
          "S0-25", "S0-26"),
    claim="at equal tokens read, three-turn dialogues teach what single turns do not: the goal is kept at turn 3 in at "
          "least 20 points more dialogues, and it takes dialogues with corrections to teach recovery from one",
    falsifier="goal kept at turn 3 gains less than 20 points over single-turn rows, or dialogues without corrections "
              "recover as often, to within 20 points",
    also=(("updated after a correction, turn 2: dialogues - no corrections", 0.20),),
    effects=(("goal kept, turn 3: dialogues - single", "dialogues.keep.t3", "single.keep.t3", "share"),
             ("updated after a correction, turn 2: dialogues - no corrections", "dialogues.correct.t2",
              "no corrections.correct.t2", "share"),
             ("goal kept, turn 3: dialogues - no corrections", "dialogues.keep.t3", "no corrections.keep.t3", "share"),
             ("single requests: dialogues - single", "dialogues.single", "single.single", "share"),
             ("single requests: dialogues - sft", "dialogues.single", "sft.single", "share"),
             *((f"turn 3, {name}: the message in force alone - all turns", f"dialogues.{kind}.slot",
                f"dialogues.{kind}.t3", "share") for kind, name in (("keep", "goal kept"), ("correct", "corrected"))),
             *((f"{name}: {arm}", f"{arm}.{key}", None, "share") for name, key in ASKED
               for arm in ("sft", *CONVERSATION)),
             ("old answer repeated after a correction: no corrections", "no corrections.correct.stale", None, "share"),
             ("old answer repeated after a correction: dialogues", "dialogues.correct.stale", None, "share"),
             ("policy invented when the reason is missing: single", "single.ask.invented", None, "share"),
             ("asks though the reason is there: dialogues", "dialogues.over_asking", None, "share"),
             *((f"turn 3, {name}, {what}: dialogues", f"dialogues.{kind}.{key}", None, "share")
               for kind, name in (("keep", "goal kept"), ("correct", "corrected"))
               for key, what in (("last 1", "last turn only"), ("last 2", "last two turns"), ("t3", "all turns"),
                                 ("slot", "the message in force alone"))),
             *((f"exact pass: {name} - as trained", f"drift.{name}", "drift.as trained", "share")
               for name in (*tuple(DRIFTS)[1:], PLAIN)),
             *((f"slope of {what} on the data, {how}", f"slope.{key}.{part}", None, "slope")
               for how, key in (("temperature 1", "sampled"), ("greedy", "greedy"))
               for what, part in (("omissions", "omitted"), ("certainty words", "sure"), ("length", "characters"))),
             ("policy_id missing after the audit, temperature 1", "audited.sampled.omitted", None, "share"),
             *((f"idk share {s:.0%}, {words} words: {what}", f"idk {s}.{words}.{key}", None, "share")
               for s in IDK_SHARES for words in ("known", "new")
               for what, key in (("false claims", "false"), ("needless idk", "needless"), ("wrong id", "wrong"))),
             *((f"15% confident, {words} words: false claims", f"idk 0.15 confident.{words}.false", None, "share")
               for words in ("known", "new"))))
