"""The tasks in which a model writes: a module for each kind, a `Generation` for each task."""

from . import code, math, puzzles, questions, stories
from .task import Generation

#: By name, in the order of the reports.
GENERATION: dict[str, Generation] = {
    task.name: task
    for module in (math, questions, puzzles, stories, code)
    for task in module.TASKS
}  # fmt: skip

__all__ = ["GENERATION", "Generation"]
