"""Tasks of lm-eval in which a model writes: its prompts, exemplars, stop strings and metrics.

Records are local ones or the Hub's. What to do with a text is said by ours (generation_tasks/); lm-eval's own metrics
of it stand beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .generation_tasks import Generation
from .harness import localise, quiet, tools
from .tasks import Record, read_records, set_aside


def unjudged(text: str) -> dict[str, float]:
    """No metrics of lm-eval."""
    return {}


@dataclass(frozen=True)
class Prompt:
    """One document of a task in which a model writes. judge: lm-eval's metrics of a text; hole: (truth, suffix) where
    `text` is a prefix to be joined to a suffix; cut: tokens left out of both to fit the model."""

    id: str
    record: Record
    text: str
    until: tuple[str, ...] = ()
    judge: Callable[[str], dict[str, float]] = unjudged
    hole: tuple[str, str] | None = None
    cut: int = 0


def build(task: Generation, folder: Path | None, shots: int) -> Any:
    """lm-eval's task object of a packaged task in which a model writes. ValueError for what is missing or wrong."""
    folder_of_tasks, load_yaml, ConfigurableTask = tools()
    with quiet():
        # Functions of the tasks of code fetch an executor from the Hub when they are named; ours stands in for them.
        config = dict(load_yaml(folder_of_tasks / task.packaged, resolve_func=task.program is None))
        config.pop("tag", None)
        changes = dict(task.changes)
        if callable(again := changes.pop("fewshot_config", None)):
            config["fewshot_config"] = {**config["fewshot_config"], "samples": again(packaged_samples(config))}
        config.update(changes, num_fewshot=shots, task=task.name)
        if task.shown == "packaged" and shots > len(packaged_samples(config)):
            raise ValueError(f"{task.name} has {len(packaged_samples(config))} exemplars, not {shots}; lower --fewshot")
        if folder is not None:
            own = task.shown == "packaged"
            localise(config, task, *_parts(config, task, folder, shots), shots, own=own)
        try:
            return ConfigurableTask(config=config)
        except Exception as error:
            if folder is not None:
                raise
            raise ValueError(
                f"{task.name} could not be had from the Hub ({type(error).__name__}); give --data-dir with "
                f"{task.file} in it"
            ) from error


def packaged_samples(config: Record) -> list[Record]:
    """The exemplars that a packaged config brings along."""
    found: list[Record] = config["fewshot_config"]["samples"]
    return found


def _parts(config: Record, task: Generation, folder: Path, shots: int) -> tuple[list[Record], list[Record]]:
    """The local records that are scored, and the exemplars."""
    scored, shown = read_records(task, folder, hub=task.hub), list[Record]()
    if task.role is not None:
        parts = {kind: [r for r in scored if task.role(r) == kind] for kind in ("scored", "shown")}
        scored, shown = parts["scored"], parts["shown"]
        if not scored:
            raise ValueError(f"{task.file} has no record of the split that is scored; fetch it again")
    elif task.shown == "packaged":
        shown = packaged_samples(config)
    elif task.shown and shots:
        shown = read_records(replace(task, file=task.shown), folder, hub=task.hub)[:shots]
    elif shots:
        shown, scored = set_aside(scored, task.name)
    return scored, shown


def prompts(one: Any, task: Generation, limit: int | None, template: Callable[..., str] | None) -> list[Prompt]:
    """The documents of a task object of `build`, with the prompt of each. template: writes a chat as text."""
    with quiet():
        one.build_all_requests(
            limit=limit, apply_chat_template=template is not None, fewshot_as_multiturn=template is not None,
            chat_template=template,
        )  # fmt: skip
    found = []
    for instance in one.instances:
        text, settings = instance.args
        until = settings.get("until") or []
        until = (until,) if isinstance(until, str) else tuple(until)

        def judge(text: str, instance: Any = instance) -> dict[str, float]:
            instance.resps, instance.filtered_resps = [text], {}
            for ensemble in one._filters:
                ensemble.apply([instance])
            return {
                f"{metric},{name}": float(value)
                for name, answer in instance.filtered_resps.items()
                for metric, value in one.process_results(instance.doc, [answer]).items()
            }

        name, record = f"{task.name}/{instance.doc_id}", dict(instance.doc)
        # The metrics of packaged code would run it in their own way.
        found.append(Prompt(name, record, text, until, judge if task.program is None else unjudged))
    return found
