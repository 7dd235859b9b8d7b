"""Guidance: the law it states, exactly on the toy; its two ends; and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffulm
from diffulm import cli
from diffulm.convert import convert
from diffulm.hub import Model
from diffulm.layout import Full
from diffulm.process import MaskedDiffusion
from diffulm.sampling import Canvas, Draw, EverySample, Guided, TopConfidence, denoise, generate, infill
from diffulm.tokenizer import special_tokens

from ..toy import LAYOUT, MASK, SPECIAL, Noise, Recorder, Table, V, joint, tiny_denoiser

P = joint()
EXACT = Table.exact(P)
YES = torch.ones(1, 3, dtype=torch.bool)
GIVEN = torch.tensor([[True, False, False]])


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    torch.set_num_threads(1)
    return diffulm.load(checkpoint, dtype="float64")


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.7, 4.0])
@pytest.mark.parametrize("table", [EXACT, Table.inconsistent()], ids=["exact", "inconsistent"])
def test_the_guided_law_is_the_product_it_states(table: Table, scale: float) -> None:
    """p(x | given, rest)^s p(x | rest)^(1 - s), normalised, for every given first token and every rest."""
    guided = Guided(table, scale, MASK, GIVEN)
    for first, second in itertools.product(range(V), range(V + 1)):
        ids = torch.tensor([[first, second, MASK]])
        rows = LAYOUT.decoding_rows(ids, YES, ids == MASK)
        got = guided(rows).softmax(-1)
        for row, at in zip(got, (ids == MASK)[0].nonzero()[:, 0].tolist(), strict=True):
            with_it, without = table.rows[first, second, MASK][at], table.rows[MASK, second, MASK][at]
            law = [with_it[x] ** scale * without[x] ** (1 - scale) for x in range(V)]
            assert row[:V].tolist() == pytest.approx([w / sum(law) for w in law], abs=1e-12)
            assert row[MASK] == 0, "the mask is never drawn, and nothing is NaN"
        nats = guided.nll(rows)
        assert len(nats) == len(got) and bool(nats.isinf().all()), "the targets of this canvas are masks"


def test_what_one_of_the_two_rules_out_is_ruled_out() -> None:
    rows = {ids: table.copy() for ids, table in EXACT.rows.items()}
    rows[0, MASK, MASK][2] = [0.25, 0.75, 0.0]  # token 2 never ends a text that begins with 0
    ids = torch.tensor([[0, MASK, MASK]])
    got = Guided(Table(rows), 3.0, MASK, GIVEN)(LAYOUT.decoding_rows(ids, YES, ids == MASK)).softmax(-1)
    assert not got.isnan().any() and got[1, 2] == 0 and float(got.sum()) == pytest.approx(2)


def test_scale_1_is_plain_and_scale_0_unconditional(model: Model) -> None:
    plain = generate(model, "The quick", max_tokens=8, temperature=1.0, seed=3)
    assert generate(model, "The quick", max_tokens=8, temperature=1.0, seed=3, guidance=1.0) == plain
    texts = [
        generate(model, p, max_tokens=8, temperature=1.0, seed=3, guidance=0.0) for p in ("The quick", "The brown")
    ]
    assert len(model.tokenizer("The quick")["input_ids"]) == len(model.tokenizer("The brown")["input_ids"])
    assert texts[0] == texts[1], "without its prompt the model does not know which one it was"
    assert generate(model, "The quick", max_tokens=8, temperature=1.0, seed=3, guidance=6.0) != plain


def test_a_sample_beside_others_is_the_sample_alone() -> None:
    """Unequal prompts and holes: samples finish at different steps, and each keeps its own given tokens."""
    denoiser, process = tiny_denoiser("llama", torch.float64), MaskedDiffusion(SPECIAL.mask)
    texts = [[5, 6, 7, None, None], [9, None, 8, None, None, None, None, 4], [3, 3, None]]

    def run(samples: list[list[int | None]], seeds: list[int]) -> list[list[int]]:
        canvas = Canvas.from_holes(samples, SPECIAL)
        guided = Guided.by_canvas(denoiser, 2.5, SPECIAL.mask, canvas)
        assert not guided.given_BL[:, 0].any(), "the start token is never masked"
        ids = canvas.ids
        for step in denoise(
            guided, process, canvas, steps=4, policy=TopConfidence(), draw=Draw(1.0), layout=Full(),
            cache=EverySample(), seeds=seeds,
        ):  # fmt: skip
            ids = step.ids
        return [row[: 1 + len(s)].tolist() for row, s in zip(ids, samples, strict=True)]

    together = run(texts, [1, 2, 3])
    assert together == [run([text], [seed])[0] for text, seed in zip(texts, (1, 2, 3), strict=True)]
    assert all(t in (None, g) for row, text in zip(together, texts, strict=True) for g, t in zip(row[1:], text))


def test_a_step_sees_the_guided_predictions(model: Model) -> None:
    """What the loop ranks and draws by: s * log p(with) + (1 - s) * log p(without), by two calls written out."""
    canvas = Canvas.from_prompt([[40, 50, 60]], 3, special_tokens(model.tokenizer))
    mask = model.process.mask_token_id
    seen = Recorder(TopConfidence())
    guided = Guided.by_canvas(model.denoiser, 1.5, mask, canvas)
    steps = denoise(
        guided, model.process, canvas, steps=3, policy=seen, draw=Draw(0.0), layout=model.layout, cache=EverySample()
    )  # fmt: skip
    for _ in steps:
        pass
    for step in seen.steps:
        without = step.ids.clone()
        without[0, 1:4] = mask
        wanted = [i for i in range(4, 7) if step.masked[0, i]]
        law = [torch.stack([model.logits(ids)[0, i].log_softmax(-1) for i in wanted]) for ids in (step.ids, without)]
        column = torch.arange(law[0].shape[1]) != mask
        product = (1.5 * law[0] - 0.5 * law[1])[:, column].log_softmax(-1)
        assert torch.allclose(step.log_probs[:, column], product, atol=1e-10)


def test_infill_counts_two_forwards_a_step(model: Model) -> None:
    plain = infill(model, "The quick", " jumps", length=4)
    twice = infill(model, "The quick", " jumps", length=4, guidance=2.0)
    assert twice.forwards == 2 * plain.forwards and twice.startswith("The quick") and twice.endswith(" jumps")
    assert infill(model, "The quick", " jumps", length=4, guidance=1.0) == plain


def test_bad_input(model: Model, parent: Path, tmp_path: Path) -> None:
    for scale in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="guidance scale must be 0 or a positive number"):
            generate(model, "The", max_tokens=2, guidance=scale)
    with pytest.raises(ValueError, match="needs a prompt to be guided by"):
        generate(model, "", max_tokens=2, guidance=2.0)
    with pytest.raises(ValueError, match="guidance cannot decode from a cache"):
        generate(model, "The", max_tokens=2, guidance=2.0, cache="dual")
    ids = torch.tensor([[0, MASK, MASK]])
    rows = LAYOUT.decoding_rows(ids, YES, ids == MASK)
    with pytest.raises(ValueError, match="use cache none"):
        Guided(EXACT, 2.0, MASK, GIVEN)(rows, cache=object())
    with pytest.raises(ValueError, match="EverySample"):
        Guided(EXACT, 2.0, MASK, GIVEN.expand(2, 3))(rows)
    convert(str(parent), tmp_path / "block", trained_length=64, layout="block", block_size=8, source="own")
    with pytest.raises(ValueError, match="needs a checkpoint with full attention"):
        generate(diffulm.load(tmp_path / "block", dtype="float32"), "The", max_tokens=2, guidance=2.0)


def test_the_verbs_take_a_scale(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = ["--dtype", "float32", "--device", "cpu"]
    assert cli.main(["generate", str(checkpoint), "The quick", "--max-tokens", "4", "--guidance", "2", *fast]) == 0
    assert capsys.readouterr().out.startswith("The quick")
    assert cli.main(["infill", str(checkpoint), "The <hole:3> fox", "--guidance", "2", "--json", *fast]) == 0
    assert json.loads(capsys.readouterr().out)["forwards"] == 6
    assert cli.main(["generate", str(checkpoint), "The", "--guidance", "-1", *fast]) == 2
    assert "guidance scale" in capsys.readouterr().err


def test_off_by_default(model: Model) -> None:
    noise = Noise(len(model.tokenizer), model.process.mask_token_id)
    told = replace(model, denoiser=noise)
    generate(told, "The", max_tokens=5)
    assert noise.forwards == 5
