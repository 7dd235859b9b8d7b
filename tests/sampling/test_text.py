"""Text in, text out: what was given comes back character for character, and completions end where they should."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

import diffulm.hub
from diffulm.convert import convert
from diffulm.hub import Model
from diffulm.process import MaskedDiffusion
from diffulm.render import DenoisingView
from diffulm.sampling import (
    Ancestral,
    Canvas,
    Entropy,
    EntropyBound,
    Factor,
    FirstHitting,
    Infilling,
    Margin,
    RandomOrder,
    Remask,
    Step,
    Threshold,
    TopConfidence,
    generate,
    generate_ids,
    infill,
    pieces_for_view,
    policy_from_name,
)
from diffulm.tokenizer import decode, encode

from ..conftest import CORPUS, build_tokenizer
from ..toy import Noise

MASK = "<|mask|>"
BROKEN = "\ufffd"  # stands for bytes that are no UTF-8
KINDS = ("bytelevel", "sentencepiece", "metaspace")


def spaced_tokenizer(*, metaspace: bool) -> Any:
    """A BPE that writes spaces as ▁, puts one in front of every text, and falls back to bytes: as Llama 2's does
    (a normaliser), or with the Metaspace pre-tokeniser of later conversions."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def core(model: models.BPE) -> Tokenizer:
        out = Tokenizer(model)
        if metaspace:
            out.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        else:
            out.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        out.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return out

    first = core(models.BPE(unk_token="<unk>"))
    special = ["<unk>", "<s>", "</s>", MASK]
    first.pre_tokenizer = pre_tokenizers.Metaspace()  # no merges over spaces, as in the real ones
    first.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(vocab_size=260, special_tokens=special))
    # The trainer knows no byte tokens: they are put behind what it learnt.
    learnt = json.loads(first.to_str())["model"]
    vocab = learnt["vocab"] | {f"<0x{b:02X}>": len(learnt["vocab"]) + b for b in range(256)}
    merges = [tuple(pair) for pair in learnt["merges"]]
    full = core(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    full.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=full, unk_token="<unk>", bos_token="<s>", eos_token="</s>", mask_token=MASK
    )


@cache
def tokenizer_of(kind: str) -> Any:
    return build_tokenizer(mask=MASK) if kind == "bytelevel" else spaced_tokenizer(metaspace=kind == "metaspace")


def toy_model(kind: str = "bytelevel", script: dict[int, int] | None = None, *, length: int = 512) -> Model:
    """A model that says what the script has for a position, and elsewhere something random."""
    tokenizer = tokenizer_of(kind)
    noise: Any = Noise(len(tokenizer), tokenizer.mask_token_id, script=script, length=length)
    config = {"trained_length": length, "layout": "full", "source": "previous"}
    return Model(noise, tokenizer, MaskedDiffusion(tokenizer.mask_token_id), config, "toy")


def scripted(kind: str, prompt: str, tokens: list[int], **options: Any) -> Model:
    """A model that completes `prompt` with `tokens`."""
    at = 1 + len(encode(tokenizer_of(kind), prompt))
    return toy_model(kind, {at + i: token for i, token in enumerate(tokens)}, **options)


def byte_token(kind: str, value: int) -> int:
    """The token of one byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    name = bytes_to_unicode()[value] if kind == "bytelevel" else f"<0x{value:02X}>"
    token = tokenizer_of(kind).convert_tokens_to_ids(name)
    assert token != tokenizer_of(kind).unk_token_id
    return int(token)


class Watcher:
    """Keeps what `watch` is shown."""

    def __init__(self) -> None:
        self.canvas: Canvas | None = None
        self.steps: list[Step] = []

    def __call__(self, canvas: Canvas, step: Step) -> None:
        self.canvas = canvas
        self.steps.append(step)

    @property
    def ids(self) -> list[int]:
        """The first sample's tokens behind the start token."""
        return self.steps[-1].ids[0, 1:].tolist()

    @property
    def given(self) -> list[int]:
        assert self.canvas is not None
        return self.canvas.ids[0, 1:][~self.canvas.editable[0, 1:]].tolist()


# ------------------------------------------------------------------------------------------------------- infilling

letters_st = st.sampled_from(
    [*"aZ09.,(<>:/ \n\t", "  ", "\n\n", "    ", " the", "dog", "é", "e\u0301", "ñ", "ß", "中", "字", "🦊", "👩\u200d🔬",
     "🇨🇭", "\u200b", "\u00a0", "ﬁ", "\u0915\u094d\u0937", "\r\n", "<hole", ">"]
)  # fmt: skip
text_st = st.lists(letters_st, max_size=8).map("".join)


def pieces_are_kept(text: str, pieces: list[str], fills: tuple[str, ...]) -> None:
    assert len(fills) == len(pieces) - 1
    assert text == "".join(p + f for p, f in zip(pieces, [*fills, ""], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@given(prefix=text_st, suffix=text_st, length=st.integers(1, 4), seed=st.integers(0, 99))
@example(prefix="", suffix="", length=1, seed=0)
@example(prefix=" ", suffix=" ", length=2, seed=0)
@example(prefix="The dog ", suffix=", is", length=1, seed=3)
@example(prefix="a  ", suffix="\n\nb", length=3, seed=1)
@example(prefix="🦊", suffix="\u0301e", length=3, seed=2)
@settings(max_examples=60, deadline=None)
def test_prefix_fill_suffix_is_the_text(kind: str, prefix: str, suffix: str, length: int, seed: int) -> None:
    watcher = Watcher()
    text = infill(toy_model(kind), prefix, suffix, length=length, temperature=1.0, seed=seed, steps=2, watch=watcher)
    assert isinstance(text, Infilling)
    (fill,) = text.fills
    assert str(text) == prefix + fill + suffix
    # And that is what the tokens say, but for bytes that are no text.
    whole = decode(tokenizer_of(kind), watcher.ids)
    lossy = kind == "metaspace" and prefix.startswith(" ")  # Metaspace itself reads " a" and "a" as the same text
    if BROKEN not in whole and not lossy:
        assert whole == str(text)


@pytest.mark.parametrize("kind", KINDS)
@given(pieces=st.lists(text_st, min_size=2, max_size=5), data=st.data())
@settings(max_examples=40, deadline=None)
def test_several_holes_keep_every_piece(kind: str, pieces: list[str], data: st.DataObject) -> None:
    pieces = [piece.replace("<hole", "<Hole") for piece in pieces]
    lengths = [data.draw(st.none() | st.integers(1, 3)) for _ in pieces[1:]]
    marks = ["<hole>" if n is None else f"<hole:{n}>" for n in lengths]
    marked = "".join(p + m for p, m in zip(pieces, [*marks, ""], strict=True))
    watcher = Watcher()
    text = infill(toy_model(kind), marked, length=2, temperature=1.0, steps=1, watch=watcher)
    pieces_are_kept(text, pieces, text.fills)
    assert watcher.canvas is not None
    assert int(watcher.canvas.editable.sum()) == sum(2 if n is None else n for n in lengths)
    whole = decode(tokenizer_of(kind), watcher.ids)
    if BROKEN not in whole and not (kind == "metaspace" and text.startswith(" ")):
        assert whole == str(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hole_is_filled_with_the_tokens_drawn_for_it(kind: str) -> None:
    """The space before a word comes from the hole and is shown once; adjacent holes each take their own tokens."""
    tokenizer = tokenizer_of(kind)
    script = encode(tokenizer, "The quick brown")  # what follows the start token is scripted, given text included
    the, n = len(encode(tokenizer, "The")), len(script)
    model = toy_model(kind, dict(enumerate(script, 1)))
    text = infill(model, "The ", " fox", length=n - the)
    assert (str(text), text.fills) == ("The quick brown fox", ("quick brown",))
    text = infill(model, "The", " fox", length=n - the)
    assert (str(text), text.fills) == ("The quick brown fox", (" quick brown",))
    text = infill(model, f"The<hole:{n - the - 1}><hole:1> fox")
    tail = decode(tokenizer, script[:-1])
    assert str(text) == "The quick brown fox"
    assert text.fills == (tail[3:], "The quick brown"[len(tail) :])
    text = infill(model, f"<hole:{the}><hole:{n - the}>")
    assert (str(text), text.fills) == ("The quick brown", ("The", " quick brown"))
    text = infill(model, f"<hole:{n}> fox")
    assert (str(text), text.fills) == ("The quick brown fox", ("The quick brown",))
    text = infill(model, f"The <hole:{n - the}>")
    assert (str(text), text.fills) == ("The quick brown", ("quick brown",))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_space_that_belongs_to_the_word_is_left_to_the_hole(kind: str) -> None:
    """An indentation is given text: the model must see it."""
    watcher = Watcher()
    text = infill(toy_model(kind), "def f():\n    ", "\n", length=3, watch=watcher)
    assert text.startswith("def f():\n    ")
    assert decode(tokenizer_of(kind), watcher.given) == "def f():\n   \n"


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_no_text_leave_the_given_text_alone(kind: str) -> None:
    for prefix, suffix in [("é🦊", "🦊é"), ("", "🦊"), ("🦊 ", ""), ("a", "b")]:
        at = 1 + len(encode(tokenizer_of(kind), prefix.removesuffix(" ")))
        space = [byte_token(kind, 0x20)] * prefix.endswith(" ")  # that the hole has to begin with
        for junk in ([0xF0, 0x9F], [0x80], [0xC3, 0xC3, 0xA9], [0xF0, 0x9F, 0xA6, 0x8A]):
            tokens = [*space, *(byte_token(kind, b) for b in junk)]
            script = {at + i: token for i, token in enumerate(tokens)}
            text = infill(toy_model(kind, script), prefix, suffix, length=len(tokens))
            assert str(text) == prefix + text.fills[0] + suffix
            whole = bytes(junk).decode(errors="ignore")
            assert BROKEN in text.fills[0] or text.fills == (whole,)
            if len(junk) == 4:
                assert text.fills == ("🦊",)
            split = infill(toy_model(kind, script), f"{prefix}<hole:1><hole:{len(junk)}>{suffix}")
            pieces_are_kept(split, [prefix, "", suffix], split.fills)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [("no hole here", {}, "no hole"), ("", {}, "no hole"), ("a <hole:0> b", {}, "at least one token"),
     ("a <hole> b", {"length": 0}, "at least one token"), (f"a {MASK} <hole>", {}, "mask token"),
     ("a", {"suffix": f"b {MASK}"}, "mask token"), ("a<hole>", {"steps": 0}, "steps"),
     ("a <hole:200> b", {}, r"20[0-9] tokens.*trained on 128"),
     (f"a <hole:{10**9}> b", {}, r"100000000[0-9] tokens.*trained on 128"),
     (f"a <hole:{10**23}> b", {}, r"10{22}[0-9] tokens.*trained on 128"),
     ("a <hole> b", {"length": 10**23}, r"10{22}[0-9] tokens.*trained on 128"),
     (f"a <hole:auto> b <hole:{10**23}>", {}, "0 of the model's 128 are left"),
     ("a <hole:auto> b <hole>", {"max_length": 10**9, "length": "auto"}, "0 of the model's 128 are left"),
     ("a <hole>", {"steps": 10**9}, "at most 100000"), ("a <hole>", {"steps": 10**23, "block": 2}, "at most 100000"),
     ("a <hole> b <hole:atuo> c", {}, "<hole:atuo> names no length: write <hole>, <hole:N> for N tokens or <hole:au"),
     ("a <hole:atuo> c", {}, "names no length"), ("a <hole:> c", {}, "names no length"),
     ("<hole: 3>", {}, "names no length"), ("<hole:-1>", {}, "names no length"), ("<hole:3.5>", {}, "names no length")],
)  # fmt: skip
def test_infill_refuses(text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infill(toy_model(length=128), text, options.pop("suffix", None), **options)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_holes_are_filled_in_blocks_and_from_caches(loaded: Model, cache: Any) -> None:
    """One block over the text is the plain fill; smaller ones fill every hole too, one token a step."""
    text = "The <hole:3> fox<hole:6> over <hole:2>."
    plain = infill(loaded, text)
    whole = infill(loaded, text, cache=cache, block=64)
    assert (str(whole), whole.forwards) == (str(plain), plain.forwards)
    for block in (None, 4):
        small = infill(loaded, text, cache=cache, block=block, must=["dog"], must_not=["e"])
        pieces_are_kept(small, ["The ", " fox", " over ", "."], small.fills)
        assert any("dog" in fill for fill in small.fills) and not any("e" in fill for fill in small.fills)
    with pytest.raises(ValueError, match="guidance cannot decode from a cache"):
        infill(loaded, text, cache="dual", guidance=2.0)


def test_beside_a_suffix_a_hole_mark_is_text() -> None:
    text = infill(toy_model(), "write <hole:3>", " here <hole>", length=2)
    assert text.startswith("write <hole:3>")
    assert text.endswith(" here <hole>")
    assert len(text.fills) == 1


# ------------------------------------------------------------------------------------------------------ completion


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_new_text_comes_back(kind: str) -> None:
    tokenizer, prompt = tokenizer_of(kind), "The quick"
    new = encode(tokenizer, "The quick brown fox")[len(encode(tokenizer, prompt)) :]
    watcher = Watcher()
    model = scripted(kind, prompt, new)
    assert generate(model, prompt, max_tokens=len(new), watch=watcher) == " brown fox"
    assert watcher.given == encode(tokenizer, prompt)
    assert len(watcher.ids) == len(watcher.given) + len(new)
    assert generate(model, [prompt], max_tokens=len(new)) == [" brown fox"]
    assert generate(scripted(kind, "", encode(tokenizer, "fox")), "", max_tokens=len(encode(tokenizer, "fox"))) == "fox"


def test_a_completion_ends_before_the_end_of_text_and_the_first_stop_string() -> None:
    tokenizer, prompt = tokenizer_of("bytelevel"), "The quick fox."
    new = encode(tokenizer, " brown fox jumps over")
    model, n = scripted("bytelevel", prompt, new), len(new)
    cases: list[tuple[Any, str]] = [
        ((), " brown fox jumps over"), (["fox"], " brown "), (["jumps", "fox"], " brown "), (["n fo"], " brow"),
        (["zebra"], " brown fox jumps over"), ([""], " brown fox jumps over"), ([" brown"], ""), ("fox", " brown "),
        (("over",), " brown fox jumps "),
    ]  # fmt: skip
    for stop, expected in cases:
        assert generate(model, prompt, max_tokens=n, stop=stop) == expected, stop
    for end in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        for at in (0, 2, len(new)):
            cut = [*new[:at], end, *new[at:]]
            ended = generate(scripted("bytelevel", prompt, cut), prompt, max_tokens=len(cut))
            assert ended == decode(tokenizer, new[:at])
    both = [*new[:2], tokenizer.eos_token_id, *new[2:]]
    assert generate(scripted("bytelevel", prompt, both), prompt, max_tokens=n + 1, stop=["jumps"]) == decode(
        tokenizer, new[:2]
    )


def test_a_finished_completion_costs_no_forward() -> None:
    """Unequal prompts in a batch: each stops at its own end-of-text token, the text as before."""
    tokenizer, prompts = tokenizer_of("bytelevel"), ["The quick", "The quick brown fox jumps"]
    ends = [1 + len(encode(tokenizer, prompt)) + n for prompt, n in zip(prompts, (2, 4), strict=True)]
    model = toy_model("bytelevel")
    noise: Any = model.denoiser
    for position in range(1, 60):  # surest on the left
        noise.logits[position].clamp_(max=0.0)
        noise.logits[position, tokenizer.eos_token_id if position in ends else 9] = 20.0 - position / 4
    both = generate(model, prompts, max_tokens=24)
    assert noise.forwards == 5  # three for one, five for the other
    assert all(both)
    assert [generate(model, prompt, max_tokens=24) for prompt in prompts] == both
    watcher = Watcher()
    generate(model, prompts[0], max_tokens=24, watch=watcher)
    assert watcher.ids[ends[0] - 1 :] == [tokenizer.eos_token_id] * (24 - 2)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_bytes_after_a_prompt_do_not_eat_it(kind: str) -> None:
    for prompt in ("🦊", "é", "dog"):
        text = generate(scripted(kind, prompt, [byte_token(kind, b) for b in (0x9F, 0xA6)]), prompt, max_tokens=2)
        assert set(text) == {BROKEN}


@given(text_st, st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_any_prompt_is_taken(prompt: str, max_tokens: int, seed: int) -> None:
    for kind in KINDS:
        assert isinstance(generate(toy_model(kind), prompt, max_tokens=max_tokens, temperature=1.0, seed=seed), str)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [("dog " * 40, {}, r"\d+ tokens.*trained on 64"), ("a", {"max_tokens": 63}, r"65 tokens.*trained on 64"),
     ("a", {"max_tokens": 10**9}, r"10000000[0-9]+ tokens.*trained on 64"),
     (["a", "b c"], {"max_tokens": 10**23}, r"10{21}[0-9]+ tokens.*trained on 64"),
     ("a", {"steps": 10**9}, "at most 100000"), ("a", {"steps": 10**23, "block": 4}, "at most 100000"),
     (f"a {MASK}", {}, "mask token"), ("a", {"max_tokens": 0}, "max_tokens"), ("a", {"steps": 0}, "steps"),
     ([], {}, "nothing to fill"), ("a", {"policy": "best"}, "unknown policy"), ("a", {"temperature": -1.0}, "temper")],
)  # fmt: skip
def test_generate_refuses(prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(toy_model(length=64), prompt, **options)


def test_the_longest_canvas_is_the_trained_length() -> None:
    assert len(encode(tokenizer_of("bytelevel"), "a")) == 1
    generate(toy_model(length=64), "a", max_tokens=62, steps=1)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Model:
    """A converted tiny Llama in float64."""
    return diffulm.hub.load(checkpoint, device="cpu", dtype="float64")


def test_a_real_model_completes_alone_and_in_a_batch(loaded: Model) -> None:
    prompts = ["The quick brown", "def add(a", "", "Numbers: 0 1 2 3"]
    together = generate(loaded, prompts, max_tokens=8, steps=4)
    assert [generate(loaded, p, max_tokens=8, steps=4) for p in prompts] == together
    sampled = [generate(loaded, prompts, max_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len(set(generate(loaded, [prompts[0]] * 4, max_tokens=8, temperature=1.0))) > 1  # a seed for each
    by_name = generate(loaded, prompts, max_tokens=8, policy="entropy")
    assert by_name == generate(loaded, prompts, max_tokens=8, policy=Entropy())
    holes = infill(loaded, "The <hole:2> fox <hole>.", length=3)
    assert holes == infill(loaded, "The <hole:2> fox <hole>.", length=3)
    pieces_are_kept(holes, ["The ", " fox ", "."], holes.fills)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cached_completion(loaded: Model, cache: Any) -> None:
    """Prompts of unequal lengths; one block over all of it is the uncached text, smaller blocks some other one."""
    prompts = ["The quick brown", "", "Numbers: 0 1 2 3"]
    assert generate(loaded, prompts, max_tokens=8, cache=cache, block=64) == generate(loaded, prompts, max_tokens=8)
    small = generate(loaded, prompts, max_tokens=8, cache=cache, block=4)
    assert small == [generate(loaded, p, max_tokens=8, cache=cache, block=4) for p in prompts]


def test_caches_that_do_not_fit_are_refused(loaded: Model) -> None:
    with pytest.raises(ValueError, match="unknown cache 'best': use none, prefix or dual"):
        generate(loaded, "a", cache="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keeps no keys and values"):
        generate(toy_model(), "a", cache="dual")
    layout = {"layout": "block", "block_size": 4, "source": "own"}
    blocks = Model(loaded.denoiser, loaded.tokenizer, loaded.process, loaded.config | layout, "blocks")
    with pytest.raises(ValueError, match="the block layout needs no approximate cache"):
        generate(blocks, "a", cache="dual")


# ------------------------------------------------------------------------------------------------------- the view


def test_pieces_tell_given_held_new_and_masked() -> None:
    tokenizer = tokenizer_of("bytelevel")
    new = encode(tokenizer, " brown fox")
    model, watcher = scripted("bytelevel", "The dog", new), Watcher()
    generate(model, "The dog", max_tokens=len(new), watch=watcher, steps=len(new))
    assert watcher.canvas is not None
    given = len(encode(tokenizer, "The dog"))
    for k, step in enumerate(watcher.steps):  # equally sure everywhere: from left to right
        pieces = pieces_for_view(model, watcher.canvas, step)
        states = ["given"] * given + ["held"] * k + ["new"] + ["masked"] * (len(new) - k - 1)
        assert [state for _, state in pieces] == states
        assert all(text == "" for text, state in pieces if state == "masked")
        assert "".join(text for text, _ in pieces) == "The dog" + decode(tokenizer, new[: k + 1])


@pytest.mark.parametrize("kind", KINDS)
@given(text_st, text_st)
@example("The quick  fox", " 🦊👩\u200d🔬 é")
@settings(max_examples=25, deadline=None)
def test_the_pieces_of_a_finished_canvas_are_its_text(kind: str, prefix: str, suffix: str) -> None:
    """Also where a character is several tokens, and where a tokenizer drops the space of a first word."""
    model, watcher = toy_model(kind), Watcher()
    infill(model, prefix, suffix, length=2, watch=watcher)
    assert watcher.canvas is not None
    pieces = pieces_for_view(model, watcher.canvas, watcher.steps[-1])
    assert len(pieces) == len(watcher.ids)
    whole = decode(model.tokenizer, watcher.ids)
    if BROKEN not in whole:
        assert "".join(text for text, _ in pieces) == whole


def test_pieces_of_a_padded_sample_end_with_it() -> None:
    model, watcher = toy_model(), Watcher()
    prompts = ["a", "The quick brown fox jumps"]
    generate(model, prompts, max_tokens=3, watch=watcher)
    assert watcher.canvas is not None
    for b, prompt in enumerate(prompts):
        pieces = pieces_for_view(model, watcher.canvas, watcher.steps[-1], b)
        assert len(pieces) == len(encode(model.tokenizer, prompt)) + 3
        assert "".join(text for text, state in pieces if state == "given") == prompt


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_follows_a_run(terminal: bool) -> None:
    model, out = scripted("bytelevel", "The dog", encode(tokenizer_of("bytelevel"), " brown")), io.StringIO()
    n = len(encode(model.tokenizer, " brown"))
    seen = []
    with DenoisingView(
        Console(file=out, force_terminal=terminal, width=80, height=20), seconds_between_lines=0
    ) as view:

        def watch(canvas: Canvas, step: Step) -> None:
            seen.append(step.index)
            view.update(step=step.index + 1, steps=step.steps, pieces=pieces_for_view(model, canvas, step))

        generate(model, "The dog", max_tokens=n, watch=watch)
    assert seen == list(range(n))
    assert "brown" in out.getvalue().replace("\x1b[1;32m", "").replace("\x1b[0m", "")
    assert f"step {n}/{n}" in out.getvalue()


@pytest.mark.parametrize(
    ("name", "policy"),
    [("confidence", TopConfidence()), ("entropy", Entropy()), ("margin", Margin()), ("random", RandomOrder()),
     ("ancestral", Ancestral()), ("threshold", Threshold()), ("threshold:0.75", Threshold(0.75)),
     ("threshold:0.75:confident", Threshold(0.75, "confident")), ("first-hitting", FirstHitting()),
     ("factor", Factor()), ("factor:0.5", Factor(0.5)), ("entropy-bound", EntropyBound()),
     ("entropy-bound:2", EntropyBound(2.0)),
     ("remask", Remask()), ("remask:0.1", Remask(0.1)), ("remask:0.1:rescale", Remask(0.1, "rescale"))],
)  # fmt: skip
def test_policies_by_name(name: str, policy: object) -> None:
    assert policy_from_name(name) == policy


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "unknown policy"), ("Entropy", "unknown policy"), ("entropy:2", "unknown policy"),
     ("threshold:x", "threshold:TAU"), ("threshold:2", "threshold:TAU"), ("threshold:nan", "threshold:TAU"),
     ("threshold:", "threshold:TAU"), ("threshold:0.9:rightmost", "threshold:TAU:confident"),
     ("threshold:0.9:confident:x", "threshold:TAU:confident"), ("factor:0", "factor:F with F > 0"),
     ("factor:1:2", "factor:F"), ("entropy-bound:-1", "entropy-bound:GAMMA"), ("remask:2", "remask:ETA"),
     ("remask:0.1:conf", "remask:ETA:rescale"), ("first-hitting:3", "unknown policy")],
)  # fmt: skip
def test_wrong_policy_names_say_what_is_right(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_from_name(name)


# ------------------------------------------------------------------------------------------------ plain transformers


@pytest.fixture(scope="module")
def plain(loaded: Model) -> Any:
    """The transformers model inside, as a transformers user would hold it."""
    return loaded.denoiser.model


@pytest.fixture(scope="module")
def prompt(plain: Any) -> torch.Tensor:
    return torch.tensor([[plain.config.bos_token_id, 40, 41, 42, 43]])


def test_generate_ids_appends_and_never_masks(plain: Any, prompt: torch.Tensor) -> None:
    mask = plain.config.mask_token_id
    for ids in (prompt, prompt[:, 1:], prompt.repeat(3, 1)):  # with the start token and without
        out = generate_ids(plain, ids, max_tokens=6, temperature=1.0)
        assert out.shape == (len(ids), ids.shape[1] + 6)
        assert torch.equal(out[:, : ids.shape[1]], ids)
        assert not (out == mask).any()
    with_start, without = (generate_ids(plain, ids, max_tokens=6)[:, -6:] for ids in (prompt, prompt[:, 1:]))
    assert torch.equal(with_start, without)
    assert torch.equal(generate_ids(plain, prompt, max_tokens=6, seed=3), generate_ids(plain, prompt, max_tokens=6))
    drawn = [generate_ids(plain, prompt, max_tokens=6, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_generate_ids_counts_new_tokens_as_transformers_does(plain: Any, prompt: torch.Tensor) -> None:
    from transformers import GenerationConfig

    def new(**kwargs: Any) -> int:
        return generate_ids(plain, prompt, steps=1, **kwargs).shape[1] - prompt.shape[1]

    assert new() == 32
    assert new(max_new_tokens=5) == 5
    assert new(max_tokens=3, max_new_tokens=5) == 3
    assert new(generation_config=GenerationConfig(max_new_tokens=7)) == 7
    assert new(generation_config=GenerationConfig(max_new_tokens=7), max_new_tokens=2) == 2
    assert new(generation_config=GenerationConfig(), logits_processor=None, synced_gpus=None, use_cache=True) == 32


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_ids_honours_padding(plain: Any, side: str) -> None:
    bos = plain.config.bos_token_id
    prompts = [[bos, 40, 41, 42, 43], [bos, 50, 51], [60]]
    ids = torch.full((3, 5), 1)
    seen = torch.zeros(3, 5, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        at = 5 - len(prompt) if side == "left" else 0
        ids[row, at : at + len(prompt)] = torch.tensor(prompt)
        seen[row, at : at + len(prompt)] = 1
    out = generate_ids(plain, ids, attention_mask=seen, max_tokens=4)
    assert torch.equal(out[:, :5], ids)
    for row, prompt in enumerate(prompts):
        alone = generate_ids(plain, torch.tensor([prompt]), max_tokens=4)
        assert out[row, 5:].tolist() == alone[0, -4:].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_tokens": 0}, "max_tokens"), ({"max_new_tokens": 0}, "max_tokens"), ({"steps": 0}, "steps"),
     ({"max_tokens": 100}, r"105 tokens.*trained on 64"), ({"policy": "x"}, "unknown policy")],
)  # fmt: skip
def test_generate_ids_refuses(plain: Any, prompt: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_ids(plain, prompt, **options)


@pytest.mark.parametrize("several", [False, True])
def test_generate_ids_fills_up_behind_the_end(
    plain: Any, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    """As transformers does; the tokens before the end are those without it."""
    free = generate_ids(plain, prompt, max_tokens=6, policy="random", seed=3)[0, -6:].tolist()
    end = free[2]
    monkeypatch.setattr(plain.config, "eos_token_id", [end, plain.config.eos_token_id] if several else end)
    first = free.index(end)
    ended = generate_ids(plain, prompt, max_tokens=6, policy="random", seed=3)[0, -6:].tolist()
    assert ended == [*free[:first], *[end] * (6 - first)]


def test_generate_ids_ends_with_a_whole_block(parent: Path, tmp_path: Path) -> None:
    """As `generate` does: how many tokens are asked for changes none of those before them."""
    convert(str(parent), tmp_path / "blocks", trained_length=64, layout="block", block_size=8, source="own")
    model: Any = diffulm.hub.load(tmp_path / "blocks", device="cpu", dtype="float64").denoiser
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim >= 2 else 1)
    few, many = (
        generate_ids(model.model, torch.tensor([[0, 40, 41], [0, 50, 51]]), max_tokens=n, policy="entropy")
        for n in (2, 13)
    )
    assert few.shape == (2, 5) and torch.equal(few, many[:, :5])


def test_generate_ids_refuses_masks_and_parents(plain: Any, prompt: torch.Tensor, parent: Path) -> None:
    with pytest.raises(ValueError, match="mask token"):
        generate_ids(plain, torch.tensor([[0, 40, plain.config.mask_token_id]]))
    ordinary, _ = diffulm.hub.load_parent(str(parent))
    with pytest.raises(ValueError, match="no diffusion checkpoint"):
        generate_ids(ordinary, prompt)


def test_custom_generate_of_plain_transformers(
    checkpoint: Path, loaded: Model, prompt: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint opened without diffulm in sight: both ways of asking give `generate_ids`' tokens."""
    import transformers.dynamic_module_utils
    from transformers import AutoModelForCausalLM, GenerationConfig

    # transformers copies the file there; else it would be the user's own cache.
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = str(checkpoint)
    with diffulm.hub.quiet_transformers():
        bound = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    mask = stock.config.mask_token_id
    expected = generate_ids(loaded.denoiser.model, prompt, max_tokens=4)
    assert bound.generate(prompt).shape == (1, prompt.shape[1] + 32)
    asked = {"custom_generate": folder, "trust_remote_code": True}
    for out in (
        bound.generate(prompt, max_tokens=4),
        bound.generate(prompt, max_new_tokens=4),
        bound.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4),
        stock.generate(prompt, max_tokens=4, **asked),
        stock.generate(prompt, max_new_tokens=4, **asked),
        stock.generate(inputs=prompt, generation_config=GenerationConfig(max_new_tokens=4), **asked),
        stock.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, **asked),
    ):
        assert torch.equal(out, expected)
        assert not (out == mask).any()
    sampled = stock.generate(prompt, max_tokens=4, temperature=1.0, seed=1, policy="random", **asked)
    assert not torch.equal(sampled, expected)
