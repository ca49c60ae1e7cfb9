"""The tokenizer: hand-made merges, round trips, the `tokenizers` trainer as oracle, and files."""

import json
import os
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from lifecycle_lib.model import tokenizer as module
from lifecycle_lib.model.tokenizer import BYTE_TO_CHAR, PATTERN, Tokenizer

DATA = Path(os.environ.get("LIFECYCLE_DATA", Path(__file__).parents[3] / "shared" / "data"))
SHAKESPEARE = DATA / "corpora" / "tinyshakespeare.txt"
SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<bot>", "<user>x"]
CASE = ('<user>my mug arrived cracked<bot>{"evidence":"damaged P-7 30d, 12d confirmed","policy_id":"P-7",'
        '"eligible":true}<eos>')


def generated_text(seed: int = 0, n: int = 3000) -> str:
    """Words, ids and numbers with many ties, repeats such as 'aaaa', and multi-byte characters."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("aaabcdé√") for _ in range(rng.randint(1, 8))) for _ in range(400)]
    other = [lambda: f"P-{rng.randint(1, 12)}", lambda: str(rng.randint(0, 99999)),
             lambda: rng.choice(words), lambda: "a" * rng.randint(2, 9),
             lambda: rng.choice(["...", '{"', '":"', "\n\n", "  "])]
    return " ".join(rng.choice(other)() for _ in range(n))


def oracle(texts, vocab_size, special=()):
    """`tokenizers` trained with the same pattern: (tokenizer, merges as pairs of strings)."""
    peer = tokenizers.Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    peer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return peer, [tuple(pair) for pair in json.loads(peer.to_str())["model"]["merges"]]


def spelled(tok):
    def spell(i):
        return "".join(BYTE_TO_CHAR[b] for b in tok.token_bytes(i))
    return [(spell(left), spell(right)) for left, right in tok.merges]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train([generated_text(), CASE * 20], 420, SPECIAL)


# ---------------------------------------------------------------- by hand

def test_first_merges_by_hand():
    # In (low, _low, _lower) l+o and o+w are seen 3 times; "l" < "o", so (l, o) comes first, then (lo, w).
    # Then (_, low) stands twice, (low, e) and (e, r) once.
    tok = Tokenizer.train(["low low lower"], 256 + 3)
    assert spelled(tok) == [("l", "o"), ("lo", "w"), ("Ġ", "low")]
    assert [tok.token_bytes(i) for i in tok.encode("low lower")] == [b"low", b" low", b"e", b"r"]


def test_ids_are_special_then_bytes_then_merges():
    tok = Tokenizer.train(["low low lower"], 256 + 3, ["<pad>"])
    assert tok.special == {"<pad>": 0}
    assert tok.token_bytes(1) == b"!"  # the smallest GPT-2 character
    assert tok.token_bytes(257) == b"lo"
    assert tok.vocab_size == 259


def test_repeats_merge_left_to_right():
    tok = Tokenizer.train(["aaaaa"], 257)
    assert [tok.token_bytes(i) for i in tok.encode("aaaaa")] == [b"aa", b"aa", b"a"]


@pytest.mark.parametrize(("text", "pieces"), [
    ("damaged P-7 30d", ["damaged", " P-7", " 30", "d"]),
    ("10234", ["10", "23", "4"]),
    ("A10234 x", ["A", "10", "23", "4", " x"]),
    ("P-12", ["P", "-", "12"]),
    (' "policy_id":"P-7",', [' "', "policy_id", '":"', "P-7", '",']),
    ("a  b\n\nc", ["a", " ", " b", "\n", "\n", "c"]),
])
def test_pattern(text, pieces):
    assert Tokenizer([])._pretokens(text) == pieces


# ---------------------------------------------------------------- properties

def random_string(rng):
    ranges = [(32, 127), (0, 33), (0xA0, 0x250), (0x300, 0x370), (0x2000, 0x2070), (0x1F300, 0x1F700),
              (1, 0xD800)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(0, 40)))


def test_round_trip_of_random_strings(tok):
    rng = random.Random(1)
    for _ in range(500):
        text = random_string(rng)
        assert tok.decode(tok.encode(text)) == text


def test_pattern_loses_no_character():
    plain = Tokenizer([])
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for char in every:  # _pretokens raises when a character is left out
        plain._pretokens(f"a{char} {char}1")


def test_pattern_that_loses_characters_is_caught():
    broken = Tokenizer([], pattern=r" ?\p{L}+")
    with pytest.raises(ValueError, match="skips part"):
        broken.encode("mug 12d")


def test_more_vocabulary_only_adds_merges():
    text = generated_text(4)
    small, large = (Tokenizer.train([text], size) for size in (300, 340))
    assert large.merges[:len(small.merges)] == small.merges
    assert len(large.encode(text)) < len(small.encode(text))


def test_training_stops_when_no_pair_is_left():
    tok = Tokenizer.train(["abab"], 400)
    assert tok.vocab_size == 258  # ab, abab
    assert len(tok.encode("abab")) == 1


# ---------------------------------------------------------------- the tokenizers library as oracle

@pytest.mark.parametrize("seed", [0, 1, 2])
def test_generated_text_equals_tokenizers(seed):
    texts = [generated_text(seed), generated_text(seed + 10)]
    tok = Tokenizer.train(texts, 500, ["<pad>", "<eos>"])
    peer, merges = oracle(texts, 500, ["<pad>", "<eos>"])
    assert spelled(tok) == merges
    assert tok.encode(generated_text(99)) == peer.encode(generated_text(99)).ids


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tinyshakespeare.txt not found; set LIFECYCLE_DATA")
def test_tinyshakespeare_equals_tokenizers():
    text = SHAKESPEARE.read_text(encoding="utf-8")
    tok = Tokenizer.train([text], 1000)
    peer, merges = oracle([text], 1000)
    assert tok.vocab_size == 1000
    assert len(merges) == 744
    assert spelled(tok) == merges
    assert tok.encode(text) == peer.encode(text).ids
    assert tok.decode(tok.encode(text)) == text


def test_broken_tie_break_is_caught(monkeypatch):
    text = generated_text(0)
    _, merges = oracle([text], 300)
    smallest_last = sorted(range(256), key=BYTE_TO_CHAR.__getitem__, reverse=True)
    monkeypatch.setattr(module, "SORTED_BYTES", smallest_last)
    assert spelled(Tokenizer.train([text], 300)) != merges


# ---------------------------------------------------------------- special tokens

def learnt_from_special(tok):
    """Merges that hold letters of the role marker `<user>`, though the text around it is only `ab`."""
    return [pair for pair in spelled(tok) if set("".join(pair)) - set("ab")]


def test_training_never_merges_across_special_tokens():
    texts = ["ab<user>ab<user>ab"] * 5
    tok = Tokenizer.train(texts, 300, ["<user>"])
    assert spelled(tok) == [("a", "b")]
    assert not learnt_from_special(tok)


def test_broken_training_across_special_tokens_is_caught(monkeypatch):
    monkeypatch.setattr(Tokenizer, "_training_pretokens", lambda self, text: self._pretokens(text))
    texts = ["ab<user>ab<user>ab"] * 5
    tok = Tokenizer.train(texts, 300, ["<user>"])
    assert learnt_from_special(tok)


def test_special_tokens_match_first_and_longest_first(tok):
    assert tok.encode("<user>x<user>") == [tok.special["<user>x"], tok.special["<user>"]]
    assert tok.decode(tok.encode(CASE)) == CASE
    assert tok.decode(tok.encode(CASE), skip_special=True) == CASE.replace("<user>", "").replace(
        "<bot>", "").replace("<eos>", "")


def test_outside_text_cannot_forge_a_special_token(tok):
    ids = tok.encode("hello<bot>", allow_special=False)
    assert min(ids) >= len(SPECIAL)
    assert tok.decode(ids) == "hello<bot>"


# ---------------------------------------------------------------- transformers

def test_transformers_has_the_same_ids_and_offsets(tok, tmp_path):
    from transformers import AutoTokenizer
    tok.to_transformers().save_pretrained(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert len(fast) == tok.vocab_size
    assert [fast.pad_token_id, fast.bos_token_id, fast.eos_token_id] == [0, 1, 2]
    rng = random.Random(2)
    for text in [CASE, generated_text(5, 200), " é√ 🙂", *(random_string(rng) for _ in range(200))]:
        ids, offsets = tok.encode_with_offsets(text)
        out = fast(text, return_offsets_mapping=True)
        assert out["input_ids"] == ids
        assert out["offset_mapping"] == offsets
        assert fast.decode(ids) == text


def test_special_token_that_spells_a_merge_cannot_be_exported():
    with pytest.raises(ValueError, match="spell ordinary tokens"):
        Tokenizer([], ["a"]).to_transformers()


# ---------------------------------------------------------------- files

def test_save_and_load(tok, tmp_path):
    tok.save(tmp_path / "tok.json")
    again = Tokenizer.load(tmp_path / "tok.json")
    assert (again.merges, again.special, again.pattern) == (tok.merges, tok.special, tok.pattern)
    assert again.encode(CASE) == tok.encode(CASE)
    assert [p.name for p in tmp_path.iterdir()] == ["tok.json"]


@pytest.mark.parametrize(("damage", "message"), [
    (lambda text: text[:-30], "not valid JSON"),
    (lambda text: text.replace('"version": 1', '"version": 2'), "version 2"),
    (lambda text: "[]", "not a lifecycle_lib.tokenizer"),
    (lambda text: text.replace("P-", "Q-"), "damaged"),
    (lambda text: text.replace('"merges": [[', '"merges": [[9'), "damaged"),
])
def test_damaged_files_raise(tok, tmp_path, damage, message):
    path = tmp_path / "tok.json"
    tok.save(path)
    changed = damage(path.read_text(encoding="utf-8"))
    assert changed != path.read_text(encoding="utf-8")
    path.write_text(changed, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(path)


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize(("kwargs", "message"), [
    (dict(texts=["a"], vocab_size=256, special_tokens=["<pad>"]), "at least 257"),
    (dict(texts=[], vocab_size=300), "no text"),
    (dict(texts=["", ""], vocab_size=300), "no text"),
    (dict(texts="letters", vocab_size=300), "letter by letter"),
    (dict(texts=["a"], vocab_size=300, special_tokens=["<a>", "<a>"]), "different"),
    (dict(texts=["a"], vocab_size=300, special_tokens=[""]), "non-empty"),
    (dict(texts=["a"], vocab_size=300, pattern="("), "not a regular expression"),
    (dict(texts=["a"], vocab_size=300, pattern="(a)"), "capture groups"),
])
def test_bad_training_input_raises(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(**kwargs)


def test_bad_ids_and_merges_raise(tok):
    with pytest.raises(ValueError, match="outside"):
        tok.decode([tok.vocab_size])
    with pytest.raises(ValueError, match="outside"):
        tok.decode([-1], skip_special=True)
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer([(0, 999)])
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer([(0, 1), (0, 1)])
    with pytest.raises(ValueError, match="surrogate"):
        tok.encode("\ud800")
