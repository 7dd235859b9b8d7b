"""The verb chat: a conversation on the terminal, or line by line through a pipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from .flags import Drawing, Opening, Reference, Watching, print_json

HELP = """\
/infill OLD => N    write the text OLD inside the last answer again, in N tokens (auto: as many as fit best)
/reset              forget the conversation
/help               this list
/quit               leave (so does the end of the input)
A message that begins with a slash is written with two."""


@dataclass(frozen=True)
class Answering(Drawing):
    """How the tokens of an answer are drawn.

    Args:
        steps: Forward passes of an answer at most (default: one per token).
    """


def chat(
    model: Reference,
    /,
    *,
    system: str = "",
    max_tokens: int | None = None,
    prefix: str = "",
    suffix: str = "",
    must: tuple[str, ...] = (),
    must_not: tuple[str, ...] = (),
    length: int | Literal["auto"] | None = None,
    chat_template: str | None = None,
    plain_template: bool = False,
    watch: bool = False,
    json: bool = False,
    drawing: Answering,
    opening: Opening,
) -> None:
    """Talk with a diffusion model; one message a line, answers stream as they become final.

    Example: diffulm chat runs/sft/model --system "Answer in one sentence." --watch

    /infill OLD => N writes a span of the last answer again; /help lists the other commands.

    Args:
        model: Diffusion checkpoint: a folder or Hub id.
        system: System message.
        max_tokens: Room for an answer (default: 128, at most half the trained length).
        prefix: Text with which every answer begins.
        suffix: Text with which every answer ends (full attention).
        must: Words that every answer holds; they are put where the model finds them likeliest (full attention).
        must_not: Words that no answer holds.
        length: Tokens generated for an answer, just so many; auto searches up to --max-tokens for the likeliest, and is
            the rule with --suffix and --must.
        chat_template: Jinja file to use instead of the tokenizer's chat template.
        plain_template: Use a plain template (User:, Assistant:) where the tokenizer has none.
        watch: Show the denoising (on stderr).
        json: Print every answer as one line of JSON.
    """
    from ..sampling.chat import Chat
    from ..template import use_template

    loaded = opening.open(model)
    use_template(loaded.tokenizer, chat_template, plain=plain_template)
    session = Chat(
        loaded, system=system, max_tokens=max_tokens, prefix=prefix, suffix=suffix, must=must, must_not=must_not,
        length=length, **drawing.arguments(),
    )  # fmt: skip
    talk(session, watch=watch, as_json=json)


def talk(session: Any, *, watch: bool, as_json: bool) -> None:
    """Read messages and commands until the input ends. On a terminal a refused message is no end; in a pipe it is."""
    on_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if on_terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not on_terminal and not line:
            return
        line = line.strip()
        if line == "/quit":
            return
        try:
            if line:
                answer(session, line, watch=watch, as_json=as_json)
        except ValueError as error:
            if not on_terminal:
                raise
            print(f"diffulm chat: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not on_terminal:
                raise
            print("\n(stopped; this turn is forgotten)", file=sys.stderr)


def answer(session: Any, line: str, *, watch: bool, as_json: bool) -> None:
    """Do what one line says: a command, or a message to be answered."""
    from ..sampling.chat import read_rewrite

    command, _, rest = line.partition(" ")
    before = session.dropped
    if command == "/help":
        print(HELP, file=sys.stderr)
    elif command == "/reset":
        session.reset()
        print("(a new conversation)", file=sys.stderr)
    elif command == "/infill":
        old, tokens = read_rewrite(rest)
        with Watching(session.model, watch) as view:
            text = session.rewrite(old, tokens, view)
        show(text, as_json)
    elif command.startswith("/") and not command.startswith("//"):
        raise ValueError(f"unknown command {command}; /help lists them, and two slashes begin a message with one")
    else:
        reply(session, line.removeprefix("/") if line.startswith("//") else line, watch=watch, as_json=as_json)
    if session.dropped > before:
        print(f"(the oldest {session.dropped - before} turns no longer fit and were left out)", file=sys.stderr)


def reply(session: Any, text: str, *, watch: bool, as_json: bool) -> None:
    """Print the answer to a message: as it becomes final, or whole after the view of `--watch`."""
    streams = not (watch or as_json)
    whole = ""
    with Watching(session.model, watch) as view:
        for piece in session.say(text, view):
            whole += piece
            if streams:
                print(piece, end="", flush=True)
    if streams:
        print(flush=True)
    else:
        show(whole, as_json)
    if not whole.strip():
        print("(the answer is empty; this turn is forgotten)", file=sys.stderr)


def show(text: str, as_json: bool) -> None:
    if as_json:
        print_json({"role": "assistant", "content": text})
        sys.stdout.flush()
    else:
        print(text, flush=True)
