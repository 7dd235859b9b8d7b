"""The verb chat, through a pipe: one message a line, answers on stdout, remarks on stderr."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffulm import cli
from diffulm.convert import convert

from .conftest import build_parent
from .dialogues import CHATML, chat_tokenizer

Run = Callable[..., tuple[int, str, str]]
FAST = ("--dtype", "float32", "--device", "cpu", "--max-tokens", "5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny diffusion models: with a template, without one, of the block layout."""
    root = tmp_path_factory.mktemp("chat")
    tokenizer, bare = chat_tokenizer(size=380), chat_tokenizer(None, size=380)
    for name, chosen in (("chat", tokenizer), ("bare", bare)):
        build_parent(root / f"{name}-parent", tokenizer=chosen)
        convert(str(root / f"{name}-parent"), root / name, trained_length=128)
    convert(str(root / "chat-parent"), root / "block", layout="block", source="own", block_size=4, trained_length=128)
    return {name: root / name for name in ("chat", "bare", "block")}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(folder: Path, text: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = cli.main(["chat", str(folder), *FAST, *flags])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("name", ["chat", "block"])
def test_messages_are_answered_line_by_line_and_the_same_again(name: str, folders: Any, run: Run) -> None:
    code, out, _ = run(folders[name], "Hello\n\nand more\n", "--json")
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 2 and all(a["role"] == "assistant" for a in answers)
    _, plain, err = run(folders[name], "Hello\n\nand more", "--system", "")
    assert plain.rstrip("\n").split("\n")[0] == answers[0]["content"].split("\n")[0]
    assert err.count("(the answer is empty") == sum(not a["content"].strip() for a in answers)


def test_commands(folders: Any, run: Run) -> None:
    code, out, err = run(folders["chat"], "/help\nHello\n/reset\nHello\n/quit\nnever\n", "--json")
    assert code == 0 and "(a new conversation)" in err and "/infill OLD => N" in err
    first, second = out.splitlines()
    assert first == second, "after /reset the same question has the same answer"


def test_infill_rewrites_a_span_of_the_answer(folders: Any, run: Run) -> None:
    flags = ("--json", "--prefix", "The quick fox", "--suffix", " jumps.", "--length", "2")
    code, out, _ = run(folders["chat"], "Hello\n/infill quick => 1 token\n", *flags)
    assert code == 0
    first, second = (json.loads(line)["content"] for line in out.splitlines())
    assert first.startswith("The quick fox") and first.endswith(" jumps.")
    assert second.startswith("The ") and second.endswith(first.removeprefix("The quick")) and second != first


def test_a_template_must_be_there_or_given(folders: Any, run: Run, tmp_path: Path) -> None:
    code, out, err = run(folders["bare"], "Hello\n")
    assert code == 2 and not out and "has no chat template; give one with --chat-template FILE" in err
    assert run(folders["bare"], "Hello\n", "--plain-template")[0] == 0
    (tmp_path / "t.jinja").write_text(CHATML)
    assert run(folders["bare"], "Hello\n", "--chat-template", str(tmp_path / "t.jinja"))[0] == 0


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("/frob\n", (), "unknown command /frob; /help lists them"),
        ("/infill it => 3\n", (), "there is no answer yet"),
        ("/infill it\n", (), "write /infill old text => N tokens"),
        ("word " * 200 + "\n", (), "shorten the message or lower --max-tokens"),
        ("say </s>\n", (), "spells out the special token '</s>'"),
        ("Hello\n", ("--must", "fox", "--must-not", "ox"), "has to occur and holds 'ox'"),
        ("Hello\n", ("--policy", "frob"), "frob"),
    ],
)
def test_what_is_refused_ends_a_pipe_with_code_2(
    text: str, flags: tuple[str, ...], message: str, folders: Any, run: Run
) -> None:
    code, _, err = run(folders["chat"], text, *flags)
    assert code == 2 and message in err and err.count("\n") < 4


def test_a_block_checkpoint_does_not_see_a_suffix(folders: Any, run: Run) -> None:
    code, _, err = run(folders["block"], "Hello\n", "--suffix", " end", "--length", "3")
    assert code == 2 and "does not see what stands after a hole" in err
    assert run(folders["block"], "Hello\n", "--length", "3")[0] == 0


def test_watch_draws_on_stderr(folders: Any, run: Run) -> None:
    code, out, err = run(folders["chat"], "Hello\n", "--watch")
    assert code == 0 and "masked" in err and "masked" not in out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_errors_and_interrupts_end_a_turn_not_the_conversation(
    folders: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffulm.sampling.chat import Chat

    said = iter(["/frob", "Hello", "again"])
    real, asked = Chat.say, []

    def interrupted(self: Chat, text: str, watch: Any = None) -> Any:
        asked.append(text)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return real(self, text, watch)

    def read(prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(Chat, "say", interrupted)
    assert cli.main(["chat", str(folders["chat"]), *FAST]) == 0
    err = capsys.readouterr().err
    assert asked == ["Hello", "again"] and "unknown command /frob" in err and "(stopped; this turn is forgotten)" in err
