"""Conversations of every format become sequences in which answers, and only they, may be noised."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffulm.data.chat import Answers, Conversations, tokenise, with_common_mean
from diffulm.data.conversations import Conversation, format_of, read_conversations
from diffulm.data.loader import Loader, Mixture
from diffulm.data.sources import Source
from diffulm.layout import Block, Full
from diffulm.process import MaskedDiffusion
from diffulm.tokenizer import SpecialTokens, decode, special_tokens

from ..dialogues import chat_tokenizer, talk, write_jsonl

TOKENIZER = chat_tokenizer()
SPECIAL = special_tokens(TOKENIZER)


def read(path: Path, **options: Any) -> Any:
    return read_conversations(Source("chat", str(path)), **options)


def bare(*lengths: tuple[int, int]) -> Answers:
    """Samples of (context, answer) tokens, all tokens different and above the special ones."""
    ids = np.arange(10, 10 + sum(a + b for a, b in lengths), dtype=np.int32)
    starts = np.cumsum([0, *(a + b for a, b in lengths)])
    contexts = np.array([a for a, _ in lengths])
    return Answers(ids, starts, contexts, np.arange(len(lengths)), contexts)


SP = SpecialTokens(bos=0, eos=1, pad=2, mask=3)


# --------------------------------------------------------------------------------------------------------- formats

SAME = {
    "messages": {"messages": talk("Hi?", "Ho."), "id": 3},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]},
    "alpaca": {"instruction": "Hi?", "input": "", "output": "Ho."},
    "prompt/response": {"prompt": "Hi?", "response": "Ho."},
    "prompt/completion": {"prompt": "Hi?", "completion": "Ho."},
    "question/answer": {"question": "Hi?", "answer": "Ho.", "level": 1},
}


@pytest.mark.parametrize("kind", SAME)
def test_every_format_gives_the_same_messages(kind: str, tmp_path: Path) -> None:
    assert format_of(SAME[kind]) == kind
    (one,) = read(write_jsonl(tmp_path / "a.jsonl", [SAME[kind]])).conversations
    assert list(one.messages) == talk("Hi?", "Ho.")


def test_details_of_formats(tmp_path: Path) -> None:
    rows: list[Any] = [{"instruction": "Add.", "input": "1, 2", "output": "3"}, {"instruction": "Hi", "output": "Ho"}]
    found = read(write_jsonl(tmp_path / "alpaca.jsonl", rows)).conversations
    assert [c.messages[0]["content"] for c in found] == ["Add.\n\n1, 2", "Hi"]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"system": "s", "conversations": turns}, {"system": "", "conversations": turns}]
    found = read(write_jsonl(tmp_path / "share.jsonl", rows)).conversations
    assert [list(c.messages) for c in found] == [talk("a", "b", system="s"), talk("a", "b")]


def test_json_lists_gzip_parquet_and_folders(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "many"
    folder.mkdir()
    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(4)]
    (folder / "a.json").write_text(json.dumps(rows[:1]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((json.dumps(rows[1]) + "\n\n").encode()))
    datasets.Dataset.from_list(rows[2:]).to_parquet(str(folder / "c.parquet"))
    found = read(folder).conversations
    assert [c.messages[1]["content"] for c in found] == ["r0", "r1", "r2", "r3"]
    assert [c.where.rpartition("/")[2] for c in found] == ["a.json, item 1", "b.jsonl.gz, line 1"] + [
        f"c.parquet, row {i}" for i in range(2)
    ]
    with pytest.raises(ValueError, match=r"is or holds none of \.jsonl, "):
        read(write_jsonl(tmp_path / "x.csv", rows))


GOOD = SAME["messages"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "id": 1}, r"no format of conversations \(found: id, text\); known: messages \(role, content\)"),
        ([1], r"no format of conversations \(found: list\)"),
        ({"messages": []}, "there are no messages"),
        ({"messages": "hello"}, "field 'messages' is str, not a list of turns"),
        ({"messages": [{"from": "human", "value": "a"}]}, "a turn has from, value in place of 'role' and 'content'"),
        ({"messages": talk("a")}, "no assistant message"),
        ({"messages": talk("a", "")}, r"message 2 \(assistant\) is empty"),
        ({"messages": talk("a", "b")[::-1]}, "roles are out of order"),
        (SAME["alpaca"], "this row is alpaca, the ones before it messages; give each format a source of its own"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_rows_are_named_by_line_or_counted(row: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = row if isinstance(row, str) else json.dumps(row)
    path.write_text(f"{json.dumps(GOOD)}\n{bad}\n{json.dumps({'messages': talk('c', 'd')})}\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{message}.*sft\.skip_bad"):
        read(path)
    found = read(path, skip_bad=True)
    assert found.bad == 1 and len(found.conversations) == 2 and "line 2: " in found.problems[0]


def test_one_stray_row_does_not_make_the_others_bad(tmp_path: Path) -> None:
    rows: list[Any] = [{"messages": talk(f"a{i}", "b")} for i in range(12)]
    stray = {"prompt": "p", "response": "r"}
    found = read(write_jsonl(tmp_path / "a.jsonl", [stray, [], *rows, stray]), skip_bad=True)
    assert len(found.conversations) == 12 and found.bad == 3
    assert "line 1: this row is prompt/response, most are messages" in found.problems[0]
    assert "line 2: " in found.problems[1] and "line 15: this row" in found.problems[2], "in the order of the file"
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: this row is messages, the ones before it prompt/response"):
        read(write_jsonl(tmp_path / "b.jsonl", [stray, *rows]))
    found = read(write_jsonl(tmp_path / "c.jsonl", [stray, rows[0]]), skip_bad=True)
    assert [c.where.rpartition(", ")[2] for c in found.conversations] == ["line 1"], "of as many, the first"


def test_text_parts_are_joined_and_others_refused_by_name(tmp_path: Path) -> None:
    def row(*parts: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": list(parts)}, *talk("", "Ho.")[1:]]}

    one, two = ({"type": "text", "text": text} for text in ("Sum up:", "Hi?"))
    found = read(write_jsonl(tmp_path / "a.jsonl", [row(two), row(one, two)])).conversations
    assert [c.messages[0]["content"] for c in found] == ["Hi?", "Sum up:\nHi?"]
    for bad, message in (
        ({"type": "image_url", "image_url": {"url": "x"}}, r"1 \(user\) has a part of type 'image_url'"),
        ("Hi?", r"1 \(user\) has a part of type 'str'"),
        ({"type": "text", "text": None}, r"1 \(user\) has a text part without text"),
    ):
        with pytest.raises(ValueError, match=rf"a\.jsonl, line 1: message {message}.*--skip-bad"):
            read(write_jsonl(tmp_path / "a.jsonl", [row(one, bad)]))
    with pytest.raises(ValueError, match=r"line 1: message 1 \(user\) is empty"):
        read(write_jsonl(tmp_path / "a.jsonl", [row()]))


def test_texts_that_are_not_text_and_files_without_any(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": ["a"], "response": "b"}])
    with pytest.raises(ValueError, match="line 1: field 'prompt' is list, not text"):
        read(path)
    with pytest.raises(ValueError, match=r"has no conversation \(1 bad rows; the first: .*line 1: field"):
        read(path, skip_bad=True)


def test_rows_may_be_limited_and_options_of_text_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(9)])
    assert len(read_conversations(Source("chat", str(path), limit_documents=4)).conversations) == 4
    with pytest.raises(ValueError, match="exclude and limit_bytes are for text"):
        read_conversations(Source("chat", str(path), exclude=("*",)))


def test_a_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_list([SAME["messages"], {"messages": talk("a", "b"), "id": 4}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **options: table.to_iterable_dataset())
    found = read_conversations(Source("chat", "someone/chats")).conversations
    assert [c.where for c in found] == ["someone/chats, row 0", "someone/chats, row 1"]


def test_held_out_by_content_and_repeats_kept_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": "r"} for i in range(200)]
    found = read(write_jsonl(tmp_path / "a.jsonl", rows + rows[:7]), heldout_fraction=0.2)
    assert found.duplicates == 7 and len(found.conversations) == 200
    held = {c.messages[0]["content"] for c in found.conversations if c.heldout}
    assert 20 < len(held) < 60
    again = read(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), heldout_fraction=0.2)
    assert {c.messages[0]["content"] for c in again.conversations if c.heldout} == held
    two = read(write_jsonl(tmp_path / "c.jsonl", rows[:2]), heldout_fraction=0.001)
    assert sorted(c.heldout for c in two.conversations) == [False, True]
    assert not any(c.heldout for c in read(tmp_path / "c.jsonl").conversations)


# ------------------------------------------------------------------------------------------------------ tokenising


def conversations(*messages: Any) -> list[Conversation]:
    return [Conversation(tuple(m), f"chat.jsonl, line {i}") for i, m in enumerate(messages, 1)]


def test_every_answer_is_a_sample_of_its_own_and_nothing_later_is_in_it() -> None:
    found = tokenise(conversations(talk("one", "two", "three", "four"), talk("five", "six")), TOKENIZER)
    assert len(found) == 3 and found.conversation.tolist() == [0, 0, 1]
    texts = [tuple(decode(TOKENIZER, part.tolist()) for part in found.pair(i)) for i in range(3)]
    assert [answer for _, answer in texts] == [f"{w}<|im_end|>" for w in ("two", "four", "six")]
    assert "three" not in texts[0][0] and "two" in texts[1][0] and found.sizes.tolist() == [3, 4, 3]


def test_what_a_template_refuses_is_named_or_counted(tmp_path: Path) -> None:
    bad = conversations(talk("a", "b"), talk("a", "b<|im_end|>c"))
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 2: a message spells out the special token"):
        tokenise(bad, TOKENIZER)
    problems: list[str] = []
    assert len(tokenise(bad, TOKENIZER, skip_bad=True, problems=problems)) == 1
    assert len(problems) == 1 and "line 2" in problems[0]


def test_answers_come_back_from_disk(tmp_path: Path) -> None:
    found = tokenise(conversations(talk("one", "two")), TOKENIZER)
    found.save(tmp_path / "a.npz")
    again = Answers.open(tmp_path / "a.npz")
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(vars(found).values(), vars(again).values()))
    older = {name: value for name, value in vars(found).items() if name != "where"}
    np.savez(tmp_path / "older.npz", **older)
    again = Answers.open(tmp_path / "older.npz")
    assert len(again) == 1 and again.place(0).startswith("answer 1: ")
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="is no file of tokenised conversations"):
        Answers.open(tmp_path / "a.npz")


def test_an_answer_knows_its_place_and_whether_it_fits() -> None:
    made = conversations(talk("one", "two", "three", "four " * 9), talk("five", "six"))
    found = tokenise([*made, Conversation(tuple(talk("é", "ü")), "döner.jsonl, line 7")], TOKENIZER)
    places = [found.place(i).partition(": ")[0] for i in range(4)]
    first = [f"chat.jsonl, line 1, message {i}" for i in (2, 4)]
    assert places == [*first, "chat.jsonl, line 2", "döner.jsonl, line 7"], "each answer of several"
    context, answer = (len(part) for part in found.pair(1))
    size = 1 + context + answer
    assert found.place(1).endswith(f": {size} tokens (1 + context {context} + answer {answer})")
    assert found.longest == size and found.too_long(size).tolist() == [] and found.too_long(size - 1).tolist() == [1]


@pytest.mark.parametrize("rule", ["skip", "truncate"])
def test_what_is_counted_of_a_window_is_what_is_laid_out_in_it(rule: Any) -> None:
    answers = bare((4, 3), (4, 30), (20, 3), (4, 11), (3, 12), (3, 13), (15, 1))
    for length in (8, 16, 17, 24):
        made = Conversations.cut(answers, length, SP, too_long=rule)
        assert answers.in_window(length, truncate=rule == "truncate") == {
            "answers": len(made.which), "answer_tokens": int(made.answers.sum()), "left_out": made.skipped,
            "cut": made.truncated,
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- sequences


def layout_of(made: Conversations) -> list[list[tuple[list[int], list[int], int]]]:
    """(given, answer, EOS behind it) of every sample, read back from the sequences alone."""
    out = []
    for index in range(len(made)):
        ids, maskable, document, valid = made.read(index)
        assert len(ids) == len(maskable) == len(document) == len(valid) == made.length
        samples = []
        for k in sorted(set(document[valid].tolist())):
            mine = (document == k) & valid
            assert ids[mine][0] == SP.bos
            given, answer = ids[mine & ~maskable], ids[mine & maskable]
            extra = int((answer == SP.eos).sum())
            assert (answer[len(answer) - extra :] == SP.eos).all()
            samples.append((given[1:].tolist(), answer[: len(answer) - extra].tolist(), extra))
        assert not maskable[~valid].any() and (ids[~valid] == SP.pad).all()
        assert not set(document[~valid].tolist()) & set(document[valid].tolist())
        out.append(samples)
    return out


@pytest.mark.parametrize("padding", ["one", "random", "window"])
def test_sequences_hold_every_sample_once(padding: Any) -> None:
    rng = np.random.default_rng(0)
    answers = bare(*[(int(a), int(b)) for a, b in rng.integers(1, 15, (60, 2))])
    made = Conversations.cut(answers, 32, SP, eos_padding=padding)
    packs = layout_of(made)
    flat = [sample for pack in packs for sample in pack]
    expected = [tuple(part.tolist() for part in answers.pair(i)) for i in range(60)]
    assert sorted(tuple(sample[:2]) for sample in flat) == sorted(expected)
    assert made.skipped == made.truncated == 0
    extra = [e for *_, e in flat]
    if padding == "one":
        assert set(extra) == {0} and len(packs) < 40
    elif padding == "window":
        assert all(1 + len(a) + len(b) + e == 32 for a, b, e in flat) and len(packs) == 60
    else:
        assert 0 in extra and all(1 + len(a) + len(b) + e <= 32 for a, b, e in flat)


def test_random_padding_is_uniform_in_the_logarithm_of_the_canvas() -> None:
    """Canvases of 8..128 tokens for an answer of 8: a quarter of them in each octave, an eighth above 90."""
    made = Conversations.cut(bare(*[(7, 8)] * 4000), 136, SP)
    canvas = 8 + np.concatenate([made.extra[made.which == i] for i in range(4000)])
    assert canvas.min() == 8 and canvas.max() <= 128
    shares = np.histogram(canvas, [8, 16, 32, 64, 129])[0] / 4000
    assert np.abs(shares - 0.25).max() < 0.03
    # The sample's draw depends on (seed, index) alone: not on how many follow, nor on the window's other contents.
    fewer = Conversations.cut(bare(*[(7, 8)] * 100), 136, SP)
    assert fewer.extra.tolist() == made.extra[:100].tolist()
    assert Conversations.cut(bare(*[(7, 8)] * 100), 136, SP, seed=1).extra.tolist() != fewer.extra.tolist()


def test_what_is_too_long_is_skipped_or_truncated() -> None:
    answers = bare((4, 3), (4, 30), (20, 3), (4, 11))
    made = Conversations.cut(answers, 16, SP, eos_padding="one")
    assert (made.skipped, made.truncated) == (2, 0) and len(made.which) == 2
    made = Conversations.cut(answers, 16, SP, eos_padding="window", too_long="truncate")
    assert (made.skipped, made.truncated) == (1, 1)
    by_row = {int(row): k for k, row in enumerate(made.which)}
    assert (made.answers[by_row[1]], made.extra[by_row[1]]) == (11, 0), "cut at the window, without an end"
    with pytest.raises(ValueError, match=r"none of 1 answers fits a window of 8 .*\(the first: answer 1: 13 tokens"):
        Conversations.cut(bare((9, 3)), 8, SP, too_long="truncate")


def test_random_truncation_ends_answers_without_an_end() -> None:
    made = Conversations.cut(bare(*[(4, 10)] * 2000), 64, SP, truncate_share=0.3, eos_padding="window")
    cut = made.extra == 0
    assert abs(cut.mean() - 0.3) < 0.04
    assert np.abs(np.bincount(made.answers[cut], minlength=11)[1:] / cut.sum() - 0.1).max() < 0.04
    assert (made.answers[~cut] == 10).all()


def test_a_reused_mask_token_in_an_answer_is_not_maskable() -> None:
    answers = bare((2, 4))
    answers.ids[3] = SP.mask
    ids, maskable, *_ = Conversations.cut(answers, 8, SP, eos_padding="one").read(0)
    assert maskable.tolist() == [False] * 3 + [True, False, True, True, False] and ids[4] == SP.mask


@pytest.mark.parametrize("bad", [{"length": 2}, {"truncate_share": 2.0}, {"eos_weight": -1.0}, {"eos_padding": "two"}])
def test_settings_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Conversations.cut(bare((2, 4)), **{"length": 8, "special": SP, **bad})


# ------------------------------------------------------------------------------------------------------ the loader


@pytest.mark.parametrize("layout", [Full(), Block(4)], ids=["full", "block"])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_loader_noises_answers_only_and_weighs_the_eos_behind_them(layout: Any, weight: float) -> None:
    answers = bare(*[(3, 4), (5, 6), (2, 3)] * 8)
    made: Any = Conversations.cut(answers, 16, SP, eos_padding="window", eos_weight=weight)
    loader = Loader(Mixture([made], [1.0], 0), layout, MaskedDiffusion(3), 8, 8, 0)
    plain = Loader(
        Mixture([Conversations.cut(answers, 16, SP, eos_padding="window")], [1.0], 0),  # type: ignore[list-item]
        layout, MaskedDiffusion(3), 8, 8, 0,
    )  # fmt: skip
    context = {int(i) for k in range(len(answers)) for i in answers.pair(k)[0]}
    for n in range(3):
        (rows,), (other,) = loader.rows(n), plain.rows(n)
        targets = rows.target.tolist()
        assert not set(targets) & context and SP.eos in targets
        factor = torch.where(rows.target == SP.eos, weight, 1.0)
        torch.testing.assert_close(rows.weight, other.weight * factor / made.mean_weight)
        assert rows.maskable == other.maskable, "the count is of tokens, whatever they weigh"


def test_the_loss_is_a_weighted_mean() -> None:
    """Where every token costs one nat, so does the mean, whatever the EOS weigh; and their share is what was asked."""
    answers = bare(*[(3, 4), (5, 6), (2, 3), (1, 9)] * 6)
    for weight in (0.0, 0.25, 1.0, 3.0):
        made = Conversations.cut(answers, 24, SP, eos_padding="random", eos_weight=weight)
        total = count = eos = 0.0
        for index in range(len(made)):
            ids, maskable, _, _ = made.read(index)
            factor = made.weights(index)
            factor = np.ones(24, np.float32) if factor is None else factor
            total, count = total + float(factor[maskable].sum()), count + int(maskable.sum())
            eos += float(factor[maskable & (ids == SP.eos)].sum())
        assert total / count == pytest.approx(1, abs=1e-6) and int(made.extra.sum()) > 0
        behind, answer = int(made.extra.sum()) * weight, int(made.answers.sum())
        assert eos / total == pytest.approx(behind / (behind + answer), abs=1e-6)


def test_a_token_weighs_the_same_in_every_source() -> None:
    """Whatever the sources' lengths: one mean over the mixture, which is 1 over the tokens it is expected to draw."""
    short, long = (
        Conversations.cut(bare(*[(2, size)] * 6), 64, SP, eos_padding="window", eos_weight=0.1) for size in (4, 40)
    )
    assert short.mean_weight < long.mean_weight, "each by itself"
    shares, made = (3.0, 1.0), with_common_mean([short, long], (3.0, 1.0))
    found = [[q.weights(i)[q.read(i)[1]] for i in range(len(q))] for q in made]  # type: ignore[index]
    assert {float(w.max()) for rows in found for w in rows} == {float(np.float32(1 / made[0].mean_weight))}
    total = sum(share * np.mean([w.sum() for w in rows]) for share, rows in zip(shares, found, strict=True))
    count = sum(share * np.mean([w.size for w in rows]) for share, rows in zip(shares, found, strict=True))
    assert total / count == pytest.approx(1, rel=1e-6)
