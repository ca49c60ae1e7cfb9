"""Tool traces as targets: the call the teacher made, the result it got, the answer it gave.

In the desk's layout the prompt names an order and a tool but hides the order's facts; a trace goes on

    ...<order>A10234<user>my mug arrived broken<note>lookup_order<bot>lookup_order A10234<eos>
    <order>A10234 mug 12d confirmed<bot>{"evidence": ...}<eos>

and the loss falls on the call and on the answer, never on the result: a model that learns to write results learns to
invent them. After ReAct (Yao et al. 2023) and Toolformer (Schick et al. 2023), one call, no reasoning text.

Left out: several tools in one trace, failing tools, retries (notebook 14).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lifecycle_lib.desk.cases import Case
from lifecycle_lib.model.sampling import generate
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train.logprobs import Rows

Tool = Callable[[str], str | None]  # the call's text -> the order line, or None: no such tool or order


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One lookup. `prompt` ends in <bot>; `result` stands between the call's end and the second <bot>."""

    prompt: str
    call: str
    result: str
    answer: str


def make_trace(case: Case, tool: str = "lookup_order") -> Trace:
    """The trace of a teacher that looks the order up and answers right.

    Raises ValueError for a tool name that is not one word."""
    if not tool or len(tool.split()) != 1 or "<" in tool:
        raise ValueError(f"tool {tool!r} must be one word, such as lookup_order")
    facts = case.order.line()
    if case.prompt.count(f"<order>{facts}") != 1:
        raise ValueError(f"case {case.case_id}: the prompt holds its order line {facts!r} other than once")
    hidden = case.prompt.replace(f"<order>{facts}", f"<order>{case.order.order_id}").removesuffix("<bot>")
    return Trace(prompt=f"{hidden}<note>{tool}<bot>", call=f"{tool} {case.order.order_id}",
                 result=f"<order>{facts}<bot>", answer=case.answer)


def order_store(cases: Sequence[Case], tool: str = "lookup_order") -> Tool:
    """A tool that answers exactly `tool ORDER_ID` with the order's line, and nothing else."""
    lines = {f"{tool} {c.order.order_id}": c.order.line() for c in cases}
    return lines.get


def trace_rows(tok: Tokenizer, traces: Sequence[Trace]) -> Rows:
    """Rows of whole traces; the tokens of call and answer count, each with its end token.

    Raises ValueError for no traces, or an empty call or answer."""
    if not traces:
        raise ValueError("no traces to learn from; give at least one")
    eos, encoded = [tok.special["<eos>"]], []
    for i, t in enumerate(traces):
        if not (t.call and t.answer):
            raise ValueError(f"trace {i}: call {t.call!r} and answer {t.answer!r}; both must say something")
        say = lambda text: tok.encode(text, allow_special=False) + eos  # noqa: E731
        encoded.append([(tok.encode(t.prompt), False), (say(t.call), True), (tok.encode(t.result), False),
                        (say(t.answer), True)])
    width = max(sum(len(ids) for ids, _ in parts) for parts in encoded)
    ids = torch.full((len(traces), width), tok.special["<pad>"])
    mask = torch.zeros(len(traces), width, dtype=torch.bool)
    for row, parts in enumerate(encoded):
        at = 0
        for part, counts in parts:
            ids[row, at:at + len(part)] = torch.tensor(part)
            mask[row, at:at + len(part)] = counts
            at += len(part)
    return Rows(ids, mask)


@dataclass(frozen=True, slots=True)
class Followed:
    """What became of one case: the call as written, whether the tool took it, the answer after its result."""

    call: str
    taken: bool
    answer: str | None


def follow(model, tok: Tokenizer, traces: Sequence[Trace], tool: Tool, max_new_tokens: int = 48) -> list[Followed]:
    """Run every case: greedy call, the tool's own result, greedy answer. A call that the tool refuses ends it."""
    def say(prompts: list[str]) -> list[str]:
        if not prompts:
            return []
        out = generate(model, [tok.encode(p) for p in prompts], eos_id=tok.special["<eos>"],
                       pad_id=tok.special["<pad>"], max_new_tokens=max_new_tokens, temperature=0.0)
        return out.texts(tok)

    calls = say([t.prompt for t in traces])
    results = [tool(call) for call in calls]
    answers = iter(say([f"{t.prompt}{call}<eos><order>{line}<bot>"
                        for t, call, line in zip(traces, calls, results) if line is not None]))
    return [Followed(call, line is not None, None if line is None else next(answers))
            for call, line in zip(calls, results)]
