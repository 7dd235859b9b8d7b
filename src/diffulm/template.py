"""A conversation as the tokenizer's chat template writes it: which text a model answers, and where an answer ends.

A template need not mark what the assistant says. It is found by rendering prefixes of the conversation: what the last
turn adds to the rendering before it is a header, the answer and a footer, and the same turn with a known answer tells
the three apart. An answer ends with the first special token of the footer, else with the end-of-text token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .tokenizer import encode, encode_after, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: `{"role": "system" | "user" | "assistant", "content": text}`
Message = dict[str, str]
ROLES = ("system", "user", "assistant")

#: For tokenizers without a template of their own, when it is asked for.
PLAIN = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}User:\n{{ m.content }}\n\n"
    "{% else %}Assistant:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
#: Stands for an answer: a character that no text should hold and no template changes.
_ANSWER = "\ue0a1"


class Means(NamedTuple):
    """By what a caller is given a template, for the remedies of errors. `another`: a file; `plain`: the plain one."""

    another: str
    plain: str


FLAGS = Means("--chat-template FILE", "--plain-template")
RECIPE = Means("sft.chat_template = 'FILE' in the recipe", "sft.plain_template = true")


@dataclass(frozen=True)
class Turn:
    """One answer and what stands before it. `context`: the rendered text up to the answer, without a start token;
    `answer`: its text; `end`: the special token (a string) behind it, or empty where the template writes none."""

    context: str
    answer: str
    end: str


def check_messages(messages: Sequence[Message], *, answered: bool = False) -> None:
    """ValueError unless the messages are an optional system message, then user and assistant in turn, none empty.

    answered: at least one assistant message is needed.
    """
    if not messages:
        raise ValueError("there are no messages; a conversation needs a user message and an answer")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {i + 1} has role {role!r}; use {', '.join(ROLES)}")
        if content is not None and not isinstance(content, str):
            found = "a list of parts" if isinstance(content, list) else type(content).__name__
            raise ValueError(f"message {i + 1} ({role}): its content is {found}, not text; mend the row")
        if content is None or not content.strip():
            raise ValueError(f"message {i + 1} ({role}) is empty; give it text or leave the conversation out")
    spoken = [m["role"] for m in messages]
    spoken = spoken[1:] if spoken[0] == "system" else spoken
    if any(role != ROLES[1 + i % 2] for i, role in enumerate(spoken)):
        raise ValueError(
            f"roles are out of order ({', '.join(m['role'] for m in messages[:6])}); after an optional system message "
            "user and assistant take turns"
        )
    if answered and "assistant" not in spoken:
        raise ValueError("there is no assistant message, so nothing to learn; give every conversation an answer")


def use_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None = None, *, plain: bool = False, means: Means = FLAGS
) -> None:
    """Give the tokenizer a chat template, or the plain one where it has none; otherwise it must have its own.

    `template`: a Jinja file, or the template itself where it holds a brace. `means`: what the caller gives one by.

    Raises:
        ValueError: there is no template, the file cannot be read, or it is no Jinja (with its line).
    """
    name = "of the tokenizer" if template is None else template if "{" not in template else "that was given"
    if template is not None and "{" not in template:
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"chat template {template} cannot be read ({error}); give a text file in Jinja") from error
    elif template is not None:
        tokenizer.chat_template = template
    elif not getattr(tokenizer, "chat_template", None):
        if not plain:
            raise ValueError(
                f"the tokenizer has no chat template; give one with {means.another}, or take the plain one with "
                f"{means.plain}"
            )
        tokenizer.chat_template = PLAIN
    _check_syntax(tokenizer, name, means)


def _check_syntax(tokenizer: Any, name: str, means: Means) -> None:
    """ValueError with name and line where the tokenizer's template is no Jinja.

    Rendering compiles it, with the extensions that templates may use. What a trial message meets besides is no
    mistake: a template may refuse it.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": ROLES[1], "content": _ANSWER}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template {name} is not valid Jinja, line {error.lineno}: {error.message}; mend it, or give "
            f"another with {means.another}"
        ) from error
    except (TemplateError, TypeError):
        pass


def render(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text of a conversation, special tokens spelt out. ValueError with the template's own complaint."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses the conversation ({error}); mend one of them") from error


def last_turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, means: Means = FLAGS) -> Turn:
    """The last message, an assistant's, as context, answer and end.

    ValueError where the template rewrites what came before, changes the answer, or where a message spells out a
    special token, which would then be one.
    """
    *before, last = messages
    for message in messages:
        if found := _special_in(tokenizer, message["content"]):
            raise ValueError(f"a message spells out the special token {found!r}; remove it from the text")
    known = render(tokenizer, [*before, {**last, "content": _ANSWER}])
    earlier = render(tokenizer, before)
    if not known.startswith(earlier) or known.count(_ANSWER) != 1:
        raise ValueError(
            "the chat template renders a conversation otherwise once it goes on, so answers cannot be found in it; "
            f"give another with {means.another}"
        )
    context, footer = known.split(_ANSWER)
    whole = render(tokenizer, messages)
    answer = next((a for a in (last["content"], last["content"].strip()) if whole == context + a + footer), None)
    if answer is None:
        raise ValueError(f"the chat template changes what the assistant says; give another with {means.another}")
    marks = [(at, -len(token), token) for token in _specials(tokenizer) if (at := footer.find(token)) >= 0]
    at, _, end = min(marks, default=(0, 0, ""))
    bos = tokenizer.bos_token
    return Turn(context.removeprefix(bos) if isinstance(bos, str) else context, answer + footer[:at], end)


def open_turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Turn:
    """What the model is to answer: the turn after `messages`, its answer empty (but for what the template adds)."""
    turn = last_turn(tokenizer, [*messages, {"role": "assistant", "content": _ANSWER}])
    return Turn(turn.context, turn.answer.removeprefix(_ANSWER), turn.end)


def turn_ids(tokenizer: PreTrainedTokenizerBase, turn: Turn) -> tuple[list[int], list[int]]:
    """(context, answer) token ids, no start token; the answer ends with its end token.

    The context is tokenised by itself, as it is when the model is asked.
    """
    context = encode(tokenizer, turn.context)
    joined = encode(tokenizer, turn.context + turn.answer)
    same = joined[: len(context)] == context
    answer = joined[len(context) :] if same else encode_after(tokenizer, turn.answer)
    return context, [*answer, end_token(tokenizer, turn)]


def end_token(tokenizer: PreTrainedTokenizerBase, turn: Turn) -> int:
    """Id of the token that ends an answer."""
    if not turn.end:
        return special_tokens(tokenizer).eos
    (found,) = encode(tokenizer, turn.end)
    return found


def _specials(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens as strings. A reused mask token that is text too (`keep_as_text`) is none; one of its own is."""
    names = {str(token) for token in tokenizer.all_special_tokens} - {tokenizer.mask_token}
    names |= {t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special}
    return sorted(names)


def _special_in(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    return next((token for token in _specials(tokenizer) if token in text), None)
