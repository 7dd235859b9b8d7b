"""What a task says when a model writes: how a record is read, the prompt, the answer in a text, when it is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..schemas import Record


@dataclass(frozen=True)
class Generation:
    """One task.

    Args:
        file: gzip file below the data folder; the same without .gz is read too.
        adapt: checks a local record and brings it to the schema of the prompt; KeyError, TypeError, ValueError.
        metric: the main figure, of a single text.
        answer: (record, text) -> what the text answers, None where it answers nothing.
        right: (record, answer) -> whether it is right. Tasks of code have `program` and `hole` tasks may have `measure`
            in its place.
        packaged: YAML file of lm-eval 0.4.13 that makes the prompts and says where a text ends; its own metrics stand
            in the report too, under its names. In its place `prompt`: (record, shots) -> prompt, with `until`.
        changes: keys of the packaged config that are otherwise here; a function makes the packaged exemplars others.
        shots: exemplars in the prompt where --fewshot does not say.
        shown: where exemplars come from: a file like `file`, "packaged" (the YAML's own), or "" (eight fixed records of
            the evaluated split, which are then not scored).
        role: for a file of several splits: "scored", "shown" or "" for a record.
        program: (record, answer) -> the Python program that ends well where the answer is right.
        hole: record -> (prefix, truth, suffix), a task of infilling; measure: (truths, texts) -> measures in [0, 1];
            whole: cuts what was written from left to right behind the end of its line or sentence.
        cap: tokens of a text at most, of a hole of unknown length where `hole` is set.
        vote: answers of several texts can be counted (self-consistency).
        hub: the packaged task can be had from the Hub as it is.
    """

    name: str
    file: str
    adapt: Callable[[Record], Record]
    metric: str
    answer: Callable[[Record, str], str | None] = lambda record, text: text
    right: Callable[[Record, str], bool] | None = None
    packaged: str = ""
    changes: Record = field(default_factory=dict)
    prompt: Callable[[Record, int], str] | None = None
    until: tuple[str, ...] = ()
    shots: int = 0
    shown: str = ""
    role: Callable[[Record], str] | None = None
    program: Callable[[Record, str], str] | None = None
    hole: Callable[[Record], tuple[str, str, str]] | None = None
    measure: Callable[[list[str], list[str]], list[dict[str, float]]] | None = None
    whole: Callable[[str], str] = lambda text: text
    cap: int = 256
    vote: bool = False
    hub: bool = False
    split: str = "test"
    remark: str = ""


def shown_first(exemplars: list[str], shots: int, name: str) -> list[str]:
    """The first exemplars; ValueError where there are fewer."""
    if shots > len(exemplars):
        raise ValueError(f"{name} has {len(exemplars)} exemplars, not {shots}; lower --fewshot")
    return exemplars[:shots]
