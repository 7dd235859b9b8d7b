"""Infilling: a hole between what stands before and behind it, of known and of unknown length, and what a parent can do.

    way      diffulm's model                              parent
    oracle   told how many tokens the truth has           left to right from the prefix, cut at as many tokens
    auto     the likeliest length up to the task's cap    left to right, cut at the cap
    fim      -                                            prefix, suffix and middle tokens, where its tokenizer has them

Knowing the length is worth much, so both are reported. Left to right, a text ends with its line or sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..layout import Block
from ..tokenizer import decode, encode, encode_after
from .generate import Ask, Writer
from .generation_tasks import Generation
from .packaged import Prompt
from .schemas import Record

#: (prefix, suffix, middle) as families write them: StarCoder, Qwen and DeepSeek's kin, CodeLlama, CodeGemma is Qwen's.
FIM_TOKENS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


def fim_tokens(tokenizer: Any) -> tuple[int, int, int] | None:
    """Ids of (prefix, suffix, middle) where a tokenizer has such tokens, else None."""
    vocabulary = tokenizer.get_vocab()
    for names in FIM_TOKENS:
        if all(name in vocabulary for name in names):
            prefix, suffix, middle = (vocabulary[name] for name in names)
            return prefix, suffix, middle
    return None


def ways(writer: Writer) -> list[str]:
    """How a model can fill a hole. ValueError for one that sees nothing behind a hole."""
    if writer.model is not None:
        if isinstance(writer.rater.scorer.layout, Block):
            raise ValueError(
                "a checkpoint of the block layout does not see what stands behind a hole; leave infilling tasks out"
            )
        return ["oracle", "auto"]
    return ["oracle", "auto", *(["fim"] if fim_tokens(writer.rater.tokenizer) else [])]


def fitted(tokenizer: Any, length: int, hole: int, prefix: str, suffix: str) -> tuple[str, str, int]:
    """(prefix, suffix, tokens cut): what fits around a hole of so many tokens, behind a start token.

    What is farthest from the hole goes, and neither side gets less than half the room unless it needs no more.
    ValueError where the hole itself leaves no room.
    """
    room = length - 1 - hole
    if room < 2:
        raise ValueError(
            f"a hole of {hole} tokens leaves no room in the {length} tokens that the model was trained on; leave this "
            "task out or lower --max-tokens"
        )
    before, behind = encode(tokenizer, prefix), encode_after(tokenizer, suffix)
    given, aim = len(before) + len(behind), room
    while len(before) + len(behind) > room:
        left = min(len(before), max(aim // 2, aim - len(behind)))
        # As text, which is what every model gets. A piece at a cut edge may come out as more tokens: then once more.
        prefix = decode(tokenizer, before[len(before) - left :]) if left < len(before) else prefix
        suffix = decode(tokenizer, behind[: aim - left]) if aim - left < len(behind) else suffix
        before, behind = encode(tokenizer, prefix), encode_after(tokenizer, suffix)
        aim -= 1
    return prefix, suffix, max(0, given - len(before) - len(behind))


def prompts(task: Generation, records: Sequence[Record], writer: Writer) -> list[Prompt]:
    """The documents of a task, cut to what the model can take: the same strings for its parent."""
    assert task.hole is not None
    cap, found = writer.how.max_tokens or task.cap, []
    for i, record in enumerate(records):
        prefix, truth, suffix = task.hole(record)
        tokenizer, length = writer.rater.tokenizer, writer.rater.scorer.length
        hole = max(cap, len(encode_after(tokenizer, truth)))
        before, behind, cut = fitted(tokenizer, length, hole, prefix, suffix)
        found.append(Prompt(f"{task.name}/{i}", record, before, hole=(truth, behind), cut=cut))
    return found


def asks(task: Generation, item: Prompt, writer: Writer, way: str) -> list[Ask]:
    """What is asked of a model for one document in one way, once for each sample."""
    assert item.hole is not None
    prefix, (truth, suffix), samples = item.text, item.hole, writer.how.samples
    tokenizer, cap = writer.rater.tokenizer, writer.how.max_tokens or task.cap
    known = max(1, len(encode_after(tokenizer, truth)))
    size = known if way == "oracle" else cap
    if writer.model is not None:
        length: Any = known if way == "oracle" else "auto"
        return [Ask(prefix, size, (), k, suffix, length) for k in range(samples)]
    ids = None
    if way == "fim":
        marks = fim_tokens(tokenizer)
        assert marks is not None
        before, behind = writer.rater.encode(prefix), writer.rater.encode(suffix)
        # The room that `fitted` filled was that of a model without such tokens, and they must not be what is cut.
        over = 1 + len(before) + len(behind) + len(marks) + size - writer.rater.scorer.length
        before = before[max(0, over) :]
        ids = (marks[0], *before, marks[1], *behind, marks[2])
    return [Ask(prefix, size, (), k, suffix if ids else None, None, ids) for k in range(samples)]
