"""Countdown as a task: puzzles from a seed, solutions checked by arithmetic, tiny models fine-tuned on them.

"15,44,79,50:" asks to combine 15, 44 and 79 to 50; "44-15=29,79-29=50" does. Text is spelt character by character (the
paper splits digits for GPT-2). The prompt stays clean; the answer, its end-of-text token and the padding behind it are
noised and trained on, as in the paper. `claims.py countdown` runs the arms.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffulm.denoiser import HFDenoiser
from diffulm.layout import Annealing, Causal, Full, NoisedBatch, Rows
from diffulm.objective import diffusion_loss
from diffulm.process import MaskedDiffusion, stratified_levels
from diffulm.runtime import generator
from diffulm.sampling import Canvas, Draw, TopConfidence, denoise
from diffulm.tokenizer import SpecialTokens

STEP = re.compile(r"(\d{1,9})([-+*/])(\d{1,9})=(\d{1,9})")
TARGETS = range(10, 100)


# ------------------------------------------------------------------------------------------------------- puzzles


@dataclass(frozen=True)
class Puzzle:
    """`given` is the prompt's text without the colon, `solution` one way to the target."""

    given: str
    solution: str

    @property
    def key(self) -> tuple[int, ...]:
        """The same for puzzles that differ only in the order of their numbers."""
        *pool, target = map(int, self.given.split(","))
        return (*sorted(pool), target)


def make_puzzle(seed: int, index: int, numbers: int, largest: int = 99) -> Puzzle:
    """Puzzle `index` of a stream: random numbers up to `largest`, joined by random steps until the target is left."""
    rng = random.Random(f"{seed}/{index}")
    while True:
        pool = [rng.randint(1, largest) for _ in range(numbers)]
        given = ",".join(map(str, pool))
        steps = []
        while len(pool) > 1:
            a, b = (pool.pop(rng.randrange(len(pool))) for _ in range(2))
            options = [("+", a + b), ("*", a * b)]
            if a >= b:
                options.append(("-", a - b))
            if b and a % b == 0:
                options.append(("/", a // b))
            sign, value = rng.choice(options)
            steps.append(f"{a}{sign}{b}={value}")
            pool.append(value)
        # Rare targets would say which operation made them; the released sets hold few of 1..9.
        if pool[0] in TARGETS and max(int(s.split("=")[1]) for s in steps) <= 9999:
            return Puzzle(f"{given},{pool[0]}", ",".join(steps))


def is_solution(given: str, answer: str) -> bool:
    """Whether every step is true arithmetic on numbers at hand, all are used, and the target is what is left."""
    *pool, target = map(int, given.split(","))
    for step in answer.split(","):
        match = STEP.fullmatch(step)
        if match is None:
            return False
        a, b, value = int(match[1]), int(match[3]), int(match[4])
        if a not in pool:
            return False
        pool.remove(a)
        if b not in pool:
            return False
        pool.remove(b)
        sign = match[2]
        if sign == "/" and (b == 0 or a % b):
            return False
        if value != (a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a // b):
            return False
        pool.append(value)
    return pool == [target]


def read_puzzles(path: Path, limit: int) -> list[Puzzle]:
    """Puzzles of a released test set (jsonl.gz with input and output)."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Puzzle(row["input"], row["output"]) for row in rows[:limit]]


# ------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Puzzles:
    """Global batch n of the endless stream of puzzles (the training loop's `Batches`), less those in `avoid`.

    process None trains next-token prediction of the answer (layout Causal).
    """

    spell: dict[str, int]
    special: SpecialTokens
    layout: Full | Causal
    process: MaskedDiffusion | None
    batch: int
    seed: int
    numbers: int
    largest: int = 99
    annealing: Annealing | None = None
    avoid: frozenset[tuple[int, ...]] = field(default=frozenset(), repr=False)

    @property
    def answer_length(self) -> int:
        """Tokens kept for an answer and its end-of-text token: enough for any step of these sizes."""
        return (8 if self.largest < 10 else 12) * (self.numbers - 1)

    @property
    def length(self) -> int:
        """Tokens of a canvas: start, numbers with their commas, target with its colon, answer."""
        return 1 + self.numbers * (len(str(self.largest)) + 1) + 3 + self.answer_length

    def encode(self, puzzle: Puzzle) -> tuple[list[int], list[int]]:
        """(prompt, answer) as ids; the answer is filled up with EOS."""
        prompt = [self.special.bos, *(self.spell[c] for c in puzzle.given + ":")]
        answer = [self.spell[c] for c in puzzle.solution][: self.answer_length - 1]
        return prompt, answer + [self.special.eos] * (self.answer_length - len(answer))

    def rows(self, n: int, rank: int = 0, world: int = 1) -> list[Rows]:
        indices = range(n * self.batch + rank, (n + 1) * self.batch, world)
        return [self.noised([self._puzzle(i) for i in indices], list(indices), n)]

    def _puzzle(self, index: int) -> Puzzle:
        puzzle = make_puzzle(self.seed, index, self.numbers, self.largest)
        while puzzle.key in self.avoid:
            index += 1_000_000_007
            puzzle = make_puzzle(self.seed, index, self.numbers, self.largest)
        return puzzle

    def noised(self, puzzles: Sequence[Puzzle], indices: list[int], n: int) -> Rows:
        """Rows of puzzles; noise from the samples' indices."""
        B, L = len(puzzles), self.length
        x0_BL = torch.full((B, L), self.special.pad)
        maskable_BL, valid_BL = torch.zeros(B, L, dtype=torch.bool), torch.zeros(B, L, dtype=torch.bool)
        for b, puzzle in enumerate(puzzles):
            prompt, answer = self.encode(puzzle)
            start, end = len(prompt), len(prompt) + len(answer)
            x0_BL[b, :end] = torch.tensor(prompt + answer)
            maskable_BL[b, start:end] = True
            valid_BL[b, :end] = True
        zeros_BL = torch.zeros_like(x0_BL)
        if self.process is None:
            nothing = torch.zeros_like(maskable_BL)
            return self.layout.training_rows(
                NoisedBatch(x0_BL, x0_BL, nothing, maskable_BL, nothing.float(), zeros_BL, valid_BL, zeros_BL)
            )
        level_BG = torch.cat([stratified_levels(self.seed, i, 1, batch=self.batch, groups=1) for i in indices])
        seeds = [int(generator(self.seed, i, purpose="noise").integers(2**62)) for i in indices]
        ids_BL, noised_BL, weight_BL = self.process.corrupt(x0_BL, maskable_BL, zeros_BL, level_BG, seeds)
        annealed = self.annealing.matrix(n, L) if self.annealing else None
        return self.layout.training_rows(
            NoisedBatch(x0_BL, ids_BL, noised_BL, maskable_BL, weight_BL, zeros_BL, valid_BL, zeros_BL, annealed)
        )


# --------------------------------------------------------------------------------------------------------- scores


@torch.no_grad()
def answer_nats(denoiser: HFDenoiser, batches: Puzzles, puzzles: Sequence[Puzzle], *, draws: int = 4) -> float:
    """Nats per answer token: exact for the parent, the bound (fixed noise) for a diffusion model."""
    batches = replace(batches, annealing=None)  # the model is scored with the attention it decodes with
    total, count = 0.0, 0
    for draw in range(1 if batches.process is None else draws):
        for at in range(0, len(puzzles), 128):
            part = list(puzzles[at : at + 128])
            loss = diffusion_loss(
                denoiser, batches.noised(part, [draw * len(puzzles) + at + i for i in range(len(part))], 0)
            )
            total, count = total + float(loss.sum), count + loss.count
    return total / count


def answers(
    denoiser: HFDenoiser, batches: Puzzles, puzzles: Sequence[Puzzle], *, steps: int | None = None
) -> list[str]:
    """Greedy answers: most confident position first (one a step unless `steps` says otherwise), or left to right."""
    letters = {v: k for k, v in batches.spell.items()}
    found = []
    for at in range(0, len(puzzles), 250):
        prompts = [batches.encode(p)[0] for p in puzzles[at : at + 250]]
        if batches.process is None:
            rows = _left_to_right(denoiser, batches, prompts)
        else:
            canvas = Canvas.from_prompt([p[1:] for p in prompts], batches.answer_length, batches.special)
            *_, last = denoise(
                denoiser, batches.process, canvas, steps=steps or batches.answer_length, policy=TopConfidence(),
                draw=Draw(temperature=0.0), layout=batches.layout,
            )  # fmt: skip
            rows = [last.ids[b, len(p) : len(p) + batches.answer_length].tolist() for b, p in enumerate(prompts)]
        for row in rows:
            end = row.index(batches.special.eos) if batches.special.eos in row else len(row)
            found.append("".join(letters.get(i, "?") for i in row[:end]))
    return found


@torch.no_grad()
def _left_to_right(denoiser: HFDenoiser, batches: Puzzles, prompts: list[list[int]]) -> list[list[int]]:
    lengths = torch.tensor([len(p) for p in prompts])
    ids = torch.full((len(prompts), batches.length), batches.special.pad)
    for b, prompt in enumerate(prompts):
        ids[b, : len(prompt)] = torch.tensor(prompt)
    position = torch.arange(batches.length)
    for k in range(batches.answer_length):
        at = lengths + k
        wanted = position[None] == at[:, None]
        rows = batches.layout.decoding_rows(ids, position[None] <= at[:, None], wanted)
        ids[wanted] = denoiser(rows).argmax(-1)
    return [ids[b, n : n + batches.answer_length].tolist() for b, n in enumerate(lengths.tolist())]


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson's score interval)."""
    z = 1.959964
    p, denominator = hits / n, 1 + z * z / n
    centre, half = (
        (p + z * z / (2 * n)) / denominator,
        z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / denominator,
    )
    return centre - half, centre + half


def spelling(tokenizer: Any) -> dict[str, int]:
    """The id of each character a puzzle or its answer can hold. ValueError where the vocabulary lacks one."""
    table = {}
    for c in "0123456789+-*/=,:":
        ids = tokenizer.encode(c, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"the tokenizer has no token for {c!r} alone; countdown needs one per character")
        table[c] = ids[0]
    return table
