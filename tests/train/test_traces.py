"""Tool traces: which tokens count, what the tool takes, and a model that follows one through."""

import pytest
import torch

from lifecycle_lib.desk.cases import draw_cases, golden_case
from lifecycle_lib.train.logprobs import answer_loss, token_logps
from lifecycle_lib.train.loop import FitConfig, fit
from lifecycle_lib.train.traces import Trace, follow, make_trace, order_store, trace_rows


def counted_text(tok, rows, i: int) -> str:
    return tok.decode(rows.ids[i][rows.mask[i]].tolist())


def test_golden_case_by_hand(tok):
    trace = make_trace(golden_case())
    assert trace.call == "lookup_order A10234" and trace.result.endswith(" 12d confirmed<bot>")
    assert "12d" not in trace.prompt and trace.prompt.endswith("<note>lookup_order<bot>")
    rows = trace_rows(tok, [trace])
    assert counted_text(tok, rows, 0) == f"{trace.call}<eos>{trace.answer}<eos>"
    assert tok.decode(rows.ids[0].tolist()) == f"{trace.prompt}{trace.call}<eos>{trace.result}{trace.answer}<eos>"


def test_results_carry_no_loss_whatever_they_say(make_model, tok):
    """Property: the loss on a trace equals the losses of its two demonstrations; a masked-in result is caught."""
    trace = make_trace(draw_cases(1, 3, "trace")[0])
    model = make_model(noise=0.2, block_size=160)
    whole = trace_rows(tok, [trace])
    first = trace_rows(tok, [Trace(prompt=trace.prompt, call=trace.call, result="", answer=trace.answer)])
    n_call = len(tok.encode(trace.call)) + 1
    logps = token_logps(model, whole)[0][whole.mask[0, 1:]]
    assert torch.allclose(logps[:n_call], token_logps(model, first)[0][first.mask[0, 1:]][:n_call], atol=1e-5)
    taught = whole.mask.clone()
    taught[0, taught[0].nonzero()[0].item():] = True  # the classic: everything after the prompt counts
    assert int(taught.sum()) - int(whole.mask.sum()) == len(tok.encode(trace.result))
    assert counted_text(tok, type(whole)(whole.ids, taught), 0) != f"{trace.call}<eos>{trace.answer}<eos>"


def test_tool_takes_its_own_name_only():
    cases = draw_cases(5, 0, "store")
    tool = order_store(cases, "find_order")
    assert tool(f"find_order {cases[2].order.order_id}") == cases[2].order.line()
    for call in (f"lookup_order {cases[2].order.order_id}", "find_order A00000", "find_order", ""):
        assert tool(call) is None


def test_a_model_that_learnt_traces_follows_them(make_model, tok):
    cases = draw_cases(2, 0, "follow")
    traces = [make_trace(c) for c in cases]
    rows, model = trace_rows(tok, traces), make_model(block_size=160, token_shift=True)
    untrained = follow(model, tok, traces, order_store(cases))
    assert not any(f.taken for f in untrained) and all(f.answer is None for f in untrained)
    fit(model, lambda _: rows, answer_loss, FitConfig(steps=140, warmup_steps=2))
    followed = follow(model, tok, traces, order_store(cases))
    assert [f.call for f in followed] == [t.call for t in traces]
    assert [f.answer for f in followed] == [c.answer for c in cases]
    assert not any(f.taken for f in follow(model, tok, traces, order_store(cases, "find_order")))  # renamed: refused


def test_bad_input_is_named(tok):
    case = draw_cases(1, 0, "bad")[0]
    with pytest.raises(ValueError, match="one word"):
        make_trace(case, "look up")
    with pytest.raises(ValueError, match="trace 0: call ''"):
        trace_rows(tok, [Trace(prompt="<bos>", call="", result="", answer="{}")])
    with pytest.raises(ValueError, match="at least one"):
        trace_rows(tok, [])
