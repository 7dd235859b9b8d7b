"""The paper's protocol against the same arithmetic written as plain loops over tokens, in float64."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffulm
from diffulm import cli
from diffulm.convert import convert
from diffulm.denoiser import HFDenoiser
from diffulm.eval import paper, paper_tasks
from diffulm.eval.page import drawn, markdown
from diffulm.eval.paper import evaluate
from diffulm.eval.paper_tasks import Joiner, hellaswag, piqa, siqa, story, winogrande
from diffulm.eval.protocol import PaperProtocol, Text, fitted, losses, masked_share, raw, sample_seed, sampler_b
from diffulm.eval.store import content_key
from diffulm.hub import Model
from diffulm.layout import Full, Rows
from diffulm.process import MaskedDiffusion
from diffulm.runtime import uniforms
from diffulm.sampling import Canvas, Draw, TopConfidence, denoise

from .. import toy
from ..conftest import build_parent, build_tokenizer

MASK = toy.VOCAB - 1
#: Prompts and stretches of several lengths; the second holds a natural mask token in its prompt, the third in what is
#: scored, the fourth begins with what is scored.
TEXTS = [
    Text((5, 6, 7, 8, 9, 10), 3, 6, "a"),
    Text((5, MASK, 7, 8, 9, 10, 11, 12, 13), 4, 9, "b"),
    Text((4, 5, 6, MASK, 8), 2, 5, "c"),
    Text((11, 12, 13, 14), 0, 4, "d"),
    Text((3, 4, 5, 6, 7, 8, 9, 10), 2, 4, "e"),
]


@pytest.fixture(scope="module")
def tiny() -> HFDenoiser:
    torch.set_num_threads(1)
    return toy.tiny_denoiser("llama", torch.float64)


def log_probs(model: Any, ids: list[int], suppressed: bool, mask: int = MASK) -> np.ndarray:
    """Row i: log-probabilities of token i + 1, by the stock model."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy().copy()
    if suppressed:
        logits[:, mask] = -np.inf
    top = logits.max(1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))


def score_by_loops(model: Any, text: Text, p: PaperProtocol, mask: int = MASK) -> float:
    """One text, one rate, one token at a time."""
    total = 0.0
    for t in range(p.rates, 0, -1):
        u = uniforms(p.seed, int(content_key(text.key), 16), p.rates - t, purpose="eval", n=text.end - text.start)
        noisy, hidden = list(text.ids), set()
        for j, i in enumerate(range(text.start, text.end)):
            if u[j] < t / p.rates:
                noisy[i] = mask
                hidden.add(i)
        table = log_probs(model, noisy, suppressed=not p.mask_may_be_drawn, mask=mask)
        found = []
        for i in range(1, len(noisy)):
            if noisy[i] == mask if p.mask_by_id else i in hidden:
                found.append(-table[i - 1][text.ids[i]])
        if found:
            mean = sum(found) / len(found)
            total += mean if p.unweighted else mean * p.rates / t
    score = total / p.rates
    n = text.end - max(1, text.start)
    if not p.n_plus_one and not (p.mask_by_id and mask in text.ids[1:]):
        empty = [(1 - t / p.rates) ** n for t in range(1, p.rates + 1)]
        score /= 1 - sum(empty) / p.rates
    return score


SWITCHES = [
    dict(zip(("n_plus_one", "mask_by_id", "unweighted", "mask_may_be_drawn"), values, strict=True))
    for values in itertools.product([True, False], repeat=4)
    if not (values[1] and not values[3])
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "".join("ny"[v] for v in s.values()))
def test_scores_are_those_of_plain_loops(tiny: HFDenoiser, switches: dict[str, bool]) -> None:
    p = PaperProtocol(rates=7, seed=3, **switches)
    # A suppressed mask token has no finite loss as a target.
    texts = TEXTS if p.mask_may_be_drawn else [t for t in TEXTS if MASK not in t.ids]
    got = losses(raw(tiny, p), Full(), MASK, texts, p, budget=40)
    assert got == pytest.approx([score_by_loops(tiny.model, text, p) for text in texts], abs=1e-10)
    assert all(math.isfinite(x) for x in got)


def test_the_released_number_of_rates(tiny: HFDenoiser) -> None:
    p = PaperProtocol()
    assert p.rates == 32 and not p.lambada_double_count
    got = losses(raw(tiny, p), Full(), MASK, TEXTS[:2], p)
    assert got == pytest.approx([score_by_loops(tiny.model, text, p) for text in TEXTS[:2]], abs=1e-10)


def test_scores_of_the_table_toy() -> None:
    """Its conditionals are written down: the mean loss of each mask, with the predicting row the token's own."""
    table, p = toy.Table.exact(toy.joint()), PaperProtocol(rates=32, seed=5)
    for ids in toy.TEXTS[::5]:
        text = Text(ids, 1, 3, "toy")
        want = 0.0
        for k in range(32):
            u = uniforms(5, int(content_key("toy"), 16), k, purpose="eval", n=2)
            mask = (False, *(bool(x < (32 - k) / 32) for x in u))
            want += table.cross_entropy(ids, mask) / max(1, sum(mask)) / 32
        (got,) = losses(table, toy.LAYOUT, toy.MASK, [text], p)
        assert got == pytest.approx(want, abs=1e-10)


def test_a_text_beside_others_is_the_text_alone(tiny: HFDenoiser) -> None:
    p = PaperProtocol(rates=5)
    together = losses(raw(tiny, p), Full(), MASK, TEXTS, p)
    assert together == pytest.approx([losses(raw(tiny, p), Full(), MASK, [t], p)[0] for t in TEXTS], abs=1e-10)


class Flat:
    """One nat for every token."""

    def nll(self, rows: Rows) -> torch.Tensor:
        return torch.ones(len(rows.source), dtype=torch.float64)

    def __call__(self, rows: Rows, *, cache: Any = None) -> torch.Tensor:
        raise AssertionError


def test_short_options_are_favoured_by_n_over_n_plus_one() -> None:
    """Every token costs one nat, and yet a short option scores lower: the figures of our list of defects."""
    listed = {1: 0.52, 2: 0.68, 3: 0.77, 5: 0.85, 12: 0.94, 40: 0.99}
    for n, share in listed.items():
        assert masked_share(n, 32) == pytest.approx(share, abs=0.011)
        assert masked_share(n, 4096) == pytest.approx(n / (n + 1), abs=1e-3)
        texts = [Text(tuple(range(1 + n)), 1, 1 + n, f"{i}") for i in range(100)]
        for released in (True, False):
            p = PaperProtocol(n_plus_one=released)
            mean = np.mean(losses(Flat(), Full(), 99, texts, p, budget=1 << 20))
            # One draw is empty or not; 100 texts of 32 draws.
            assert mean == pytest.approx(masked_share(n, 32) if released else 1.0, abs=0.03)


# ------------------------------------------------------------------------------------------------------------ sampler B


def write_by_loops(
    model: Any, text: Text, p: PaperProtocol, steps: int, temperature: float, mask: int = MASK
) -> tuple[list[int], list]:
    """(tokens, how many stay masked after each step), one token at a time."""
    canvas = list(text.ids)
    hole = [i for i in range(text.start, text.end) if i > 0]
    masked = set(hole)
    for i in hole:
        canvas[i] = mask
    left = []
    for k in range(steps):
        table = log_probs(model, canvas, suppressed=not p.mask_may_be_drawn, mask=mask) / temperature
        u = uniforms(sample_seed(p, text), k, purpose="token", n=len(canvas))
        drawn, score = {}, {}
        for i in hole:
            weights = np.exp(table[i - 1] - table[i - 1].max())
            chance, below = weights / weights.sum(), 0.0
            token = 0
            while u[i] >= (below := below + chance[token]):
                token += 1
            drawn[i], score[i] = token, math.log(chance[token])
        if k + 1 == steps:
            for i in masked:
                canvas[i] = drawn[i]
            break
        competing = sorted(score[i] for i in (hole if p.rerank else masked))
        place = math.floor(len(hole) * (steps - 1 - k) / steps)
        border = competing[place] if place < len(competing) else math.inf
        stay = {i for i in masked if score[i] < border}
        for i in masked - stay:
            canvas[i] = drawn[i]
        masked = stay
        left.append(len(masked))
    return canvas[text.start : text.end], left


@pytest.mark.parametrize("rerank", [True, False])
@pytest.mark.parametrize("drawn", [True, False])
def test_sampler_b_is_that_of_plain_loops(tiny: HFDenoiser, rerank: bool, drawn: bool) -> None:
    """Unequal texts in one batch, fewer and more steps than tokens."""
    p = PaperProtocol(rerank=rerank, mask_may_be_drawn=drawn, mask_by_id=False)
    texts = [dataclasses.replace(text, key=f"{text.key}{i}") for i in range(3) for text in TEXTS]
    for steps, temperature in ((1, 1.0), (3, 0.9), (8, 1.3)):
        got = sampler_b(raw(tiny, p), Full(), MASK, texts, p, steps=steps, temperature=temperature)
        want = [write_by_loops(tiny.model, text, p, steps, temperature)[0] for text in texts]
        assert got == want


def test_ranking_again_commits_more_than_planned(tiny: HFDenoiser) -> None:
    text, steps = Text(tuple(range(4, 16)), 2, 10), 8
    kept = {True: 0, False: 0}
    for rerank, i in itertools.product((True, False), range(12)):
        p = PaperProtocol(rerank=rerank)
        left = write_by_loops(tiny.model, dataclasses.replace(text, key=str(i)), p, steps, 1.0)[1]
        kept[rerank] += sum(left)
        assert rerank or left == [8 * (steps - 1 - k) // steps for k in range(steps - 1)]
    assert kept[True] < 0.9 * kept[False]


def test_without_it_sampler_b_is_a_policy_of_the_one_loop(tiny: HFDenoiser) -> None:
    """As many steps as tokens at temperature 1: `TopConfidence("drawn")` draws the same tokens."""
    p = PaperProtocol(rerank=False, mask_may_be_drawn=False, mask_by_id=False)
    for i in range(10):
        text = Text((0, *range(4, 14)), 3, 9, str(i))
        ids = torch.tensor([text.ids])
        hole = torch.zeros_like(ids, dtype=torch.bool)
        hole[0, text.start : text.end] = True
        canvas = Canvas(ids.masked_fill(hole, MASK), hole, torch.ones_like(hole))
        steps = denoise(
            tiny, MaskedDiffusion(MASK), canvas, steps=6, policy=TopConfidence("drawn"), draw=Draw(1.0), layout=Full(),
            seeds=[sample_seed(p, text)],
        )  # fmt: skip
        *_, last = steps
        (got,) = sampler_b(tiny, Full(), MASK, [text], p, steps=6, temperature=1.0)
        assert got == last.ids[0, text.start : text.end].tolist()


# ---------------------------------------------------------------------------------------------------------------- joins

HELLASWAG = {
    "activity_label": "Roof repair", "ctx_a": "A man sits on a roof. [title] Tools [step] He", "ctx_b": "the MAN",
    "endings": ["[step] works  on.", "sleeps.", "falls [substeps].", "sings."], "label": "2",
}  # fmt: skip
WINOGRANDE = {"sentence": "The dog saw the fox so _ ran away.", "option1": "Rex", "option2": "Fox", "answer": "2"}
PIQA = {"goal": "open a jar", "sol1": "turn the lid", "sol2": "sing", "label": 1}
SIQA = {
    "context": "Ann ran.", "question": "Why?", "answerA": "late", "answerB": "bored", "answerC": "fun", "label": "3",
}  # fmt: skip
ROC = {
    **{f"InputSentence{i}": f"Sentence {i} is here." for i in range(1, 5)}, "RandomFifthSentenceQuiz1": "Wrong end.",
    "RandomFifthSentenceQuiz2": "Right end.", "AnswerRightEnding": "2",
}  # fmt: skip
CODE = {
    "task_id": "X/0/L0", "entry_point": "add", "prompt": "def add(a, b):\n", "canonical_solution": "    c = a + b\n",
    "suffix": "    return c\n", "test": "def check(add):\n    assert add(1, 2) == 3\n",
}  # fmt: skip
LINES = ["the quick brown fox jumps over the lazy dog", "numbers go from left to right", "the model reveals its tokens"]


def starting_tokenizer() -> Any:
    """A tokenizer that puts a start token before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    made = build_tokenizer(mask="<|mask|>")
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


def test_prompts_are_those_of_the_scripts() -> None:
    asked = hellaswag(HELLASWAG)
    assert asked.prompt == "Roof repair: A man sits on a roof.. Tools He The man" and asked.gold == 2
    # In this order: marks go first, and one pass makes two spaces one.
    assert asked.options == ((" works on.",), ("sleeps.",), ("falls .",), ("sings.",))
    asked = winogrande(WINOGRANDE)
    assert (asked.prompt, asked.options, asked.gold) == (
        "The dog saw the fox so ", (("Rex", "ran away."), ("Fox", "ran away.")), 1,
    )  # fmt: skip
    asked = piqa(PIQA)
    assert asked.prompt + asked.options[1][0] == "Question: open a jar\nAnswer:  sing" and asked.gold == 1
    asked = siqa(SIQA)
    assert asked.prompt + asked.options[2][0] == "Question: Ann ran. Why?\nAnswer: fun" and asked.gold == 2
    assert story(ROC)["sentences"][2:] == ["Sentence 3 is here.", "Sentence 4 is here.", "Right end."]


def test_pieces_are_joined_as_token_lists() -> None:
    tokenizer = starting_tokenizer()
    bos = tokenizer.bos_token_id

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def join(**changes: Any) -> Joiner:
        return Joiner(tokenizer, PaperProtocol(**changes), 64)

    text = join().options(piqa(PIQA))[0]
    prompt, option = plain("Question: open a jar\nAnswer: "), plain(" turn the lid")
    assert text.ids == (bos, *prompt, bos, *option), "as released: a second start token, scored with the option"
    assert text.end - text.start == 1 + len(option)
    text = join(extra_bos=False).options(piqa(PIQA))[0]
    assert text.ids == (bos, *prompt, *option) and text.end - text.start == len(option)
    text = join().options(winogrande(WINOGRANDE))[1]
    assert text.ids == (*plain("The dog saw the fox so "), *plain("Fox"), *plain("ran away.")), "no start token at all"
    assert join(no_start=False).options(winogrande(WINOGRANDE))[1].ids == (bos, *text.ids)
    keys = [t.key for t in join().options(siqa(SIQA))]
    assert len(set(keys)) == 3 and len({t.key for t in join(shared_noise=True).options(siqa(SIQA))}) == 1
    line = "over the lazy dog"
    text = join().last_word(line)
    assert (
        text.ids == (bos, *plain(line)) and text.start == 1 + len(plain("over the lazy")) and text.end == len(text.ids)
    )
    text = join().middle(story(ROC)["sentences"])
    middle = plain("Sentence 3 is here.")
    assert list(text.ids[text.start : text.end]) == middle and text.ids[0] != bos
    assert text.ids[text.end :] == tuple(plain("Sentence 4 is here. Right end."))
    code = join().line(CODE)
    assert code is not None and code.ids == tuple(
        token for piece in ("def add(a, b):\n", "    c = a + b\n", "    return c\n") for token in plain(piece)
    ), "no start token, not even the tokenizer's own, and the pieces apart"
    assert tokenizer.decode(list(code.ids[code.start : code.end])) == "    c = a + b\n"
    started = join(no_start=False).line(CODE)
    assert started is not None and started.ids == (bos, *code.ids)


def test_long_code_is_skipped_as_the_script_does() -> None:
    """More than 1,000 tokens in all, the model's own length aside: skipped; else cut at both ends to fit."""
    tokenizer = starting_tokenizer()
    unit = len(tokenizer("x\n", add_special_tokens=False)["input_ids"])
    inside = sum(len(tokenizer(CODE[k], add_special_tokens=False)["input_ids"]) for k in ("canonical_solution",))

    def made(tokens: int, **changes: Any) -> Text | None:
        lines = (tokens - inside) // unit
        record = {**CODE, "prompt": "x\n" * (lines // 2), "suffix": "x\n" * (lines - lines // 2)}
        return Joiner(tokenizer, PaperProtocol(**changes), 64).line(record)

    assert made(1000 + unit) is None
    for text in (made(1000), made(1000 + unit, skip_long=False), made(5000, skip_long=False)):
        assert text is not None and len(text.ids) == 64 and text.cut > 900 and text.start > 0
        assert tokenizer.decode(list(text.ids[text.start : text.end])) == CODE["canonical_solution"]


def test_a_long_prompt_loses_its_front() -> None:
    text = fitted(Text(tuple(range(10)), 5, 8, "k"), 7)
    assert text == Text(tuple(range(3, 10)), 2, 5, "k", 3)
    # What is left of the front is the token that predicts the first of the stretch; then the end goes.
    assert fitted(Text(tuple(range(10)), 5, 8, "k"), 5) == Text((4, 5, 6, 7, 8), 1, 4, "k", 5)
    with pytest.raises(ValueError, match="cannot be cut to the 3"):
        fitted(Text(tuple(range(10)), 5, 8, "k"), 3)


# ---------------------------------------------------------------------------------------------------------------- whole


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    torch.set_num_threads(1)
    return diffulm.load(checkpoint, dtype="float64")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every task's file, two records each (three lines of LAMBADA)."""
    records = {
        "hellaswag": HELLASWAG, "winogrande": WINOGRANDE, "piqa": PIQA, "siqa": SIQA, "roc": ROC,
        "humaneval_infilling": CODE,
    }  # fmt: skip
    texts = {name: [json.dumps(r), json.dumps(r).replace("the", "The")] for name, r in records.items()}
    texts["lambada"] = LINES
    for name, lines in texts.items():
        path = tmp_path / paper_tasks.FILES[name].file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path


def test_every_task_from_local_files(model: Model, folder: Path) -> None:
    pytest.importorskip("rouge_score", reason="needs the extra eval")
    rules = PaperProtocol(rates=4)
    report = evaluate(model, paper_tasks.ORDER, folder, rules, execute=True)
    assert [row["task"] for row in report["tasks"]] == list(paper_tasks.ORDER)
    by = {row["task"]: row for row in report["tasks"]}
    assert by["lambada"]["documents"] == 3 and by["piqa"]["documents"] == 2
    assert set(by["roc"]["figures"]) == {"rouge1", "rouge2", "rougeL"}
    # PIQA again by hand: two options by plain loops, the lower one is the answer.
    hits = 0
    for record in (PIQA, json.loads(json.dumps(PIQA).replace("the", "The"))):
        texts = Joiner(model.tokenizer, rules, 64).options(piqa(record))
        mask = model.process.mask_token_id
        scored = [score_by_loops(model.denoiser.model, text, rules, mask) for text in texts]
        hits += int(np.argmin(scored)) == record["label"]
    assert by["piqa"]["figures"]["acc"]["value"] == hits / 2
    page = markdown("paper", drawn(paper.blocks(report)))
    assert "could not be checked without" in page.replace("\\", "") and "double" in page
    assert paper.summary(report)[0].row_count == 9 and "no security boundary" in page
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("switches", [{}, {"rerank": False}, {"mask_by_id": False, "mask_may_be_drawn": False}])
def test_code_is_filled_as_by_plain_loops(
    model: Model, folder: Path, switches: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sampler B writes into every line, in 4 steps at a Llama's 0.9, by loops over tokens; that is what is run."""
    run: list[str] = []

    def passed(program: str, store: Any) -> bool:
        run.append(program)
        return len(run) == 1

    monkeypatch.setattr(paper, "passed", passed)
    rules = PaperProtocol(rates=4, seed=2, **switches)
    (row,) = evaluate(model, ["humaneval_infilling"], folder, rules, execute=True)["tasks"]
    assert row["figures"]["pass@1"]["value"] == 0.5 and row["left_out"] == 0 and row["steps"] == 4
    mask, join = model.process.mask_token_id, Joiner(model.tokenizer, rules, 64)
    for program, record in zip(run, (CODE, json.loads(json.dumps(CODE).replace("the", "The"))), strict=True):
        text = join.line(record)
        assert text is not None
        ids, _ = write_by_loops(model.denoiser.model, text, rules, 4, 0.9, mask)
        line = model.tokenizer.decode(ids)
        assert program == f"def add(a, b):\n{line}    return c\n\n{CODE['test']}\ncheck(add)\n"


def test_true_lines_pass_and_steps_leak_into_code(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def truth(d: Any, layout: Any, mask: int, texts: list[Text], p: PaperProtocol, **how: Any) -> list[list[int]]:
        asked.append((how["steps"], how["temperature"]))
        return [list(t.ids[t.start : t.end]) for t in texts]

    monkeypatch.setattr(paper, "sampler_b", truth)
    for leaked in (False, True):
        rules = PaperProtocol(rates=4, leaked_steps=leaked)
        report = evaluate(model, ["humaneval_infilling", "lambada"], folder, rules, execute=True)
        last = Joiner(model.tokenizer, rules, 64).last_word(LINES[-1])
        assert report["tasks"][1]["figures"]["pass@1"]["value"] == 1.0, "programs with their own lines pass"
        assert asked[-1] == ((last.end - last.start, 1.0) if leaked else (4, 0.9))


@pytest.mark.parametrize(
    ("family", "given", "expected"), [("llama", None, 0.9), ("gpt2", None, 0.95), ("llama", 0.7, 0.7)]
)
def test_the_temperature_is_the_scripts_own_for_the_family(
    family: str, given: float | None, expected: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(str(build_parent(tmp_path / "parent", family)), tmp_path / "model", trained_length=64)
    model = diffulm.load(tmp_path / "model", dtype="float32", device="cpu")
    asked: list[float] = []

    def write(d: Any, layout: Any, mask: int, texts: list[Text], p: PaperProtocol, **how: Any) -> list[list[int]]:
        asked.append(how["temperature"])
        return [list(t.ids[t.start : t.end]) for t in texts]

    monkeypatch.setattr(paper, "sampler_b", write)
    report = evaluate(model, ["humaneval_infilling"], folder, PaperProtocol(temperature=given), execute=True)
    assert asked == [expected] and report["settings"]["temperature"] == expected


def test_double_count_and_leaked_steps(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        paper, "sampler_b", lambda d, layout, mask, texts, p, **how: [list(t.ids[t.start : t.end]) for t in texts]
    )
    for twice in (False, True):
        rules = PaperProtocol(lambada_double_count=twice, leaked_steps=True, rates=4)
        report = evaluate(model, ["piqa", "lambada"], folder, rules)
        lambada, rest = report["tasks"]
        assert lambada["figures"]["acc"]["value"] == 1 + twice, "every word is right, and counts once or twice"
        last = Joiner(model.tokenizer, rules, 64).last_word(LINES[-1])
        assert rest["steps"] == last.end - last.start, "the tokens of the last line's word"
    assert evaluate(model, ["piqa", "lambada"], folder, PaperProtocol(rates=4))["tasks"][1]["steps"] == 4


def test_it_goes_on_where_it_was(model: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules, out = PaperProtocol(rates=3), tmp_path / "out"
    first = evaluate(model, ["piqa", "lambada"], folder, rules, out=out)
    other = evaluate(model, ["piqa"], folder, PaperProtocol(rates=3, seed=1), out=out)
    assert other["settings"]["seed"] == 1

    def never(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("nothing is left to score")

    monkeypatch.setattr(paper, "losses", never)
    monkeypatch.setattr(paper, "sampler_b", never)
    again = evaluate(model, ["piqa", "lambada"], folder, rules, out=out)
    assert [r["figures"] for r in again["tasks"]] == [r["figures"] for r in first["tasks"]]
    with pytest.raises(AssertionError, match="nothing is left"):
        evaluate(model, ["piqa"], folder, PaperProtocol(rates=3, n_plus_one=False, seed=2), out=out)


def test_bad_input(model: Model, folder: Path, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no task 'arc'; it has lambada, hellaswag"):
        evaluate(model, ["arc"], folder)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        evaluate(model, ["piqa"], folder, limit=0)
    with pytest.raises(ValueError, match="humaneval_infilling runs code that a model wrote; give --allow-code"):
        evaluate(model, ["humaneval_infilling"], folder)
    monkeypatch.setattr(paper_tasks, "LONG", 5)
    with pytest.raises(ValueError, match="set skip_long=False"):
        evaluate(model, ["humaneval_infilling"], folder, execute=True)
    (folder / "piqa" / "validation.jsonl.gz").unlink()
    with pytest.raises(ValueError, match=r"there is no file .*; check --data-dir$"):
        evaluate(model, ["piqa"], folder)
    with pytest.raises(ValueError, match="there is no task; give some of lambada"):
        evaluate(model, [], folder)
    (folder / "roc_cloze" / "cloze_test_val__spring2016.jsonl.gz").write_bytes(gzip.compress(b'{"InputSentence1": 1}'))
    with pytest.raises(ValueError, match=r"line 1: field 'InputSentence2' is missing"):
        evaluate(model, ["roc"], folder)
    for wrong in ({"rates": 0}, {"temperature": 0.0}, {"mask_may_be_drawn": False}):
        with pytest.raises(ValueError, match=r"must be|switch both"):
            PaperProtocol(**wrong)
    convert(str(parent), tmp_path / "block", trained_length=64, layout="block", block_size=8, source="own")
    with pytest.raises(ValueError, match="one of full attention"):
        evaluate(diffulm.load(tmp_path / "block", dtype="float32"), ["siqa"], folder)


def test_the_verb(checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["eval", str(checkpoint), "--protocol", "paper", "--device", "cpu", "--dtype", "float32"]
    local = ["--data-dir", str(folder), "--limit", "2", "--draws", "3"]
    assert cli.main([*common, "--tasks", "piqa,lambada", *local, "--lambada-double-count", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [t["task"] for t in report["tasks"]] == ["lambada", "piqa"] and report["settings"]["rates"] == 3
    assert report["settings"]["lambada_double_count"] and report["settings"]["temperature"] == 0.9
    assert report["command"].startswith("diffulm ") and report["machine"] and report["versions"]["diffulm"]
    assert cli.main([*common, "--tasks", "piqa", *local, "--temperature", "0.7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["temperature"] == 0.7
    assert cli.main([*common, "--tasks", "piqa", *local, "--out", str(tmp_path / "out")]) == 0
    assert "released scripts' arithmetic" in (tmp_path / "out" / "report.md").read_text()
    assert cli.main([*common, "--tasks", "piqa"]) == 2 and "give --data-dir" in capsys.readouterr().err
    assert cli.main([*common, "--tasks", "boolq", *local]) == 2 and "has no task 'boolq'" in capsys.readouterr().err
    code = [*common, "--tasks", "humaneval_infilling", *local, "--json"]
    assert cli.main(code) == 2 and "give --allow-code-execution" in capsys.readouterr().err
    assert cli.main([*code, "--allow-code-execution"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"][0]["figures"]["pass@1"]["value"] == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--parent", "/nonexistent", "--judge", "nothere"],
            "--parent, --judge: without effect under --protocol paper",
        ),
        (["--steps", "4"], "--steps: without effect under --protocol paper; leave it out"),
        (["--samples", "2"], "--samples: without effect"),
        (["--policy", "confidence"], "--policy: without effect"),
        (["--max-tokens", "9"], "--max-tokens: without effect"),
        (["--fewshot", "0"], "--fewshot: without effect"),
        (["--confidence", "0.9"], "--confidence: without effect"),
        (["--guidance", "1.5"], "--guidance: without effect"),
        (["--chat-template"], "--chat-template: without effect"),
        (["--step-counts", "4"], "--step-counts: without effect"),
        (["--draws", "0"], "rates (--draws) must be at least 1, not 0"),
        (["--temperature", "0"], "temperature must be a positive number under the protocol, not 0"),
    ],
)
def test_flags_without_effect_are_refused(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is opened, which is not there."""
    common = ["eval", "nowhere/at/all", "--protocol", "paper", "--tasks", "piqa", "--data-dir", str(tmp_path)]
    assert cli.main([*common, *flags]) == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lambada-double-count"], "--lambada-double-count: without effect without --protocol paper"),
        (["--judge", "gpt2"], "--judge: without effect without the task quality"),
        (["--step-counts", "4"], "--step-counts: without effect without the task quality"),
    ],
)
def test_flags_of_the_protocol_and_of_quality_are_theirs_alone(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "nowhere/at/all", "--tasks", "piqa", "--data-dir", str(tmp_path), *flags]) == 2
    assert words in capsys.readouterr().err
