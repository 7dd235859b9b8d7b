"""Holes of unknown length, words that must or must not occur; and the given text comes back whatever is asked."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import diffulm.hub
from diffulm.hub import Model
from diffulm.layout import Rows
from diffulm.process import MaskedDiffusion
from diffulm.sampling import Banned, Canvas, Draw, Threshold, TopConfidence, denoise, infill
from diffulm.sampling.infill import Holed
from diffulm.sampling.search import fits
from diffulm.tokenizer import decode, encode, encode_after

from ..toy import SPECIAL, VOCAB, Noise
from .test_shortcuts import LAYOUT, MASK, PROCESS, Counter, context
from .test_text import KINDS, Watcher, byte_token, pieces_are_kept, text_st, tokenizer_of, toy_model


class KnowsOneText:
    """A denoiser sure of one text, and the surer the nearer a canvas is to that text's length. Source "previous"."""

    def __init__(self, tokens: list[int], vocab: int, mask: int) -> None:
        self.tokens, self.vocab, self.mask, self.forwards = tokens, vocab, mask, 0

    def __call__(self, rows: Rows, *, cache: object = None) -> torch.Tensor:
        self.forwards += 1
        R = rows.ids.shape[1]
        logits = torch.zeros(len(rows.source), self.vocab, dtype=torch.float64)
        for n, source in enumerate(rows.source.tolist()):
            b, place = source // R, source % R  # place i of the text is row i + 1, predicted by row i
            off = abs(int(rows.valid[b].sum()) - 1 - len(self.tokens))
            logits[n, self.tokens[min(place, len(self.tokens) - 1)]] = 9.0 - 2 * off
        logits[:, self.mask] = float("-inf")
        return logits

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])


def knows(kind: str, text: str) -> tuple[Model, list[int]]:
    tokenizer = tokenizer_of(kind)
    tokens = encode(tokenizer, text)
    denoiser: Any = KnowsOneText(tokens, len(tokenizer), tokenizer.mask_token_id)
    config = {"trained_length": 64, "layout": "full", "source": "previous"}
    return Model(denoiser, tokenizer, MaskedDiffusion(tokenizer.mask_token_id), config, "toy"), tokens


# ------------------------------------------------------------------------------------------------- unknown lengths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_likeliest_length_is_found(kind: str, length: int) -> None:
    model, tokens = knows(kind, "The quick brown fox jumps over the lazy dog")
    tokenizer = tokenizer_of(kind)
    prefix = decode(tokenizer, tokens[:3])
    suffix = decode(tokenizer, tokens[: 3 + length] + tokens[3 + length :])[
        len(decode(tokenizer, tokens[: 3 + length])) :
    ]
    assert encode_after(tokenizer, suffix) == tokens[3 + length :], "the toy's text splits where the hole ends"
    text = infill(model, prefix, suffix, length="auto", max_length=9)
    assert text.lengths == (length,)
    assert str(text) == "The quick brown fox jumps over the lazy dog"
    found: Any = model.denoiser
    # Lengths 1..8 in one batch, 9 in another, then the fill itself.
    assert text.forwards == found.forwards == 8 + 9 + length


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Model:
    """A converted tiny Llama in float64."""
    return diffulm.hub.load(checkpoint, device="cpu", dtype="float64")


def test_the_search_is_the_comparison_it_says_it_is(loaded: Model) -> None:
    """Each length filled alone by the plain loop, its tokens' log-probabilities added by hand."""
    prefix, suffix = "The quick brown", " jumps over"
    scores = {}
    for n in range(1, 11):
        canvas, _ = Holed.read(loaded, prefix, suffix, n).canvas(loaded, [[n]])
        ids, nats = canvas.ids, 0.0
        for _ in range(n):
            masked = ids == loaded.process.mask_token_id
            with torch.no_grad():
                log_probs = loaded.denoiser(loaded.layout.decoding_rows(ids, canvas.valid, masked)).log_softmax(-1)
            best = log_probs.amax(-1).argmax()
            nats += float(log_probs[best].max())
            at = masked[0].nonzero()[int(best), 0]
            ids = ids.clone()
            ids[0, at] = log_probs[best].argmax()
        scores[n] = nats / n
    text = infill(loaded, prefix, suffix, length="auto", max_length=10)
    assert text.lengths == (max(scores, key=scores.__getitem__),)


def test_several_unknown_lengths_beside_known_ones(loaded: Model) -> None:
    text = infill(loaded, "The <hole:auto> fox<hole:2> over <hole> dog", length="auto", max_length=4)
    assert len(text.lengths) == 3 and text.lengths[1] == 2 and all(1 <= n <= 4 for n in text.lengths)
    pieces_are_kept(text, ["The ", " fox", " over ", " dog"], text.fills)
    known = "The <hole:{}> fox<hole:{}> over <hole:{}> dog".format(*text.lengths)
    again = infill(loaded, known)
    assert (str(again), again.lengths) == (str(text), text.lengths), "then they are filled like any others"
    assert again.forwards == sum(text.lengths) < text.forwards


def test_the_model_s_length_bounds_the_search() -> None:
    model, tokens = knows("bytelevel", "The quick brown fox jumps over the lazy dog")
    model.config["trained_length"] = 1 + len(tokens)
    prefix = decode(model.tokenizer, tokens[:-2])
    text = infill(model, prefix, "", length="auto", max_length=40)
    assert text.lengths == (2,)
    model.config["trained_length"] = 1 + len(tokens) - 2
    with pytest.raises(ValueError, match=r"needs 1 to 40 tokens, and 0 of the model's \d+ are left; shorten"):
        infill(model, prefix, "", length="auto", max_length=40)


# ------------------------------------------------------------------------------------------------------ constraints

words_st = st.sampled_from(["dog", "quick", "x1", "the", "a b", "fox."])


@pytest.mark.parametrize("kind", KINDS)
@given(prefix=text_st, suffix=text_st, must=st.lists(words_st, max_size=2, unique=True), seed=st.integers(0, 99),
       auto=st.booleans())  # fmt: skip
@example(prefix="a ", suffix="", must=["a b"], seed=0, auto=True)
@settings(max_examples=25, deadline=None)
def test_words_that_must_occur_do(kind: str, prefix: str, suffix: str, must: list[str], seed: int, auto: bool) -> None:
    length: Any = "auto" if auto else 14
    text = infill(
        toy_model(kind), prefix, suffix, length=length, max_length=14, must=must, temperature=1.0, seed=seed, steps=3
    )
    (fill,) = text.fills
    assert str(text) == prefix + fill + suffix
    for word in must:
        assert word in fill


@pytest.mark.parametrize("kind", KINDS)
@given(prefix=text_st, suffix=text_st, must_not=st.lists(st.sampled_from(["e", "t", "a", "dog", " ", "th", "o\n"]),
       min_size=1, max_size=4), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_words_that_must_not_occur_never_do(
    kind: str, prefix: str, suffix: str, must_not: list[str], seed: int
) -> None:
    """Not in the fill, nor across its edges, at whatever number of tokens a step."""
    text = infill(toy_model(kind), prefix, suffix, length=6, must_not=must_not, temperature=1.0, seed=seed, steps=2)
    (fill,) = text.fills
    assert str(text) == prefix + fill + suffix
    start, end = len(prefix), len(prefix) + len(fill)
    for word, at in itertools.product(must_not, range(len(text))):
        if str(text).startswith(word, at):
            assert at >= end or at + len(word) <= start


@pytest.mark.parametrize("kind", KINDS)
def test_any_spelling_of_a_banned_word_is_found(kind: str) -> None:
    """The model wants to write "dog" letter by letter, in bytes no tokenizer would choose, all in one step."""
    at = 1 + len(encode(tokenizer_of(kind), "The"))
    script = {at + i: byte_token(kind, ord(c)) for i, c in enumerate(" dog")}
    free = infill(toy_model(kind, script), "The", "!", length=4, steps=1)
    assert str(free) == "The dog!"
    for steps in (1, 2, 4):
        kept = infill(toy_model(kind, script), "The", "!", length=4, steps=steps, must_not=["dog"])
        assert "dog" not in kept
        assert kept.startswith("The") and kept.endswith("!")
    across = infill(toy_model(kind, {at: byte_token(kind, ord("x"))}), "The", "y", length=1, must_not=["exy"])
    assert across != "Thexy"


def test_a_word_is_put_where_the_model_finds_it_likeliest() -> None:
    """At each place, in either spelling, against all sums of log-probabilities counted by hand."""
    tokenizer, model = tokenizer_of("bytelevel"), toy_model("bytelevel")
    noise: Any = model.denoiser
    at = 1 + len(encode(tokenizer, "Tell"))
    log_probs = noise.logits.log_softmax(-1)
    expected = max(
        (float(sum(log_probs[at + o + j, t] for j, t in enumerate(spelling))), o, tuple(spelling))
        for spelling in (encode_after(tokenizer, " dog"), encode_after(tokenizer, "dog"))
        for o in range(9 - len(spelling))
    )
    watcher = Watcher()
    text = infill(model, "Tell", " me", length=8, must=["dog"], watch=watcher)
    _, o, spelling = expected
    assert tuple(watcher.ids[at - 1 + o :][: len(spelling)]) == spelling
    assert len(watcher.given) == len(encode(tokenizer, "Tell")) + len(spelling) + len(encode_after(tokenizer, " me"))
    # One forward to place it, one for each token that is left.
    assert text.forwards == noise.forwards == 1 + 8 - len(spelling)


def test_constraints_across_several_holes(loaded: Model) -> None:
    """Every word in one hole or another, and unknown lengths beside them."""
    text = infill(loaded, "The <hole:6> fox <hole:6><hole:1>.", must=["dog", "lazy"], must_not=["e", "th"])
    pieces_are_kept(text, ["The ", " fox ", "", "."], text.fills)
    assert all(any(word in fill for fill in text.fills) for word in ("dog", "lazy"))
    assert not any(word in fill for fill in text.fills for word in ("e", "th"))
    unknown = infill(loaded, "The <hole:auto> fox <hole:6>.", must=["dog"], must_not=["e"], max_length=3)
    assert any("dog" in fill for fill in unknown.fills) and unknown.lengths[1] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [({"must": ["a dog"], "must_not": ["dog"]}, "'a dog' has to occur and holds 'dog', which must not"),
     ({"must": [""]}, "is empty"), ({"must_not": ["x", ""]}, "is empty"),
     ({"must": ["the quick brown fox jumps over it"], "length": 3}, "do not fit into the holes; make a hole longer"),
     ({"must": ["a"] * 4, "length": 3}, "need 4 tokens and do not fit"),
     ({"must": ["a"] * 4, "length": "auto", "max_length": 3}, "unknown length needs 4 to 3 tokens.*raise max_length"),
     ({"must": ["<|mask|>"]}, "holds the mask token"), ({"length": "long"}, "a number of tokens or 'auto', not 'long'"),
     ({"length": "auto", "max_length": 0}, "max_length must be at least 1 token, not 0"),
     ({"length": 200}, r"20[0-9] tokens.*trained on 128"), ({"length": 200, "must": ["dog"]}, "trained on 128")],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infill(toy_model(length=128), "a <hole> b", **options)


def test_given_text_may_hold_what_a_fill_must_not(loaded: Model) -> None:
    text = infill(loaded, "The dog and the <hole:3>, dog", must_not=["dog"])
    assert text.startswith("The dog and the ") and text.endswith(", dog")
    assert "dog" not in text.fills[0]


def test_a_block_checkpoint_is_refused_what_it_cannot_do(loaded: Model) -> None:
    layout = {"layout": "block", "block_size": 4, "source": "own"}
    blocks = Model(loaded.denoiser, loaded.tokenizer, loaded.process, loaded.config | layout, "blocks")
    for options in ({"length": "auto"}, {"must": ["dog"]}, {"suffix": " b"}):
        with pytest.raises(ValueError, match="does not see what stands after a hole"):
            infill(blocks, "a", **({"suffix": ""} | options))  # type: ignore[arg-type]
    assert "e" not in infill(blocks, "a", "", length=6, must_not=["e"]).fills[0]


# ------------------------------------------------------------------------------------------------ the space before


def begins(watcher: Watcher, hole: int) -> str:
    """What the first token of a hole adds to the text."""
    assert watcher.canvas is not None
    free = [False, *watcher.canvas.editable[0, 1:].tolist()]
    at = [i for i in range(1, len(free)) if free[i] and not free[i - 1]][hole] - 1
    tokenizer = tokenizer_of("bytelevel")
    return decode(tokenizer, watcher.ids[: at + 1])[len(decode(tokenizer, watcher.ids[:at])) :]


@pytest.mark.parametrize("steps", [1, 6])
def test_a_hole_behind_a_space_begins_with_one(steps: int) -> None:
    """Whatever the model would rather write; a hole behind something else begins as it likes."""
    tokenizer = tokenizer_of("bytelevel")
    comma = encode(tokenizer, ",")[0]
    model, watcher = toy_model("bytelevel", dict.fromkeys(range(1, 40), comma)), Watcher()
    text = infill(model, "The <hole:2> dog<hole:2> over <hole:2>.", steps=steps, watch=watcher)
    pieces_are_kept(text, ["The ", " dog", " over ", "."], text.fills)
    assert decode(tokenizer, watcher.ids) == str(text)
    assert [begins(watcher, k)[:1] for k in range(3)] == [" ", ",", " "]
    assert text.fills[1] == ",,"


@pytest.mark.parametrize("kind", KINDS)
def test_where_no_token_may_bring_the_space_it_is_given(kind: str) -> None:
    """Under a ban on spaces, and where nothing stands before the space."""
    watcher = Watcher()
    for prefix, options in (("The ", {"must_not": [" "]}), (" ", {})):
        text = infill(toy_model(kind), prefix, ", is", length=3, watch=watcher, **options)  # type: ignore[arg-type]
        assert str(text) == prefix + text.fills[0] + ", is"
        assert int(watcher.canvas.editable.sum()) == 3  # type: ignore[union-attr]
        if kind != "metaspace" or prefix != " ":
            assert decode(tokenizer_of(kind), watcher.given) == prefix + ", is"
            assert decode(tokenizer_of(kind), watcher.ids) == str(text)


def test_a_word_that_opens_a_hole_brings_the_space() -> None:
    """One hole of just the tokens that the words need, then one more: both orders, the length given and searched."""
    tokenizer = tokenizer_of("bytelevel")
    words = ["fox", "dog"]
    with_space = {word: encode_after(tokenizer, " " + word) for word in words}
    bare = {word: encode_after(tokenizer, word) for word in words}
    needed = min(len(with_space[a]) + min(len(bare[b]), len(with_space[b])) for a, b in (words, words[::-1]))
    for length, seed in itertools.product((needed, needed + 1, "auto"), range(6)):
        model, watcher = toy_model("bytelevel"), Watcher()
        model.denoiser.logits[:] = model.denoiser.logits.roll(seed, 0)  # type: ignore[attr-defined]
        text = infill(model, "The ", ".", length=length, max_length=9, must=words, watch=watcher)  # type: ignore[arg-type]
        assert text.lengths[0] >= needed and all(word in text.fills[0] for word in words)
        if watcher.steps:
            assert decode(tokenizer, watcher.ids) == str(text)
    with pytest.raises(ValueError, match="do not fit into the holes"):
        infill(toy_model("bytelevel"), "The ", ".", length=needed - 1, must=words)


# ------------------------------------------------------------------------------------------------------ the pieces

sequences_st = st.lists(st.lists(st.integers(3, 6), min_size=2, max_size=3).map(tuple), min_size=1, max_size=4)


def holds(ids: list[int], sequence: tuple[int, ...], editable: list[bool]) -> bool:
    m = len(sequence)
    return any(tuple(ids[i : i + m]) == sequence and any(editable[i : i + m]) for i in range(len(ids) - m + 1))


@given(
    text=st.lists(st.none() | st.integers(3, 6), min_size=1, max_size=10).filter(lambda x: None in x),
    tokens=st.lists(st.integers(3, 6), max_size=2).map(tuple),
    sequences=sequences_st,
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_bans_hold_one_token_a_step(text: list[int | None], tokens: Any, sequences: Any, seed: int) -> None:
    """A model that knows four tokens only and would write banned sequences all the time."""
    noise = Noise(VOCAB, MASK)
    noise.logits[:, [0, 1, 2, *range(7, VOCAB)]] = -20.0
    noise.logits[:, MASK] = float("-inf")
    canvas = Canvas.from_holes([text], SPECIAL)
    editable = canvas.editable[0].tolist()
    *_, last = denoise(
        noise, PROCESS, canvas, steps=len(text), policy=TopConfidence(), draw=Draw(1.0), layout=LAYOUT, seeds=[seed],
        banned=Banned(tokens, tuple(sequences)),
    )  # fmt: skip
    ids = last.ids[0].tolist()
    assert not any(holds(ids, sequence, editable) for sequence in [*sequences, *((t,) for t in tokens)])


def test_what_a_ban_does_not_catch() -> None:
    """Two tokens revealed in one forward may complete a sequence together; one by one they may not."""
    noise = Noise(VOCAB, MASK, script={1: 5, 2: 6})
    canvas = Canvas.from_holes([[None, None]], SPECIAL)
    found = {}
    for steps in (1, 2):
        *_, last = denoise(
            noise, PROCESS, canvas, steps=steps, policy=TopConfidence(), draw=Draw(0.0), layout=LAYOUT,
            banned=Banned((), ((5, 6),)),
        )  # fmt: skip
        found[steps] = last.ids[0, 1:].tolist()
    assert found[1] == [5, 6] and found[2] != [5, 6]


def test_a_ban_leaves_a_distribution_and_no_ban_the_model() -> None:
    canvas = Canvas.from_holes([[3, None, None, 4]], SPECIAL)
    log_probs = torch.randn(2, VOCAB, dtype=torch.float64).log_softmax(-1)
    wanted = canvas.editable
    out = Banned((7,), ((3, 8), (9, 4), (3, 8, 9)))(log_probs, canvas.ids, wanted)
    assert torch.allclose(out.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    assert out.isneginf().nonzero().tolist() == [[0, 7], [0, 8], [1, 7], [1, 9]], "the triple is not known yet"
    assert torch.allclose(Banned()(log_probs, canvas.ids, wanted), log_probs)
    with pytest.raises(ValueError, match="leave no token to draw"):
        Banned(tuple(range(VOCAB)))(log_probs, canvas.ids, wanted)


def test_a_policy_ranks_by_what_the_bans_leave() -> None:
    """The surest position would take a banned token: without it the other one is surer."""
    noise = Noise(VOCAB, MASK)
    noise.logits[:] = 0.0
    noise.logits[1, 5], noise.logits[2, 6] = 30.0, 10.0
    noise.logits[:, MASK] = float("-inf")
    canvas = Canvas.from_holes([[None, None]], SPECIAL)
    counted = Counter(noise)
    first, *_ = denoise(
        counted, PROCESS, canvas, steps=2, policy=Threshold(0.99), draw=Draw(0.0), layout=LAYOUT, banned=Banned((5,))
    )
    assert first.revealed[0].tolist() == [False, False, True]


def packed(size: int, spaced: bool, words: list[tuple[int, int | None]]) -> bool:
    """Whether a stretch takes these words, whichever of them opens it, or a token that is left."""
    short = sum(n for n, _ in words)
    opened = [short - n + opener for n, opener in words if opener is not None]
    return short < size or (not spaced and short == size) or (spaced and any(n <= size for n in opened))


@given(
    st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=3),
    st.lists(st.tuples(st.integers(1, 3), st.none() | st.integers(0, 2)), max_size=4),
)
def test_fits_is_a_packing(room: list[tuple[int, bool]], words: list[tuple[int, int | None]]) -> None:
    needs = [(n, None if more is None else n + more) for n, more in words]
    possible = any(
        all(packed(*r, [n for n, k in zip(needs, where, strict=True) if k == i]) for i, r in enumerate(room))
        for where in itertools.product(range(len(room)), repeat=len(needs))
    )
    assert fits(room, needs) == possible


def test_context_models_take_bans_too() -> None:
    """Through a transformers model, in a batch of unequal texts."""
    canvas = Canvas.from_holes([[3, None, None, 5], [4, *[None] * 7]], SPECIAL)
    *_, last = denoise(
        context(), PROCESS, canvas, steps=8, policy=TopConfidence(), draw=Draw(1.0), layout=LAYOUT,
        banned=Banned(tuple(range(10, VOCAB - 1)), ()),
    )  # fmt: skip
    assert not (last.ids >= 10).any()
