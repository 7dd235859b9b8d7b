"""lm-evaluation-harness 0.4.13 on our scores. The only file that imports lm_eval.

Prompts, options, gold answers and metrics are lm-eval's; the log-likelihoods are ours, of diffusion models and their
parents alike, behind one start token. Local files stand in for the Hub's data sets (`tasks.py`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .generate import Ask, Writer
from .masks import Score
from .rate import Question, Rater
from .tasks import Local, Record, Task, read_records, set_aside

MISSING = "evaluation needs lm-eval; pip install 'diffulm[eval]'"


class Records(list[Record]):
    """What lm-eval uses of a data set: a list of records with `map` and the names of its fields."""

    @property
    def features(self) -> Record:
        """Field names, as keys."""
        return self[0] if self else {}

    def map(self, function: Callable[[Record], Record]) -> Records:
        """Each record with what the function makes of it."""
        return Records({**record, **function(dict(record))} for record in self)


@dataclass
class Document:
    """One scored document: its place in the task, its metrics, and our scores of its options or what was written.

    Without scores and texts: an option is nothing but a reused mask token, and nothing can be said of the document.
    fewer: by number of draws, what the metrics would have been on average with that many masks an option.
    """

    id: str
    metrics: dict[str, float]
    scores: list[Score] = field(default_factory=list)
    texts: list[Record] = field(default_factory=list)
    fewer: dict[int, dict[str, float]] = field(default_factory=dict)


def tools() -> tuple[Path, Callable[..., Record], Callable[..., Any]]:
    """lm-eval's folder of tasks, its reader of their YAML, its class of tasks. ValueError without lm-eval."""
    try:
        import lm_eval.tasks
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise ValueError(MISSING) from error
    return Path(lm_eval.tasks.__file__).parent, load_yaml, ConfigurableTask


def build(task: Task, folder: Path | None, fewshot: int) -> list[Any]:
    """lm-eval's task objects of a task (57 for MMLU): from the local file, or from the Hub where folder is None.

    ValueError for a file that is missing or wrong, for more shots than there are exemplars, and without lm-eval.
    """
    pattern, load_yaml, ConfigurableTask = tools()
    records = None if folder is None else read_records(task, folder, hub=True)
    built = []
    with quiet():
        for path in sorted(pattern.glob(task.packaged)):
            config = dict(load_yaml(path))
            config.pop("tag", None)
            if records is not None:
                localise(config, task, *_parts(config, task, records, fewshot), fewshot)
                config.update(task.changes)
            try:
                built.append(ConfigurableTask(config=config))
            except Exception as error:  # datasets, requests and the Hub client have their own
                if records is not None:
                    raise
                raise ValueError(
                    f"{task.name} could not be had from the Hub ({type(error).__name__}); give --data-dir with "
                    f"{task.file} in it"
                ) from error
    return built


def _parts(config: Record, task: Task, records: list[Record], fewshot: int) -> tuple[list[Record], list[Record]]:
    """The records of a packaged config that are scored, and its exemplars."""
    scored, shown = records, records[:0]
    if task.name == "mmlu":
        subject = config["dataset_name"]
        mine = [r for r in records if r["subject"] == subject]
        scored, shown = ([r for r in mine if r["split"] == split] for split in (task.split, "dev"))
        if not scored:
            raise ValueError(f"{task.file} has no {task.split} records of {subject}; fetch it again")
    elif fewshot:
        shown, scored = set_aside(records, task.name)
    return scored, shown


def localise(
    config: Record, task: Local, scored: list[Record], shown: list[Record], shots: int, *, own: bool = False
) -> None:
    """Make a packaged config read local records: those that are scored, and exemplars, which never are.

    own: the config brings the exemplars itself. ValueError for more shots than there are exemplars.
    """
    if shots > len(shown):
        raise ValueError(f"{task.name} has {len(shown)} exemplars, not {shots}; lower --fewshot")
    for key in ("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "fewshot_split"):
        config.pop(key, None)
    config.update({"validation_split": None, "test_split": None, f"{task.split}_split": "scored"})
    parts = {"scored": Records(scored)}
    if not own:
        parts["shown"] = Records(shown)
        config["fewshot_config"] = {"sampler": "first_n", "split": "shown"}
    config["custom_dataset"] = lambda **_: parts


def language_model(rater: Rater, writer: Writer | None = None) -> Any:
    """The object that `simple_evaluate` takes: log-likelihoods by our estimator, is_greedy as `Scorer.greedy`.

    With a writer it also answers generate_until, for tasks of the harness that are not among ours.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise ValueError(MISSING) from error

    class Rated(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.rater, self.tokenizer = rater, rater.tokenizer
            self.details: dict[tuple[str, int], list[Score]] = {}
            self.questions: list[Any] = []

        @property
        def eot_token_id(self) -> int:
            return rater.scorer.special.eos

        @property
        def prefix_token_id(self) -> int:
            return rater.scorer.special.bos

        @property
        def tokenizer_name(self) -> str:
            return str(getattr(rater.tokenizer, "name_or_path", "")).replace("/", "__")

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return with_template(rater.tokenizer, chat_history, add_generation_prompt)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return rater.encode(string)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            empty = next((r for r in requests if not r.args[1]), None)
            if empty is not None:
                raise ValueError(f"{empty.task_name}, document {empty.doc_id}: an option is empty; mend the data")
            self.questions = [(r.task_name, r.doc_id) for r in requests]
            try:
                return super().loglikelihood(requests, disable_tqdm=True)
            finally:
                self.questions = []

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            groups = self.questions or list(range(len(requests)))
            return rate_tokens(rater, requests, groups, self.details)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            texts = [r.args[0] for r in requests]
            return [-sum(e.nats for e in rater.texts([text], draws=rater.scorer.draws)) for text in texts]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            if writer is None:
                raise ValueError("this task asks for generated text; hand a Writer to `language_model`")
            asks: list[Ask] = []
            for r in requests:
                prompt, how = r.args
                until = how.get("until") or []
                cap = writer.how.max_tokens or int(how.get("max_gen_toks", 256))
                again = sum(r is other for other in requests[: len(asks)])  # repeats are the same request again
                asks.append(Ask(prompt, cap, (until,) if isinstance(until, str) else tuple(until), again))
            return [written.text for written in writer.write(asks)]

    return Rated()


def with_template(tokenizer: Any, history: list[dict[str, str]], open_answer: bool) -> str:
    """A chat as the tokenizer's template writes it. ValueError where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; leave out --chat-template")
    text = tokenizer.apply_chat_template(
        history, tokenize=False, add_generation_prompt=open_answer, continue_final_message=not open_answer
    )
    return str(text)


def rate_tokens(rater: Rater, requests: list[Any], groups: list[Any], details: dict[Any, Any]) -> list[Any]:
    """(log-likelihood, is greedy) of each ((context, continuation), ids, ids); one group is one question."""
    members: dict[Any, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    made = [rater.request(ids, answer, float(len(text[1].strip()))) for text, ids, answer in requests]
    # One option alone (LAMBADA) is right when the model would write it; of several, the most probable one counts.
    # An option of nothing but the reused mask token has no score, and its question none: lm-eval gets a stand-in.
    skip = rater.scorer.skip
    answers: list[Any] = [(0.0, False)] * len(requests)
    for group in [g for g, own in members.items() if any(set(made[i].continuation) == {skip} for i in own)]:
        details[group] = []
        del members[group]
    questions = [Question(tuple(made[i] for i in own), greedy=len(own) == 1) for own in members.values()]
    for (group, own), (scores, greedy) in zip(members.items(), rater.rate(questions), strict=True):
        details[group] = scores
        for i, score in zip(own, scores, strict=True):
            answers[i] = (-score.nats, bool(greedy))
    return answers


def run(
    model: Any, tasks: Sequence[Any], *, fewshot: int = 0, limit: int | None = None, chat: bool = False
) -> list[Document]:
    """Every document of the task objects through `simple_evaluate`, with lm-eval's metrics."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rater: Rater = model.rater
    show, error_stream = rater.on_progress, sys.stderr

    def aloud(*args: Any) -> None:
        with contextlib.redirect_stderr(error_stream):
            show(*args)

    rater.on_progress = aloud
    try:
        with quiet():
            results = simple_evaluate(
                model=model, tasks=list(tasks), num_fewshot=fewshot, limit=limit, bootstrap_iters=0,
                task_manager=TaskManager(include_defaults=False), apply_chat_template=chat, fewshot_as_multiturn=chat,
                random_seed=None, numpy_random_seed=None, torch_random_seed=None, fewshot_random_seed=0,
            )  # fmt: skip
    finally:
        rater.on_progress = show
    documents = []
    by_name = {task.config.task: task for task in tasks}
    for name, samples in results["samples"].items():
        for sample in samples:
            scores = model.details[name, sample["doc_id"]]
            metrics = {key: float(sample[key]) for key in sample["metrics"]} if scores else {}
            fewer = with_fewer_draws(by_name[name], sample["doc"], scores)
            documents.append(Document(f"{name}/{sample['doc_id']}", metrics, scores, fewer=fewer))
    return documents


def with_fewer_draws(task: Any, record: Record, scores: Sequence[Score]) -> dict[int, dict[str, float]]:
    """Mean metrics of a question at each number of draws that all its options have estimates for (`Score.fewer`)."""
    found = {}
    for draws in sorted(map(int, set.intersection(*(set(s.fewer) for s in scores))) if len(scores) > 1 else ()):
        sides = zip(*(s.fewer[str(draws)] for s in scores), strict=True)
        metrics = [task.process_results(record, [(-nats, False) for nats in side]) for side in sides]
        found[draws] = {key: sum(float(m[key]) for m in metrics) / len(metrics) for key in metrics[0]}
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars and no chatter of lm-eval and datasets; progress is ours."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
