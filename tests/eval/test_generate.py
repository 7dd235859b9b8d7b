"""Models that write: the parent's cached loop, the writer's texts, and the parent against lm-eval's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import diffulm
from diffulm.convert import convert
from diffulm.denoiser import HFDenoiser
from diffulm.eval.autoregress import continue_ids
from diffulm.eval.generate import Ask, How, Writer
from diffulm.eval.rate import Rater, diffusion_scorer, parent_rater
from diffulm.eval.store import Store
from diffulm.hub import Model
from diffulm.sampling import Draw
from diffulm.tokenizer import encode

from ..conftest import build_parent
from ..families import random_model

SHARED = Path(__file__).parents[3] / "shared" / "data"
PROMPTS = ["The quick brown fox", "def add(a, b):", "A", "Numbers: 0 1 2 3 4 5 6 7"]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    torch.set_num_threads(1)
    return diffulm.load(checkpoint, dtype="float64")


def writer(model: Model, how: How | None = None, **changes: Any) -> Writer:
    return Writer(Rater(diffusion_scorer(model), model.tokenizer, "model", **changes), how or How(), model)


def seeded(model: Model, seed: int) -> Writer:
    return Writer(Rater(diffusion_scorer(model, seed=seed), model.tokenizer, "model"), How(), model)


def above(parent: Path, child: Writer) -> Writer:
    return Writer(parent_rater(str(parent), child.rater), child.how)


# ------------------------------------------------------------------------------------------------ from left to right


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_cached_loop_is_the_uncached_one(family: str, tmp_path: Path) -> None:
    """Greedy: at each token the most probable one of the stock model, of prompts of any lengths and caps together."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(build_parent(tmp_path, family), dtype=torch.float64).eval()
    contexts, caps = [[0, 5, 6, 7, 8, 9], [0], [0, 30, 31], [0, 9]], [7, 12, 1, 0]
    written = continue_ids(HFDenoiser(stock, None), contexts, caps, draw=Draw(0.0), seeds=[0] * 4)
    assert written == [by_hand(stock, *text) for text in zip(contexts, caps, strict=True)]


def by_hand(stock: Any, context: list[int], cap: int) -> list[int]:
    """The most probable token after each, by a whole forward of the stock model for every one."""
    ids = list(context)
    for _ in range(cap):
        with torch.no_grad():
            ids.append(int(stock(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


def test_a_family_without_a_cache_writes_too() -> None:
    """ALiBi: every text computed anew, of any lengths and caps together, greedy and drawn."""
    stock = random_model("bloom", dtype=torch.float64)
    contexts, caps = [[0, 5, 6, 7, 8, 9], [0], [0, 3, 4], [0, 9]], [5, 6, 1, 0]
    written = continue_ids(HFDenoiser(stock, None), contexts, caps, draw=Draw(0.0), seeds=[0] * 4, pad=1)
    assert written == [by_hand(stock, *text) for text in zip(contexts, caps, strict=True)]
    seeds, how = [3, 4, 3, 5], {"draw": Draw(1.0), "finished": lambda b, new: len(new) == 2 + b}
    together = continue_ids(HFDenoiser(stock, None), contexts, [9] * 4, seeds=seeds, **how)
    assert [len(new) for new in together] == [2, 3, 4, 5]
    for b in range(4):
        alone = continue_ids(
            HFDenoiser(stock, None), [contexts[b]], [9], seeds=[seeds[b]], draw=Draw(1.0),
            finished=lambda _, new, b=b: len(new) == 2 + b,
        )  # fmt: skip
        assert alone == [together[b]]


def test_a_text_does_not_depend_on_its_neighbours(parent: Path) -> None:
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float64).eval()
    denoiser, contexts, seeds = HFDenoiser(stock, None), [[0, 5, 6, 7], [0], [0, 30, 31]], [3, 4, 3]
    how = {"draw": Draw(1.0), "finished": lambda b, new: len(new) == 2 + b}
    together = continue_ids(denoiser, contexts, [9] * 3, seeds=seeds, **how)
    assert [len(new) for new in together] == [2, 3, 4], "who is done leaves, the others go on"
    for b in range(3):
        alone = continue_ids(
            denoiser, [contexts[b]], [9], seeds=[seeds[b]], draw=Draw(1.0),
            finished=lambda _, new, b=b: len(new) == 2 + b,
        )  # fmt: skip
        assert alone == [together[b]]
    other = continue_ids(denoiser, contexts, [9] * 3, seeds=[9, 9, 9], **how)
    assert other != together


# ---------------------------------------------------------------------------------------------------------- texts


def test_texts_are_those_of_generate(model: Model) -> None:
    asks = [Ask(prompt, 12) for prompt in PROMPTS]
    found = writer(model).write(asks)
    assert [t.text for t in found] == diffulm.generate(model, PROMPTS, max_tokens=12)
    assert all(t.forwards <= 12 and t.cut == 0 for t in found)
    few = writer(model, How(steps=3)).write(asks)
    assert [t.text for t in few] == diffulm.generate(model, PROMPTS, max_tokens=12, steps=3)
    assert max(t.forwards for t in few) == 3


@pytest.mark.parametrize("side", ["model", "parent"])
def test_ends(model: Model, parent: Path, side: str) -> None:
    """A stop string cuts the text and what follows it is not computed."""
    one = writer(model) if side == "model" else above(parent, writer(model))
    (whole,) = one.write([Ask(PROMPTS[0], 12)])
    stop = whole.text[3]
    (cut,) = one.write([Ask(PROMPTS[0], 12, (stop,))])
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.forwards <= whole.forwards
    if side == "parent":
        assert cut.forwards < whole.forwards == 12


@pytest.mark.parametrize("side", ["model", "parent"])
def test_samples_differ_and_can_be_had_again(model: Model, parent: Path, side: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "s.jsonl")
    child = writer(model, How(temperature=1.0, samples=3), store=store)
    one = child if side == "model" else above(parent, child)
    asks = [Ask(prompt, 10, (), k) for prompt in PROMPTS for k in range(3)]
    texts = one.write(asks)
    assert len({t.text for t in texts}) == len(texts)
    assert one.write(asks[5:6]) == texts[5:6] and len(store.values) == len(asks)
    # Anew, by itself and in another order.
    child = writer(model, How(temperature=1.0, samples=3))
    fresh = child if side == "model" else above(parent, child)
    assert [t.text for t in fresh.write(asks[7:8] + asks[2:3])] == [texts[7].text, texts[2].text]


def test_what_a_text_depends_on_is_in_its_key(model: Model, parent: Path) -> None:
    one = writer(model)
    ask = Ask("The", 8, (".",))
    others = [
        one._key(Ask("A", 8, (".",))), one._key(Ask("The", 9, (".",))), one._key(Ask("The", 8)),
        one._key(Ask("The", 8, (".",), 1)), one._key(Ask("The", 8, (".",), 0, " fox", 3)),
        writer(model, How(steps=2))._key(ask), writer(model, How(policy="entropy"))._key(ask),
        writer(model, How(temperature=0.5))._key(ask), above(parent, one)._key(ask),
        seeded(model, 1)._key(ask),
    ]  # fmt: skip
    assert len({one._key(ask), *others}) == 11
    assert above(parent, seeded(model, 1))._key(ask) == above(parent, one)._key(ask), "greedy from left to right"
    drawn = Writer(Rater(diffusion_scorer(model, draws=3), model.tokenizer, ""), How(), model)
    assert drawn._key(ask) == one._key(ask), "masks have nothing to do with it"


def test_a_random_order_goes_by_the_seed_at_temperature_0_too(model: Model, tmp_path: Path) -> None:
    """A run with another seed finds none of the texts of the first."""
    store, how = Store(tmp_path / "s.jsonl"), How(policy="ancestral", steps=3)
    raters = [Rater(diffusion_scorer(model, seed=seed), model.tokenizer, "", store) for seed in (0, 1)]
    first, second = (Writer(rater, how, model).write([Ask(prompt, 12) for prompt in PROMPTS]) for rater in raters)
    assert [t.text for t in first] != [t.text for t in second]


def test_what_is_counted_of_a_text_ends_with_its_stop_string(model: Model) -> None:
    """Beside texts that go on, tokens and forwards are those of the text by itself."""
    one = writer(model, How(policy="confidence"))
    whole = one.write([Ask(prompt, 12) for prompt in PROMPTS])
    asks = [Ask(prompt, 12, (text.text[:2],)) for prompt, text in zip(PROMPTS[:2], whole)]
    asks += [Ask(prompt, 12) for prompt in PROMPTS[2:]]
    together = writer(model).write(asks)
    assert together == [t for ask in asks for t in writer(model).write([ask])]
    for ask, found in zip(asks[:2], together):
        ids = encode(model.tokenizer, ask.until[0])
        assert found.text == "" and found.tokens <= max(2, len(ids)), "the first token, or the second, completes it"


def test_the_rest_of_a_last_block_is_not_counted(parent: Path, tmp_path: Path) -> None:
    convert(str(parent), tmp_path / "blocks", trained_length=64, layout="block", block_size=8, source="own")
    one = writer(diffulm.load(tmp_path / "blocks", dtype="float64"), How(policy="random"))
    # Eight places are given, a block is filled, and of another one only the first place is wanted.
    asks = [Ask("", 9, ids=(one.rater.scorer.special.bos, *range(40 + i, 47 + i))) for i in range(6)]
    forwards = [one.write([ask])[0].forwards for ask in asks]
    assert min(forwards) < 16 and all(9 <= n <= 16 for n in forwards)


def test_long_prompts_lose_their_front(model: Model, parent: Path) -> None:
    child = writer(model)
    long = " ".join(PROMPTS * 9)
    for one in (child, above(parent, child)):
        (found,) = one.write([Ask(long, 12)])
        ids = one.rater.encode(long)
        assert found.cut == len(ids) + 1 + 12 - 64
        kept = tuple(ids[found.cut :])
        assert one.write([Ask(long, 12, ids=kept)])[0].text == found.text
    with pytest.raises(ValueError, match=r"gsm8k is written in 63 tokens and .* 64 .*; give --max-tokens 32 or less"):
        child.check(63, "gsm8k")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 3}, "3 samples at temperature 0 are one and the same text"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"max_tokens": 0}, "max-tokens must be at least 1, not 0"),
        ({"steps": -1}, "steps must be at least 1, not -1"),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        How(**settings)


# ------------------------------------------------------------------------------------------- lm-eval's own model


def test_generate_until_answers_the_harness(model: Model) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.api.instance import Instance

    from diffulm.eval import harness

    one = writer(model, How(temperature=1.0, samples=2))
    lm = harness.language_model(one.rater, one)
    made = [Instance("generate_until", {}, (p, {"until": ["."], "max_gen_toks": 6}), 0, ("t", 0, 2)) for p in PROMPTS]
    twice = [r for r in made for _ in range(2)]  # as the harness repeats
    found = lm.generate_until(twice)
    assert found == [t.text for t in one.write([Ask(p, 6, (".",), k) for p in PROMPTS for k in range(2)])]
    assert found[0] != found[1]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the evaluation files of development are not here")
@pytest.mark.parametrize(("name", "cap"), [("gsm8k", 32), ("triviaqa", 24)])
def test_the_parent_is_lm_evals_own_model(name: str, cap: int, tmp_path: Path) -> None:
    """100 documents, one by one: the same text and the same of lm-eval's metrics as HFLM's generate_until."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from diffulm.convert import convert
    from diffulm.eval import packaged
    from diffulm.eval.generation_tasks import GENERATION

    # Untied: a random model with one matrix for both ends says the same token for ever.
    folder = build_parent(tmp_path / "parent", max_position_embeddings=2048, tie_word_embeddings=False)
    convert(str(folder), tmp_path / "child", trained_length=2048)
    child = writer(diffulm.load(tmp_path / "child", dtype="float64"))
    mine, task = above(folder, child), GENERATION[name]
    items = packaged.prompts(packaged.build(task, SHARED, 1), task, 100, None)
    assert len(items) == 100
    # A random model seldom writes what ends an answer: single letters are stop strings too.
    stops = [(*item.until, "re", "9", "n") for item in items]
    ours = mine.write([Ask(item.text, cap, stop) for item, stop in zip(items, stops)])
    assert not any(t.cut for t in ours)

    from lm_eval.api.instance import Instance

    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = mine.rater.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    lm = HFLM(pretrained=stock, tokenizer=tokenizer, batch_size=8)
    start = tokenizer.bos_token  # which this tokenizer does not add by itself, and which ends a text of ours
    how = {"max_gen_toks": cap, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (start + item.text, {**how, "until": [*stop, start]}), 0, (name, i, 1))
        for i, (item, stop) in enumerate(zip(items, stops))
    ]
    theirs = lm.generate_until(requests, disable_tqdm=True)
    same = [a.text == b for a, b in zip(ours, theirs, strict=True)]
    assert all(same), next((a.text, b) for a, b, s in zip(ours, theirs, same, strict=True) if not s)
    assert [item.judge(a.text) for item, a in zip(items, ours)] == [item.judge(b) for item, b in zip(items, theirs)]
    assert len({a.text for a in ours}) > 20 and sum(a.forwards < cap for a in ours) >= 5, "texts differ, and some end"
