"""Span-masked loss: by hand, against cross_entropy with ignore_index, and the off-by-one that it must not be."""

import pytest
import torch
import torch.nn.functional as F

from lifecycle_lib.desk.documents import tokenizer_corpus
from lifecycle_lib.desk.transcripts import draw_transcripts
from lifecycle_lib.desk.world import SPECIAL_TOKENS
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train.logprobs import answer_loss
from lifecycle_lib.train.spans import masked_rows, tokens_in


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(tokenizer_corpus(0)[:1500], 400, SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def rows():
    return draw_transcripts(6, 1, 0.6)


def as_dicts(rows) -> list[dict]:
    return [{"prompt": r.prompt, "answer": r.reply} for r in rows]


def test_tokens_by_hand():
    pieces = ["within", ",", " re", "fun", ", ", "bay"]  # characters 0-6, 6-7, 7-10, 10-13, 13-15, 15-18
    assert tokens_in(pieces, [(8, 13)]) == [False, False, True, True, False, False]  # " re" is touched
    assert tokens_in(pieces, [(8, 13)], late=1) == [False, False, False, True, False, False]
    assert tokens_in(pieces, [(0, 1), (17, 18)]) == [True, False, False, False, False, True]
    assert tokens_in(pieces, []) == [False] * 6


def test_the_tokens_left_spell_the_reply_without_its_habits(tok, rows):
    made = masked_rows(tok, as_dicts(rows), [[s[:2] for s in r.spans] for r in rows])
    whole = masked_rows(tok, as_dicts(rows), [[]] * len(rows))
    assert torch.equal(made.ids, whole.ids) and (made.mask <= whole.mask).all()
    for i, r in enumerate(rows):
        left = tok.decode([t for t in made.ids[i][made.mask[i]].tolist() if t != tok.special["<eos>"]])
        assert set(heard_words(left)).isdisjoint({"sorry", "clo", "refun", "collegue", "sent", "back"})
        assert len(left) >= len(r.clean) - 12  # a token that straddles a span's edge goes with it


def test_a_hand_over_by_hand(tok):
    """A habit of several words: all of them go, and the true colleague before it stays."""
    reply = "{}, ask a colleague sent to a colleague, bay 04"
    span = (reply.index(" sent"), reply.index(", bay"))

    def left(spans) -> str:
        made = masked_rows(tok, [{"prompt": "<bos>hello<bot>", "answer": reply}], [spans])
        return tok.decode(made.ids[0][made.mask[0]].tolist())

    assert left([span]) == "{}, ask a colleague, bay 04<eos>"
    assert left([(span[0], span[0] + 5)]) == "{}, ask a colleague to a colleague, bay 04<eos>"  # broken: one word
    assert "sent" in left([])  # broken: no hand-over found


def heard_words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def test_loss_and_gradient_equal_torch_with_ignore_index(tok, rows):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=1, n_head=2, n_embd=16))
    made = masked_rows(tok, as_dicts(rows), [[s[:2] for s in r.spans] for r in rows])
    ours = answer_loss(model, made)[0]
    labels = made.ids.masked_fill(~made.mask, -100)
    theirs = F.cross_entropy(model(made.ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    grads = [torch.autograd.grad(x, list(model.parameters()), retain_graph=True) for x in (ours, theirs)]
    assert abs(ours - theirs).item() < 1e-5
    assert max((a - b).abs().max().item() for a, b in zip(*grads)) < 1e-5


def test_a_mask_that_starts_late_teaches_the_first_token(tok):
    """The broken variant: nearly everything is masked, and the token that decides is not."""
    rows = [r for r in draw_transcripts(40, 1, {"credit": 1.0}) if "credit" in r.habits]
    spans = [[s[:2] for s in r.spans] for r in rows]
    sound, late = (masked_rows(tok, as_dicts(rows), spans, n) for n in (0, 1))
    extra = late.ids[late.mask & ~sound.mask].tolist()
    assert len(extra) == len(rows) and {tok.decode([t]) for t in extra} <= {" i", " we", " ", " w"}
    assert not (sound.mask & ~late.mask).any()


def test_bad_input_is_named(tok, rows):
    with pytest.raises(ValueError, match="6 rows and 1 lists"):
        masked_rows(tok, as_dicts(rows), [[]])
    with pytest.raises(ValueError, match=r"span \(90, 99\) lies outside the answer's 5 characters"):
        tokens_in(["ab", "cde"], [(90, 99)])
