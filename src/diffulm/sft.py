"""Fine-tuning on conversations: `task = "sft"` in a recipe. Stages, each kept when it is finished:

    init/     the diffusion checkpoint it begins from, its tokenizer with the chat template
    data/     tokenised answers, train and held out        sft/         checkpoints of the training
    model/    the fine-tuned model, or adapter/ for a LoRA (a peft folder; its base is init/)
    scores.json   report.html, report.md, report.json

The parent is a diffusion checkpoint, whose weights and `diffusion` dict are kept, or an autoregressive model, which is
converted first. The measure is the bound on held-out answers given their contexts, before and after.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import adapters, hub, released, runtime
from .answers import (
    Answered,
    answer_heldout,
    answer_prompts,
    answer_prompts_by_parent,
    pick_heldout,
    response_bound,
    write_sft_report,
)
from .data.chat import Answers, Conversations, tokenise, with_common_mean
from .data.conversations import SKIP_BAD, read_conversations
from .denoiser import HFDenoiser
from .job.arm import as_source, convert_stage, diffusion_of, fit, open_arm, open_to_score, shares, training_precision
from .job.folder import Run, Say, as_json, begin, finished, opened, read_state, stages, write_state
from .template import RECIPE, use_template
from .tokenizer import SpecialTokens, load_tokenizer, special_tokens
from .train.config import Recipe
from .train.flops import Shape, Work, flops_per_token
from .train.group import on_first_rank
from .train.loop import Progress
from .train.metrics import read_metrics

Stores = dict[str, tuple[Answers, Answers]]
#: Places named of what is too long.
SHOWN = 3


def sft(
    recipe: Recipe,
    out: Path | str,
    *,
    command: str = "",
    offline: bool = False,
    device: str | None = None,
    say: Say = print,
    on_step: Callable[[str, Progress], None] = lambda arm, progress: None,
) -> dict[str, Any]:
    """Run a recipe of task "sft"; returns the report (also written to `out`). The same call resumes.

    Raises:
        ValueError: bad input, with the remedy.
        KeyboardInterrupt: Ctrl-C.
    """
    if recipe.task != "sft":
        raise ValueError(f"recipe {recipe.name!r} has task {recipe.task!r}; run it with adapt, or set task = 'sft'")
    with opened(recipe, out, offline=offline, device=device, say=say, on_step=on_step) as run:
        return _stages(run, command)


def _stages(run: Run, command: str) -> dict[str, Any]:
    recipe, out, alone = run.recipe, run.out, on_first_rank
    if run.world > 1 and recipe.sft.lora_rank:
        raise ValueError("a LoRA is trained in one process; start it without torchrun, or set sft.lora_rank = 0")
    fresh = begin(run)
    if (done := finished(run)) is not None:
        return done
    with stages(run, "sft", fresh=fresh) as seconds:
        alone(lambda: init_stage(run))
        follow_checkpoint(run)
        stores, counts = data_stage(run)
        special = special_tokens(load_tokenizer(out / "init"))
        requests = pick_heldout([held for _, held in stores.values()], special, recipe.data.length, recipe.eval.windows)
        before = score(run, "before", requests)
        answered = alone(lambda: parents_answers(run)) | alone(lambda: answers(run, "before", requests))
        train_stage(run, stores, requests)
        after = score(run, "after", requests)
        answered |= alone(lambda: answers(run, "after", requests))

    def conclude() -> dict[str, Any]:
        report = {
            "recipe": as_json(recipe), "command": command, "data": counts, "before": before, "after": after,
            "answers": answered, "train": read_metrics(out / "sft"), "dtype": read_state(out)["dtype"],
            "seconds": seconds(), "model": str(result_folder(run)),
        }  # fmt: skip
        return write_sft_report(report, out)

    return alone(conclude)


# -------------------------------------------------------------------------------------------------------- stages


def init_stage(run: Run) -> None:
    """The checkpoint to begin from, with the chat template in its tokenizer."""
    init, parent, length = run.out / "init", run.recipe.model.parent, run.recipe.data.length
    if not (init / "config.json").is_file():
        if not is_diffusion(parent, offline=run.offline):
            convert_stage(run)
        else:
            run.say(f"beginning from the diffusion checkpoint {parent}")
            model = hub.load(parent, device="cpu", dtype="stored", offline=run.offline)
            inner: Any = model.denoiser.model
            limit = getattr(inner.config, "max_position_embeddings", None)
            if limit is not None and length > limit:
                raise ValueError(
                    f"data.length {length} is beyond the model's {limit} positions; choose at most {limit}"
                )
            diffusion = {**model.config, "trained_length": max(int(model.config["trained_length"]), length)}
            hub.save(init, inner, model.tokenizer, diffusion)
    tokenizer = load_tokenizer(init)
    settings = run.recipe.sft
    use_template(tokenizer, settings.chat_template, plain=settings.plain_template, means=RECIPE)
    if settings.split_digits:
        split_digits(tokenizer)
    tokenizer.save_pretrained(init)


def is_diffusion(reference: str, *, offline: bool) -> bool:
    """Whether a model reference leads to a diffusion checkpoint, ours or a released one."""
    folder, gguf = hub.resolve(reference, offline=offline)
    raw = runtime.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return gguf is None and (isinstance(raw.get("diffusion"), dict) or released.recognise(folder, raw) is not None)


def split_digits(tokenizer: Any) -> None:
    """Let every digit be a token of its own, also in the tokenizer that is saved (the paper's GSM8K with GPT-2)."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    known = (json.loads(backend.to_str())["pre_tokenizer"] or {}).get("pretokenizers", [])
    if not any(entry["type"] == "Digits" for entry in known):
        own = backend.pre_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, own] if own is not None else [digits])


def follow_checkpoint(run: Run) -> None:
    """Layout, source and block size are the checkpoint's, whatever the recipe's defaults say."""
    diffusion = runtime.read_json(run.out / "init" / "config.json")["diffusion"]
    model = dataclasses.replace(
        run.recipe.model, layout=diffusion["layout"], source=diffusion["source"], block_size=diffusion.get("block_size")
    )
    run.recipe = dataclasses.replace(run.recipe, model=model)


def data_stage(run: Run) -> tuple[Stores, dict[str, Any]]:
    """Tokenised answers (train, held out) of every source, and what was counted on the way.

    ValueError where there is nothing to train on, or an answer too long that nobody allowed for.
    """
    folder, data, settings = run.out / "data", run.recipe.data, run.recipe.sft

    def make() -> dict[str, Any]:
        tokenizer, counts = load_tokenizer(run.out / "init"), {}
        for config in data.sources:
            run.say(f"reading conversations: {config.path}")
            read = read_conversations(
                as_source(config), heldout_fraction=data.heldout_fraction, skip_bad=settings.skip_bad
            )
            (folder / config.name).mkdir(parents=True, exist_ok=True)
            count: dict[str, Any] = {"bad": read.bad, "duplicates": read.duplicates, "problems": list(read.problems)}
            for split in ("train", "heldout"):
                chosen = [c for c in read.conversations if c.heldout == (split == "heldout")]
                problems: list[str] = []
                found = tokenise(chosen, tokenizer, skip_bad=settings.skip_bad, problems=problems)
                found.save(folder / config.name / f"{split}.npz")
                count["bad"] += len(problems)
                count["problems"] = [*count["problems"], *problems][:3]
                count[split] = {"conversations": len(chosen)}
            counts[config.name] = count
        runtime.write_atomic(folder / "conversations.json", json.dumps(counts, indent=1))
        return counts

    there = on_first_rank((folder / "conversations.json").is_file)
    counts = runtime.read_json(folder / "conversations.json") if there else on_first_rank(make)
    names = [source.name for source in data.sources]
    stores = {n: (Answers.open(folder / n / "train.npz"), Answers.open(folder / n / "heldout.npz")) for n in names}
    counts = {n: counts[n] | in_window(run.recipe, n, *stores[n], counts[n]) for n in names}
    for name, count in counts.items():
        for line in describe(name, count, data.length):
            run.say(f"  {line}")
    return stores, counts


def in_window(recipe: Recipe, name: str, train: Answers, heldout: Answers, count: dict[str, Any]) -> dict[str, Any]:
    """The counts of a source that depend on the window: of each split the answers that can be used, their tokens, how
    many are left out and how many cut; `too_long`, the places of the first; bad rows and their problems.

    `count`: those of reading. A held-out answer is never cut: its bound would be that of another text.

    Raises:
        ValueError: no answer can be trained on; or one is too long, unless `sft.too_long` or `sft.skip_bad` allow it.
    """
    length, settings = recipe.data.length, recipe.sft
    places = [found.place(int(i)) for found in (train, heldout) for i in found.too_long(length)[:SHOWN]][:SHOWN]
    splits = {
        "train": train.in_window(length, truncate=settings.too_long == "truncate"),
        "heldout": heldout.in_window(length),
    }
    left_out = sum(found["left_out"] for found in splits.values())
    if places and settings.too_long == "error" and not settings.skip_bad:
        raise ValueError(
            f"{places[0]}, but the window has {length}; {left_out} of {len(train) + len(heldout)} answers of source "
            f"{name!r} are too long. Shorten them, raise data.length (to {max(train.longest, heldout.longest)} for all "
            f"of them), or set sft.too_long = 'skip' or 'truncate' ({SKIP_BAD})"
        )
    if not splits["train"]["answers"]:
        first = [f"; the first: {problem}" for problem in [*places, *count["problems"]]][:1]
        raise ValueError(
            f"source {name!r} has no answer to train on ({splits['train']['left_out']} do not fit the window of "
            f"{length} tokens with their context, {count['bad']} bad rows{''.join(first)}); mend the rows, raise "
            "data.length, or set sft.too_long = 'truncate'"
        )
    out: dict[str, Any] = {split: count[split] | found for split, found in splits.items()} | {"too_long": places}
    if settings.too_long == "error":
        out |= {"bad": count["bad"] + left_out, "problems": [*count["problems"], *places]}
    return out


def describe(name: str, count: dict[str, Any], length: int) -> list[str]:
    """What was counted of a source, in lines for people."""
    train, heldout = count["train"], count["heldout"]
    lines = [
        f"{name}: {train['answers']:,} answers ({train['answer_tokens']:,} tokens) to train on, "
        f"{heldout['answers']:,} held out"
    ]
    if count["bad"]:
        lines.append(f"{name}: {count['bad']} bad rows left out; " + "; ".join(count["problems"]))
    if count["too_long"]:
        lines.append(
            f"{name}: answers longer than the window of {length} tokens with their context: {train['left_out']} left "
            f"out and {train['cut']} cut to train on, {heldout['left_out']} left out of those held out; the first: "
            + "; ".join(count["too_long"])
        )
    return lines


def result_folder(run: Run) -> Path:
    return run.out / ("adapter" if run.recipe.sft.lora_rank else "model")


def open_result(run: Run, what: str) -> hub.Model:
    """The model before or after, as anyone would open it."""
    lora = what == "after" and run.recipe.sft.lora_rank
    folder = run.out / ("model" if what == "after" and not lora else "init")
    dtype = read_state(run.out).get("dtype") or "float32"
    adapter = run.out / "adapter" if lora else None
    return hub.load(folder, device=str(run.device), dtype=dtype, adapter=adapter, offline=True)


def score(run: Run, what: str, requests: list[Answered]) -> dict[str, Any]:
    """The bound on held-out answers before or after; computed once, then read."""
    stored = on_first_rank(lambda: read_state(run.out).get(what))
    if stored:
        return dict(stored)
    run.say(f"scoring {what} on {len(requests)} held-out answers")
    if what == "after" and run.recipe.sft.lora_rank:  # trained in one process
        denoiser = open_result(run, what).denoiser
    else:
        denoiser, _ = open_to_score(run, result_folder(run) if what == "after" else run.out / "init")
    found = bound(run, denoiser, requests, run.recipe.eval.draws)
    run.say(f"  {found['nats_per_token']:.3f} +- {found['stderr_nats_per_token']:.3f} nats/token of the answers")
    write_state(run.out, **{what: found})
    return found


def bound(run: Run, denoiser: HFDenoiser, requests: list[Answered], draws: int) -> dict[str, Any]:
    """`response_bound` under the layout and process that the run trains."""
    special = special_tokens(load_tokenizer(run.out / "init"))
    layout, process = diffusion_of(run, special)
    return response_bound(
        denoiser, layout, process, special, requests, length=run.recipe.data.length, draws=draws,
        seed=run.recipe.train.seed, skip=None if denoiser.mask_row_added else special.mask, device=run.device,
    )  # fmt: skip


def answers(run: Run, what: str, requests: list[Answered]) -> dict[str, Any]:
    """{what: answers to the recipe's prompts and to held-out questions}; computed once, then read."""
    stored = read_state(run.out).get(f"answers_{what}")
    if stored is None:
        run.say(f"answering {what}")
        model, settings = open_result(run, what), run.recipe.eval
        stored = {
            "prompts": answer_prompts(model, settings.prompts, settings.max_tokens, settings.steps),
            "heldout": answer_heldout(
                model, requests[: run.recipe.sft.answers], run.recipe.data.length, settings.max_tokens, settings.steps
            ),
        }
        write_state(run.out, **{f"answers_{what}": stored})
    return {what: stored}


def parents_answers(run: Run) -> dict[str, Any]:
    """{"parent": the AR parent's answers to the recipe's prompts} where it is on this machine, computed once; or {}."""
    stored, settings, init = read_state(run.out).get("answers_parent"), run.recipe.eval, run.out / "init"
    if stored is None and settings.prompts:
        parent = str(runtime.read_json(init / "config.json")["diffusion"].get("parent", ""))
        try:
            if is_diffusion(parent, offline=True):
                raise ValueError(f"{parent} is a diffusion model itself")
            rows = answer_prompts_by_parent(
                parent, load_tokenizer(init), settings.prompts, settings.max_tokens, device=run.device,
                dtype=training_precision(run).weights,
            )  # fmt: skip
        except (ValueError, torch.OutOfMemoryError) as error:
            run.say(f"the AR parent's answers are left out: {error}")
            return {}
        stored = {"prompts": rows}
        write_state(run.out, answers_parent=stored)
    return {} if stored is None else {"parent": stored}


def train_stage(run: Run, stores: Stores, requests: list[Answered]) -> None:
    """Train, resuming if it was begun, and write the model or its adapter."""
    final, recipe = result_folder(run), run.recipe
    if (final / ("adapter_config.json" if recipe.sft.lora_rank else "config.json")).is_file():
        return
    denoiser, tokenizer, special = open_arm(run, run.out / "init", causal=False)
    layout, process = diffusion_of(run, special)
    shape, lora = Shape.of(denoiser.model), None
    if recipe.sft.lora_rank:
        lora = adapters.add_lora(
            denoiser.model, int(special.mask or 0), rank=recipe.sft.lora_rank, alpha=recipe.sft.lora_alpha,
            targets=recipe.sft.lora_targets, seed=recipe.train.seed,
        )  # fmt: skip
        denoiser.to(run.device)
    run.say("fine-tuning" + (f" a LoRA of rank {recipe.sft.lora_rank}" if lora is not None else " all weights"))
    sequences = [cut(run, train_set, special) for train_set, _ in stores.values()]
    sequences = with_common_mean(sequences, shares(run, sequences))
    work = Work.of(recipe, noised=answer_share(run, sequences))
    few = requests[:: max(1, len(requests) // 6)][:6]
    made = fit(
        run, "sft", run.out / "init", denoiser, sequences, layout, process, config=recipe.train,
        flops_per_token=flops_per_token(shape, work, frozen=lora is not None),
        heldout=lambda: float(bound(run, denoiser, few, 3)["nats_per_token"]),
    )  # fmt: skip
    seen = int(denoiser.config.diffusion.get("tokens_seen", 0)) + made.tokens
    diffusion = {**denoiser.config.diffusion, "tokens_seen": seen}
    if lora is not None:
        assert isinstance(made.weights, dict), "one process alone trains a LoRA"
        adapters.write_lora(final, lora, made.weights, diffusion, base=str(run.out / "init"))
        return
    texts = ", ".join(" ".join((s.path, *s.more)) for s in recipe.data.sources)
    card = f"Recipe `{recipe.name}`: fine-tuned on {texts}.\n"
    on_first_rank(lambda: hub.save(final, denoiser.model, tokenizer, diffusion, state_dict=made.weights, card=card))


def answer_share(run: Run, sequences: Sequence[Conversations]) -> float:
    """Tokens of the answers and their ends, of all tokens in a sequence: the mean over the mixture."""
    weights = shares(run, sequences)
    parts = [float((q.answers + q.extra).sum()) / (len(q) * q.length) for q in sequences]
    return sum(weight * part for weight, part in zip(weights, parts, strict=True)) / sum(weights)


def cut(run: Run, source: Answers, special: SpecialTokens) -> Conversations:
    """Training sequences of one source; what does not fit was counted, or refused, by `in_window`."""
    settings = run.recipe.sft
    return Conversations.cut(
        source, run.recipe.data.length, special, seed=run.recipe.train.seed, eos_padding=settings.eos_padding,
        eos_weight=settings.eos_weight, too_long="truncate" if settings.too_long == "truncate" else "skip",
        truncate_share=settings.truncate_share,
    )  # fmt: skip
