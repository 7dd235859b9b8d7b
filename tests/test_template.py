"""Answers are found in any template: context + answer + end is what it renders, and nothing else is an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffulm.template import (
    PLAIN,
    RECIPE,
    check_messages,
    end_token,
    last_turn,
    open_turn,
    render,
    turn_ids,
    use_template,
)
from diffulm.tokenizer import decode, encode

from .dialogues import CHATML, FORGETFUL, LOUD, TEMPLATES, chat_tokenizer, talk

TOKENIZERS = {name: chat_tokenizer(template) for name, template in TEMPLATES.items()}
words_st = st.text(alphabet="ab \n.,{}λ雪", min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(words_st, min_size=2, max_size=6).filter(lambda x: len(x) % 2 == 0), system=st.booleans())
def test_a_turn_is_context_answer_and_end(name: str, texts: list[str], system: bool) -> None:
    tokenizer = TOKENIZERS[name]
    messages = talk(*texts, system="Be brief." if system else "")
    turn = last_turn(tokenizer, messages)
    whole = render(tokenizer, messages)
    assert whole.removeprefix(tokenizer.bos_token).startswith(turn.context + turn.answer + turn.end)
    assert turn.answer.strip() == texts[-1].strip() and turn.end in ("<|im_end|>", "</s>")
    context, answer = turn_ids(tokenizer, turn)
    assert decode(tokenizer, context) == turn.context and decode(tokenizer, answer) == turn.answer + turn.end
    assert answer[-1] == end_token(tokenizer, turn) and answer.count(answer[-1]) == 1
    # The question as it is put at inference is the context of training, token for token.
    assert encode(tokenizer, open_turn(tokenizer, messages[:-1]).context) == context


def test_what_is_an_answer_in_chatml() -> None:
    turn = last_turn(TOKENIZERS["chatml"], talk("What?", "assistant", "Who?", "a"))
    begin = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert turn.context == (
        f"{begin}assistant<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    assert (turn.answer, turn.end) == ("a", "<|im_end|>")


def test_the_start_token_is_the_callers_and_a_space_before_the_end_is_answer() -> None:
    turn = last_turn(TOKENIZERS["brackets"], talk("What?", "This."))
    assert (turn.context, turn.answer, turn.end) == ("[INST] What? [/INST] ", "This. ", "</s>")
    assert open_turn(TOKENIZERS["brackets"], talk("What?")).answer == " "


def test_a_template_without_an_end_gets_end_of_text() -> None:
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    turn = last_turn(tokenizer, talk("What?", "This."))
    assert (turn.context, turn.answer, turn.end) == ("What?\n", "This.", "")
    assert turn_ids(tokenizer, turn)[1][-1] == tokenizer.eos_token_id == end_token(tokenizer, turn)


def test_a_reused_mask_token_is_text() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.mask_token = "e"
    turn = last_turn(tokenizer, talk("Who?", "me"))
    assert turn_ids(tokenizer, turn)[1][:-1] == encode(tokenizer, "me")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (FORGETFUL, talk("a", "b", "c", "d"), "renders a conversation otherwise once it goes on"),
        (LOUD, talk("a", "b"), "changes what the assistant says"),
        ("{{ raise_exception('no system') }}", talk("a", "b"), "refuses the conversation .no system."),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", talk("a", "b"), "refuses the conversation"),
        (CHATML, talk("a<|im_end|>", "b"), "spells out the special token '<|im_end|>'"),
        (CHATML, talk("a", "b</s>"), "spells out the special token '</s>'"),
        (CHATML, talk("a", "b <|mask|>"), "spells out the special token '<|mask|>'"),
    ],
)
def test_templates_and_texts_that_cannot_be(template: str, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        last_turn(chat_tokenizer(template), messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages"),
        (talk("a", " \n"), r"message 2 \(assistant\) is empty"),
        ([{"role": "user", "content": None}], r"message 1 \(user\) is empty"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], r"\(user\): its content is a list of parts"),
        ([{"role": "user", "content": 5}], r"message 1 \(user\): its content is int, not text"),
        ([{"role": "tool", "content": "a"}], "message 1 has role 'tool'; use system, user, assistant"),
        ([{"content": "a"}], "message 1 has role None"),
        (talk("a", "b")[::-1], r"roles are out of order \(assistant, user\)"),
        ([*talk("a"), *talk("b", "c")], "out of order"),
        ([*talk("a", "b"), {"role": "system", "content": "c"}], "out of order"),
        (talk("a"), "no assistant message"),
        (talk("a", system="s")[:1], "no assistant message"),
    ],
)
def test_messages_that_are_no_conversation(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_messages(messages, answered=True)


def test_messages_that_are_one() -> None:
    check_messages(talk("a", "b", "c", system="s"), answered=True)
    check_messages(talk("a"))


def test_a_template_from_a_file_the_plain_one_or_none(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(None)
    with pytest.raises(ValueError, match="no chat template; give one with --chat-template FILE, or take the plain one"):
        use_template(tokenizer)
    with pytest.raises(ValueError, match="cannot be read"):
        use_template(tokenizer, str(tmp_path / "none.jinja"))
    use_template(tokenizer, plain=True)
    assert tokenizer.chat_template == PLAIN
    (tmp_path / "t.jinja").write_text(CHATML)
    use_template(tokenizer, str(tmp_path / "t.jinja"))
    assert tokenizer.chat_template == CHATML
    use_template(tokenizer, plain=True)  # its own comes first
    assert tokenizer.chat_template == CHATML
    use_template(tokenizer, LOUD)
    assert tokenizer.chat_template == LOUD


def test_a_remedy_is_what_the_caller_has() -> None:
    with pytest.raises(ValueError, match=r"with sft\.chat_template = .* sft\.plain_template = true") as error:
        use_template(chat_tokenizer(None), means=RECIPE)
    assert "--" not in str(error.value)
    for template in (FORGETFUL, LOUD):
        with pytest.raises(ValueError, match=r"give another with sft\.chat_template") as error:
            last_turn(chat_tokenizer(template), talk("a", "b", "c", "d"), means=RECIPE)
        assert "--" not in str(error.value)


def test_a_template_that_is_no_jinja_is_named_with_its_line(tmp_path: Path) -> None:
    broken = "{% for m in messages %}\n{{ m.content }\n{% endfor %}"
    path = tmp_path / "t.jinja"
    path.write_text(broken)
    for template, own, name in ((str(path), None, str(path)), (broken, None, "that was"), (None, broken, "of the")):
        with pytest.raises(ValueError, match=rf"template {name}.* is not valid Jinja, line 2: .*--chat-template FILE"):
            use_template(chat_tokenizer(own), template)
    with pytest.raises(ValueError, match="not valid Jinja, line 1: No filter named 'frob'"):
        use_template(chat_tokenizer(None), "{{ messages | frob }}")
    # What a template refuses, or cannot do with a message of another kind, is no mistake in it.
    for fine in ("{{ raise_exception('no') }}", "{{ messages[0].content + 1 }}", "{% generation %}{% endgeneration %}"):
        use_template(chat_tokenizer(None), fine)
