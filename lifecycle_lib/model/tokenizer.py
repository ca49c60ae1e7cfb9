"""Byte-level byte-pair encoding: text to token ids and back.

Merges as in Sennrich et al. 2016 (arXiv:1508.07909, algorithm 1), over the byte alphabet of GPT-2 (Radford
et al. 2019), so that no text is ever unknown. Text is first cut into *pretokens* by PATTERN; merges never
cross a pretoken. Training counts each distinct pretoken once; after a merge only the words that held the pair
are counted again.

Ids: special tokens in the order given, then the 256 bytes sorted by their GPT-2 character, then one id per
new merged string. Ties in count go to the smaller (left id, right id). That is the order of the `tokenizers`
BpeTrainer, and the tests compare the two merge for merge.

Leaves out: normalisation, minimum frequencies, dropout, and parallel training.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import regex

from lifecycle_lib.core.records import read_json, write_text

# A policy id with its leading space is one pretoken; numbers come in groups of at most two digits; then
# words, runs of punctuation, whitespace. Every character fits one of the last five: no byte is lost.
PATTERN = r" ?P-[0-9](?!\p{N})| ?\p{N}{1,2}| ?[\p{L}_]+| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"

FORMAT, VERSION = "lifecycle_lib.tokenizer", 1
_CACHE_LIMIT = 1 << 17  # distinct pretokens remembered by encode

Pair = tuple[int, int]


def byte_alphabet() -> dict[int, str]:
    """GPT-2's byte -> printable character map: visible Latin-1 stays, the other 68 bytes start at 256."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


BYTE_TO_CHAR = byte_alphabet()
SORTED_BYTES = sorted(range(256), key=BYTE_TO_CHAR.__getitem__)  # base id order


class Tokenizer:
    """A trained byte-level BPE tokenizer. Make one with `Tokenizer.train` or `Tokenizer.load`.

    Attributes: `special` {name: id}, `merges` [(left id, right id)] in rank order, `pattern`, `vocab_size`.
    """

    def __init__(self, merges: Iterable[Pair], special_tokens: Sequence[str] = (), pattern: str = PATTERN):
        """Raises ValueError for a bad pattern, empty or repeated special tokens, a merge of an unknown id."""
        self.pattern = pattern
        self._pretoken = _compile(pattern)
        self._special_split = _special_splitter(special_tokens)
        self.special = {name: i for i, name in enumerate(special_tokens)}
        self._bytes = [name.encode() for name in special_tokens]  # id -> bytes
        self._bytes += [bytes([b]) for b in SORTED_BYTES]
        n_special = len(self.special)
        self._base = {b: n_special + i for i, b in enumerate(SORTED_BYTES)}
        self._id = {token: i for i, token in enumerate(self._bytes) if i >= n_special}
        self.merges: list[Pair] = []
        self._rank: dict[Pair, tuple[int, int]] = {}  # pair -> (rank, merged id)
        self._cache: dict[str, list[int]] = {}
        for left, right in merges:
            self._add_merge(left, right)

    def _add_merge(self, left: int, right: int) -> int:
        """Append one merge and return the merged id: a string that is already a token keeps its id."""
        known = range(len(self.special), len(self._bytes))
        if left not in known or right not in known or (left, right) in self._rank:
            raise ValueError(f"merge {len(self.merges)} ({left}, {right}) is repeated or names an id outside "
                             f"[{known.start}, {known.stop}); the merge list is damaged: train again")
        merged = self._bytes[left] + self._bytes[right]
        if merged not in self._id:
            self._id[merged] = len(self._bytes)
            self._bytes.append(merged)
        self._rank[left, right] = (len(self.merges), self._id[merged])
        self.merges.append((left, right))
        return self._id[merged]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (),
              pattern: str = PATTERN) -> Tokenizer:
        """Learn merges until there are `vocab_size` tokens, or until no pair is left (then there are fewer).

        Raises ValueError when vocab_size < 256 + special tokens, or `texts` is one string or holds no text.
        """
        tok = cls([], special_tokens, pattern)
        if vocab_size < tok.vocab_size:
            raise ValueError(f"vocab_size={vocab_size} is too small: the 256 bytes and {len(tok.special)} "
                             f"special tokens need at least {tok.vocab_size}")
        if isinstance(texts, str):
            raise ValueError("texts is one string and would be read letter by letter; pass a list: [text]")
        counts = Counter(piece for text in texts for piece in tok._training_pretokens(text))
        if not counts:
            raise ValueError("texts holds no text; pass at least one non-empty string")

        words = [[tok._base[b] for b in piece.encode()] for piece in counts]
        weights = list(counts.values())
        pair_count: Counter[Pair] = Counter()
        where: defaultdict[Pair, set[int]] = defaultdict(set)  # pair -> indices of the words that hold it
        for i, word in enumerate(words):
            for pair in pairwise(word):
                pair_count[pair] += weights[i]
                where[pair].add(i)
        # Most frequent first, then the smaller pair. Entries go stale as counts change: checked when popped.
        heap = [(-n, pair) for pair, n in pair_count.items()]
        heapq.heapify(heap)

        while tok.vocab_size < vocab_size and heap:
            n, pair = heapq.heappop(heap)
            if -n != pair_count[pair]:
                if pair_count[pair] > 0:
                    heapq.heappush(heap, (-pair_count[pair], pair))
                continue
            # A pair comes back only when a later merge spelled a string that already had an id.
            new_id = tok._rank[pair][1] if pair in tok._rank else tok._add_merge(*pair)
            grown = set()
            for i in where.pop(pair):
                for old in pairwise(words[i]):
                    pair_count[old] -= weights[i]
                words[i] = _merge(words[i], pair, new_id)
                for new in pairwise(words[i]):
                    pair_count[new] += weights[i]
                    if new_id in new:
                        where[new].add(i)
                        grown.add(new)
            for new in grown:
                heapq.heappush(heap, (-pair_count[new], new))
        return tok

    def _training_pretokens(self, text: str) -> Iterable[str]:
        """Pretokens of ordinary text; special tokens are cut out, so that no merge is learnt across one."""
        for part in self._special_split.split(text) if self._special_split else [text]:
            if part not in self.special:
                yield from self._pretokens(part)

    def _pretokens(self, text: str) -> list[str]:
        pieces = self._pretoken.findall(text)
        if sum(map(len, pieces)) != len(text):
            raise ValueError(f"pattern {self.pattern!r} skips part of {text[:40]!r}; every character must "
                             "match (end the pattern with |.|\\n)")
        return pieces

    def _bpe(self, piece: str) -> list[int]:
        """Merge one pretoken, lowest rank first, until no known pair is left."""
        ids = self._cache.get(piece)
        if ids is None:
            ids = [self._base[b] for b in piece.encode()]
            while len(ids) > 1:
                pair = min(pairwise(ids), key=lambda p: self._rank.get(p, (len(self.merges), -1)))
                if pair not in self._rank:
                    break
                ids = _merge(ids, pair, self._rank[pair][1])
            if len(self._cache) < _CACHE_LIMIT:
                self._cache[piece] = ids
        return ids

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens match first; allow_special=False reads them as plain text.

        Use allow_special=False for text from outside (a customer's message): it must not forge a role marker.
        Raises UnicodeEncodeError (a ValueError) for lone surrogates.
        """
        parts = self._special_split.split(text) if allow_special and self._special_split else [text]
        ids: list[int] = []
        for part in parts:
            if allow_special and part in self.special:
                ids.append(self.special[part])
            else:
                for piece in self._pretokens(part):
                    ids += self._bpe(piece)
        return ids

    def encode_with_offsets(self, text: str,
                            allow_special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, for each, the (start, end) characters it touches (pieces of one share its span)."""
        ids = self.encode(text, allow_special)
        char_at = [i for i, char in enumerate(text) for _ in char.encode()]  # byte index -> character index
        spans, start = [], 0
        for token in ids:
            end = start + len(self._bytes[token])
            spans.append((char_at[start], char_at[end - 1] + 1))
            start = end
        return ids, spans

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        first = len(self.special) if skip_special else 0
        kept = (self.token_bytes(i) for i in map(int, ids) if not 0 <= i < first)
        return b"".join(kept).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for. Raises ValueError for an unknown id."""
        if not 0 <= token_id < len(self._bytes):
            raise ValueError(f"token id {token_id} is outside [0, {len(self._bytes)}); decode with the "
                             "tokenizer that made it")
        return self._bytes[token_id]

    @property
    def vocab_size(self) -> int:
        """Number of ids: special tokens + 256 bytes + merged strings."""
        return len(self._bytes)

    def save(self, path: str | Path) -> None:
        """Write one JSON file, atomically, with a checksum of its content."""
        body = {"format": FORMAT, "version": VERSION, "pattern": self.pattern,
                "special_tokens": list(self.special), "merges": [list(pair) for pair in self.merges]}
        write_text(path, json.dumps(body | {"sha256": _digest(body)}, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` wrote. Raises ValueError for another format or version and for a damaged file."""
        body = read_json(path)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"{path}: not a {FORMAT} file; save one with Tokenizer.save")
        if body.get("version") != VERSION:
            raise ValueError(f"{path}: version {body.get('version')!r}, this reads {VERSION}; train again")
        digest = body.pop("sha256", None)
        if digest != _digest(body):
            raise ValueError(f"{path}: content does not match its sha256; the file is damaged, save again")
        return cls(map(tuple, body["merges"]), body["special_tokens"], body["pattern"])

    def to_transformers(self):
        """The same tokenizer as a transformers PreTrainedTokenizerFast: same ids, same offsets.

        Special tokens named <pad>, <bos>, <eos> become pad_token, bos_token, eos_token. Encoding adds none.
        Raises ValueError when a special token spells an ordinary one.
        """
        import tokenizers
        from tokenizers import decoders, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        text = [token.decode() if i < len(self.special) else "".join(BYTE_TO_CHAR[b] for b in token)
                for i, token in enumerate(self._bytes)]
        clash = sorted(set(self.special) & set(text[len(self.special):]))
        if clash:
            raise ValueError(f"special tokens {clash} spell ordinary tokens, and transformers keeps one "
                             "id for both; rename them, such as '<pad>'")
        fast = tokenizers.Tokenizer(tokenizers.models.BPE(
            vocab={token: i for i, token in enumerate(text)},
            merges=[(text[left], text[right]) for left, right in self.merges]))
        fast.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(self.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        fast.decoder = decoders.ByteLevel()
        fast.post_processor = processors.ByteLevel(trim_offsets=False)
        fast.add_special_tokens(
            [tokenizers.AddedToken(name, normalized=False, special=True) for name in self.special])
        roles = [role for role in ("pad", "bos", "eos") if f"<{role}>" in self.special]
        named = {f"{role}_token": f"<{role}>" for role in roles}
        return PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **named)


def _merge(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    """`ids` with each occurrence of `pair`, left to right, replaced by `new_id`."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and ids[i] == pair[0] and ids[i + 1] == pair[1]:
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def _compile(pattern: str) -> regex.Pattern:
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    if compiled.groups:
        raise ValueError(f"pattern {pattern!r} has {compiled.groups} capture groups; write (?:...) instead")
    return compiled


def _special_splitter(special_tokens: Sequence[str]) -> regex.Pattern | None:
    """A pattern whose split keeps the special tokens; the longest wins where one begins another."""
    names = list(special_tokens)
    if isinstance(special_tokens, str) or len(set(names)) != len(names) or not all(names):
        raise ValueError(f"special_tokens={special_tokens!r} must be a list of different, non-empty strings")
    if not names:
        return None
    longest_first = sorted(names, key=len, reverse=True)
    return regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")")


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
