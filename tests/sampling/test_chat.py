"""A conversation: the question is put as the template says, text streams once and for good, old turns give way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import diffulm
from diffulm.hub import Model
from diffulm.layout import Rows
from diffulm.process import MaskedDiffusion
from diffulm.sampling.chat import Chat, read_rewrite
from diffulm.tokenizer import decode, encode, encode_after

from ..dialogues import BRACKETS, CHATML, chat_tokenizer, talk
from ..toy import Noise

TOKENIZERS = {name: chat_tokenizer(t) for name, t in {"chatml": CHATML, "brackets": BRACKETS}.items()}


#: What comes next, token ids: from the text before the first mask and that mask's place.
Rule = Callable[[str, int], list[int]]


class Speaker(torch.nn.Module):
    """A denoiser that answers by a rule from what the canvas gives: text of the rows before the first mask -> answer.

    Sure of its answer, the surer the further left (so a confident policy goes from left to right), and of the end
    token everywhere behind it. Source "previous".
    """

    def __init__(self, tokenizer: Any, rule: Rule, end: str) -> None:
        super().__init__()
        self.tokenizer, self.rule, self.end = tokenizer, rule, tokenizer.convert_tokens_to_ids(end)
        self.unused = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.seen: list[str] = []

    def forward(self, rows: Rows, *, cache: object = None) -> torch.Tensor:
        R, mask = rows.ids.shape[1], self.tokenizer.mask_token_id
        logits = torch.zeros(len(rows.source), len(self.tokenizer), dtype=torch.float64)
        for b in range(len(rows.ids)):
            ids = rows.ids[b].tolist()
            start = len(ids) if mask not in ids else ids.index(mask)
            text = decode(self.tokenizer, ids[1:start])
            self.seen.append(text)
            ahead = self.rule(text, start)
            for n, source in enumerate(rows.source.tolist()):
                if source // R == b:
                    k = source % R + 1 - start
                    token = ahead[k] if k < len(ahead) else self.end
                    logits[n, token] = 40.0 - 0.1 * k
        logits[:, mask] = float("-inf")
        return logits


def speaks(answer: str | Rule, *, kind: str = "chatml", length: int = 256, layout: str = "full") -> Model:
    tokenizer = TOKENIZERS[kind]
    rule = remaining(tokenizer, answer) if isinstance(answer, str) else answer
    denoiser: Any = Speaker(tokenizer, rule, "<|im_end|>" if kind == "chatml" else "</s>")
    config = {"trained_length": length, "layout": layout, "source": "previous" if layout == "full" else "own"}
    return Model(denoiser, tokenizer, MaskedDiffusion(tokenizer.mask_token_id), config, "toy")


def remaining(tokenizer: Any, answer: str) -> Rule:
    """What is left of a fixed answer when part of it stands already."""
    tokens = encode_after(tokenizer, answer)

    def rule(text: str, start: int) -> list[int]:
        mark = "assistant\n" if "assistant\n" in text else "[/INST] "
        question, _, _ = text.rpartition(mark)
        return tokens[start - 1 - len(encode(tokenizer, question + mark)) :]

    return rule


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_answer_streams_append_only_and_is_remembered(kind: str) -> None:
    model = speaks("The dog jumps, naïve 雪 and λ.", kind=kind)
    chat = Chat(model, system="Be brief.", max_tokens=64)
    pieces = list(chat.say("What does it do?"))
    assert "".join(pieces) == "The dog jumps, naïve 雪 and λ." and len(pieces) > 3
    assert all(pieces) and not any("\ufffd" in p or "<|" in p for p in pieces)
    assert chat.messages == talk("What does it do?", "".join(pieces), system="Be brief.")
    first = model.denoiser.seen[0]  # type: ignore[attr-defined]
    assert "Be brief." in first and first.endswith(("<|im_start|>assistant\n", "[/INST] "))
    assert not first.startswith("<s>"), "the canvas has a start token of its own"


def test_history_is_in_the_next_question_and_reset_forgets_it() -> None:
    model = speaks("Yes.")
    chat = Chat(model, max_tokens=8)
    for text in ("one", "two"):
        assert "".join(chat.say(text)) == "Yes."
    seen = model.denoiser.seen[-1]  # type: ignore[attr-defined]
    assert seen.count("Yes.<|im_end|>") >= 1 and "user\none" in seen and "user\ntwo" in seen
    chat.reset()
    assert chat.messages == [] and chat.dropped == 0


def test_a_policy_that_takes_tokens_back_shows_nothing_before_the_end() -> None:
    chat = Chat(speaks("Yes, of course."), max_tokens=16, policy="remask:0.1")
    pieces = list(chat.say("Is it?"))
    assert len(pieces) == 1 and pieces[0].startswith("Yes")


def test_an_empty_answer_is_not_remembered() -> None:
    chat = Chat(speaks(""), max_tokens=8)
    assert "".join(chat.say("Is it?")) == "" and chat.messages == []


def test_an_abandoned_answer_is_not_remembered() -> None:
    chat = Chat(speaks("Yes, of course."), max_tokens=16)
    pieces = chat.say("Is it?")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert chat.messages == []


def test_the_oldest_turns_give_way_and_the_system_message_stays() -> None:
    model = speaks("Yes.", length=100)
    chat = Chat(model, system="S.", max_tokens=8)
    for i in range(8):
        assert "".join(chat.say(f"question {i}")) == "Yes."
    assert 0 < chat.dropped < 8 and len(chat.messages) == 1 + 2 * (8 - chat.dropped)
    assert chat.messages[0]["content"] == "S." and chat.messages[1]["content"] == f"question {chat.dropped}"
    with pytest.raises(
        ValueError, match=r"the message needs \d+ tokens and the answer 8, and the model was trained on"
    ):
        list(chat.say("word " * 100))
    assert chat.messages[-1]["content"] == "Yes.", "a refused message leaves no trace"


def test_room_for_an_answer() -> None:
    assert Chat(speaks("")).max_tokens == 128
    assert Chat(speaks("", length=64)).max_tokens == 32
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        Chat(speaks(""), max_tokens=0)


# ------------------------------------------------------------------------------------------------------ constraints


def test_an_answer_begins_with_its_prefix() -> None:
    chat = Chat(speaks("Well, yes."), prefix="Well,", max_tokens=16)
    pieces = list(chat.say("Is it?"))
    assert pieces[0] == "Well," and "".join(pieces) == "Well, yes."


@pytest.mark.parametrize("length", [3, "auto"])
def test_an_answer_ends_with_its_suffix_and_holds_its_words(length: Any) -> None:
    tokenizer = TOKENIZERS["chatml"]
    noise: Any = Noise(len(tokenizer), tokenizer.mask_token_id, length=256)
    config = {"trained_length": 256, "layout": "full", "source": "previous"}
    model = Model(noise, tokenizer, MaskedDiffusion(tokenizer.mask_token_id), config, "toy")
    chat = Chat(model, prefix="Yes", suffix=" and over.", must=("dog",), length=length, max_tokens=6)
    (answer,) = chat.say("Is it?")
    assert answer.startswith("Yes") and answer.endswith(" and over.") and "dog" in answer
    assert not any(end in answer for end in ("<|im_end|>", "<s>", "</s>")), "an end would cut the suffix off"
    made = answer.removeprefix("Yes").removesuffix(" and over.")
    assert length == "auto" or len(encode(tokenizer, made)) <= 3
    assert chat.messages[-1]["content"] == answer


def test_an_answer_of_a_length_and_without_a_word() -> None:
    canvases: list[Any] = []
    for seed in range(3):
        chat = Chat(speaks("fox"), length=12, must_not=("fox",), temperature=1.0, seed=seed)
        (answer,) = chat.say("Which?", lambda canvas, step: canvases.append(canvas))
        assert "fox" not in answer and "<|im_end|>" not in answer
    assert {int(canvas.editable.sum()) for canvas in canvases} == {12}


@pytest.mark.parametrize(("length", "max_tokens"), [(4, None), (30, 4)])
def test_the_room_of_an_answer_of_a_length_is_that_length(length: int, max_tokens: int | None) -> None:
    """Neither more, which a short window would refuse, nor less, which the canvas of a later turn would."""
    chat, holes = Chat(speaks("fox", length=84), length=length, max_tokens=max_tokens), set()
    for _ in range(3):
        (answer,) = chat.say("Which of them?", lambda canvas, step: holes.add(int(canvas.editable.sum())))
        assert answer
    assert holes == {length} and chat.dropped > 0


# ------------------------------------------------------------------------------------------------------ rewriting


def test_a_span_of_the_last_answer_is_written_again_between_both_sides() -> None:
    lazy = encode(TOKENIZERS["chatml"], " lazy")
    model = speaks(lambda text, start: lazy)
    chat = Chat(model, max_tokens=16, steps=1)
    chat.messages = talk("What?", "the quick fox jumps")
    shown: list[Any] = []
    assert chat.rewrite("quick", len(lazy), lambda canvas, step: shown.append(canvas)) == "the lazy fox jumps"
    assert chat.messages == talk("What?", "the lazy fox jumps")
    given = decode(chat.model.tokenizer, shown[0].ids[0].tolist())
    assert given.endswith(" fox jumps<|im_end|>"), "what stands behind the span is given, and the answer's end"
    with pytest.raises(ValueError, match="the last answer does not hold 'slow'"):
        chat.rewrite("slow", 2)
    chat.reset()
    with pytest.raises(ValueError, match="there is no answer yet"):
        chat.rewrite("quick", 2)


def test_a_longer_span_takes_the_room_of_the_oldest_turns() -> None:
    chat = Chat(speaks("fox", length=84), max_tokens=16)
    chat.messages = talk("One?", "Yes.", "Two?", "Yes.", "Three?", "the quick fox")
    seed = chat._turn_seed
    made = chat.rewrite("quick", 20)
    assert made.startswith("the ") and made.endswith(" fox")
    assert chat.dropped == 2 and chat.messages == talk("Three?", made) and chat._turn_seed == seed
    with pytest.raises(ValueError, match=r"the message needs \d+ tokens and the answer 60.*lower the length"):
        chat.rewrite("the", 60)
    assert chat.messages == talk("Three?", made)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("old => 3 tokens", ("old", 3)),
        ("a => b => 1 token", ("a => b", 1)),
        (" two words=>auto", ("two words", "auto")),
    ],
)
def test_how_a_rewrite_is_asked_for(text: str, expected: Any) -> None:
    assert read_rewrite(text) == expected


@pytest.mark.parametrize("text", ["", "old", "=> 3", "old => some", "old =>"])
def test_how_it_is_not(text: str) -> None:
    with pytest.raises(ValueError, match="write /infill old text => N tokens"):
        read_rewrite(text)


def test_a_model_without_a_template_says_what_to_do() -> None:
    model = speaks("")
    model.tokenizer = chat_tokenizer(None)
    with pytest.raises(ValueError, match="--chat-template FILE"):
        diffulm.Chat(model)
