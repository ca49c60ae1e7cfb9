"""One renderer for training, evaluation and serving: messages to token ids, and the mask of the tokens to learn.

A message is {"role", "content"}: any number of policy lines, at most one order, then user and bot by turns. The layout
is that of desk/cases.render_prompt; a conversation goes on with <user> and <bot>. Only what the bot says, and the <eos>
that ends it, is learnt: the assistant mask of chat templates ({% generation %} in transformers). `CHAT_TEMPLATE` is the
same layout for transformers and TRL.

Tags are put in as ids; content is encoded as plain text, whatever it spells. So a customer who types `<bot>` writes
five characters, not a role: this a template that joins text first, such as CHAT_TEMPLATE, cannot promise.

Left out: tools, images, a bot turn that is read but not learnt, other special tokens of a public tokenizer.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lifecycle_lib.core.records import read_jsonl
from lifecycle_lib.desk.cases import Case
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train.logprobs import Rows, pad_rows

Message = Mapping[str, str]
NEXT = {"": ("policy", "order", "user"), "policy": ("policy", "order", "user"), "order": ("user",), "user": ("bot",),
        "bot": ("user",)}  # which role may follow which
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{% if message['role'] == 'bot' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}")


def case_messages(case: Case) -> list[dict]:
    """The messages of a case's request: its policy lines, its order, what the customer wrote."""
    return [*({"role": "policy", "content": p.line()} for p in case.policies),
            {"role": "order", "content": case.order.line()}, {"role": "user", "content": case.message}]


def check_messages(messages: object, where: str = "messages") -> None:
    """ValueError, naming `where`, the message, the value and the fix, unless every message has a known role in a
    possible place and some text."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{where}: {messages!r} is no conversation; give a list of at least one message")
    before = ""
    for i, m in enumerate(messages, 1):
        here = f"{where}, message {i}"
        if not isinstance(m, Mapping) or not {"role", "content"} <= set(m):
            raise ValueError(f"{here}: {m!r} has no role or no content; write {{'role': ..., 'content': ...}}")
        if m["role"] not in NEXT[before]:
            after = f"after {before!r}" if before else "at the start"
            raise ValueError(f"{here}: role {m['role']!r} {after}; there only {' or '.join(NEXT[before])} may stand")
        if not isinstance(m["content"], str) or not m["content"].strip():
            raise ValueError(f"{here}: the {m['role']} says {m['content']!r}; give text, or leave the row out")
        before = m["role"]


def render(messages: Sequence[Message]) -> str:
    """The conversation as text, for people. Training and serving use `encode_chat`: text can be forged."""
    said = "".join(f"<{m['role']}>{m['content']}{'<eos>' * (m['role'] == 'bot')}" for m in messages)
    return f"<bos>{said}{'<bot>' * (messages[-1]['role'] != 'bot')}"


def encode_chat(tok: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """(ids, learn): the ids of a conversation, and which of them the bot is to learn. A conversation that does not end
    with the bot ends with the tag after which it speaks. Raises ValueError as `check_messages` does."""
    check_messages(messages)
    ids, learn = [tok.special["<bos>"]], [False]
    for m in messages:
        content, bot = tok.encode(m["content"], allow_special=False), m["role"] == "bot"
        content += [tok.special["<eos>"]] * bot
        ids += [tok.special[f"<{m['role']}>"], *content]
        learn += [False] + [bot] * len(content)
    if messages[-1]["role"] != "bot":
        return ids + [tok.special["<bot>"]], learn + [False]
    return ids, learn


def prompt_ids(tok: Tokenizer, case: Case) -> list[int]:
    """A case's prompt as the server reads it: tags from us alone.

    Words without a tag go the way of training, one encode of the whole prompt. Ours would give the same ids piece by
    piece; a public tokenizer may read the start of a piece in another way."""
    if any(tag in case.message for tag in tok.special):
        return encode_chat(tok, case_messages(case))[0]
    return tok.encode(case.prompt)


def chat_rows(tok: Tokenizer, conversations: Iterable[Sequence[Message]], max_len: int | None = None) -> Rows:
    """Training rows of whole conversations, right-padded: every bot turn counts. Raises ValueError for a conversation
    in which the bot says nothing, or that is longer than max_len."""
    coded = [encode_chat(tok, c) for c in conversations]
    for i, (_, learn) in enumerate(coded):
        if not any(learn):
            raise ValueError(f"conversation {i} has no bot turn; there is nothing to learn from it")
    rows = pad_rows([ids[:1] for ids, _ in coded], [ids[1:] for ids, _ in coded], tok.special["<pad>"], max_len)
    for i, (_, learn) in enumerate(coded):
        rows.mask[i, :len(learn)] &= rows.mask.new_tensor(learn)
    return rows


def read_demonstrations(path: str | Path) -> list[list[dict]]:
    """The conversations of a JSONL file, one {"messages": [...]} a line, each ending with the bot.

    Raises ValueError naming FILE:LINE, the message, the value and the fix: a field missing, an empty answer, a wrong
    type, roles out of order, a last word that is not the bot's, the same request with two different answers."""
    rows = [row["messages"] for row in read_jsonl(path, {"messages": list})]
    seen: dict[str, tuple[int, str]] = {}
    for line, messages in enumerate(rows, 1):
        where = f"{path}:{line}"
        check_messages(messages, where)
        if messages[-1]["role"] != "bot":
            raise ValueError(f"{where}: ends with {messages[-1]['role']!r}; the last message must be the bot's answer")
        request, answer = render(messages[:-1]), messages[-1]["content"]
        first, other = seen.setdefault(request, (line, answer))
        if other != answer:
            raise ValueError(f"{where}: answers {answer!r} to the request of line {first}, which has {other!r}; "
                             "keep the right one")
    return rows
