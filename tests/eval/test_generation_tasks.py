"""Every task in which a model writes: golden prompts and judgements of invented records, wrong records, end to end."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from diffulm.eval import generated, packaged
from diffulm.eval.generate import How, Writer, Written
from diffulm.eval.generation_tasks import GENERATION
from diffulm.eval.rate import Rater, diffusion_scorer
from diffulm.eval.tasks import find_tasks, read_records

pytest.importorskip("lm_eval", reason="needs the extra eval")


HUMAN = {
    "task_id": "X/0", "prompt": "def add(a, b):\n", "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}  # fmt: skip
MBPP = {
    "text": "Add.", "code": "def add(a, b):\r\n  return a + b", "task_id": 11, "test_setup_code": "",
    "test_list": ["assert add(1, 1) == 2", "assert add(0, 1) == 1", "assert add(2, 1) == 3"], "challenge_test_list": [],
}  # fmt: skip
STORY = {f"InputSentence{i}": f"Ann flew kite {i}." for i in range(1, 5)} | {
    "InputStoryid": "x", "RandomFifthSentenceQuiz1": "It sank.", "RandomFifthSentenceQuiz2": "It rose.",
    "AnswerRightEnding": "2",
}  # fmt: skip
STORY_PREFIX = "Ann flew kite 1. Ann flew kite 2."
WORDS = "Ann has 3 kites. She buys 4 more. How many has she?"

#: task -> (record as in the file, the end of the prompt, a right text, a wrong one)
GOLDEN: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "gsm8k": (
        {"question": WORDS, "answer": "3+4=<<3+4=7>>7\n#### 7"},
        f"Question: {WORDS}\nAnswer:",
        " 3+4=7\n#### 7",
        " #### 8",
    ),
    "gsm8k_cot": (
        {"question": WORDS, "answer": "#### 7"},
        f"Q: {WORDS}\nA:",
        " 3 + 4 = 7. The answer is 7.",
        " The answer is 34.",
    ),
    "gsm8k_equations": (
        {"instruction": WORDS, "output": "<<3+4=7>> #### 7"},
        f"Question: {WORDS}\nAnswer:",
        " <<3+4=7>> #### 7",
        " 3+4",
    ),
    "mawps": ({"input": WORDS, "target": 7.0, "type": "x", "idx": 0}, f"Q: {WORDS}\nA:", " The answer is 7.", " 12"),
    "mawps_cot": ({"input": WORDS, "target": 0.5, "type": "x", "idx": 0}, f"Q: {WORDS}\nA:", " So 1/2.", " 5"),
    "svamp": (
        {"Body": "Ann has 3 kites", "Question": "How many?", "Answer": 3.0},
        "Q: Ann has 3 kites. How many?\nA:",
        " 3",
        " 4",
    ),
    "svamp_cot": (
        {"Body": "Ann has 3 kites.", "Question": "How many?", "Answer": 3.0},
        "Q: Ann has 3 kites. How many?\nA:",
        " 3",
        "",
    ),
    "asdiv": (
        {"body": "Ann has 3 kites.", "question": "How many?", "answer": "3 (kites)"},
        "Q: Ann has 3 kites. How many?\nA:",
        " 3",
        " 4",
    ),
    "asdiv_cot": (
        {"body": "Ann has 3 kites.", "question": "Who?", "answer": "Ann"},
        "Q: Ann has 3 kites. Who?\nA:",
        "",
        " 4",
    ),
    "sat_math": (
        {"passage": "", "question": "What is $x$?", "options": ["(A)1", "(B)2"], "label": "B"},
        "Question: What is $x$?\nOptions: (A)1 (B)2\nAnswer:",
        " The answer is B.",
        " A",
    ),
    "sat_math_cot": (
        {"passage": "See.", "question": "What is $x$?", "options": ["(A)1", "(B)2"], "label": "A"},
        "Question: See. What is $x$?\nOptions: (A)1 (B)2\nAnswer:",
        " A line. The answer is (A).",
        " none",
    ),
    "triviaqa": (
        {
            "question": "Who flew",
            "answer": {"value": "Ann", "aliases": ["Ann", "A. Smith"], "normalized_aliases": ["ann"]},
        },
        "Question: Who flew?\nAnswer:",
        " The a smith",
        " Bea",
    ),
    "nq_open": ({"question": "who flew", "answer": ["Ann", "The Smith"]}, "Q: who flew?\nA:", " smith", " an"),
    "countdown3": (
        {"input": "15,44,79,50", "output": "44-15=29,79-29=50"},
        "target: 15,44,79,50\nEquations:",
        " 79+15=94, 94-44=50",
        " 50",
    ),
    "countdown4": (
        {"input": "1,2,3,4,10", "output": "1+2=3"},
        "target: 1,2,3,4,10\nEquations:",
        "1+2=3,3+3=6,6+4=10",
        "1+2=3",
    ),
    "countdown5": (
        {"input": "1,2,3,4,5,15", "output": ""},
        "target: 1,2,3,4,5,15\nEquations:",
        "1+2=3,3+3=6,6+4=10,10+5=15",
        "15",
    ),
    "humaneval": (HUMAN, "def add(a, b):\n", "    return a + b\n", "    return a - b\n"),
    "mbpp": (MBPP, "assert add(2, 1) == 3\n[BEGIN]\n", MBPP["code"].replace("\r", ""), "def add(a, b): pass"),
    "rocstories": (STORY, "Ann flew kite 1. Ann flew kite 2.", " Ann flew kite 3.", " Dogs."),
    "humaneval_infilling": (
        {**HUMAN, "prompt": "def add(a, b):\n", "canonical_solution": "    c = a + b\n", "suffix": "    return c\n"},
        "def add(a, b):\n",
        "    c = b + a\n",
        "    c = a - b\n",
    ),
}


def write(folder: Path, name: str, records: list[dict[str, Any]], file: str = "") -> Path:
    path = folder / (file or GENERATION[name].file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    return path


def variants(name: str, count: int) -> list[dict[str, Any]]:
    """The golden record, with a number in its texts so that no two are alike."""
    made = []
    for i in range(count):
        record = json.loads(json.dumps(GOLDEN[name][0]))
        for key in ("question", "instruction", "input", "Body", "body", "InputSentence1", "text"):
            if isinstance(record.get(key), str) and not name.startswith("countdown"):
                record[key] = f"Day {i}. {record[key]}"
        if name == "mbpp":
            record["task_id"] += i
        if name.startswith("humaneval"):
            record["prompt"] = f"# {i}\n{record['prompt']}"
        made.append(record)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with every task: 12 records each, and exemplars where a file of their own has them."""
    path = tmp_path_factory.mktemp("written")
    for name, task in GENERATION.items():
        shown = [{**MBPP, "task_id": i} for i in (2, 3, 4, 1, 600)] if name == "mbpp" else []
        write(path, name, shown + variants(name, 12))
        if task.shown.endswith(".gz"):
            write(path, name, variants(name, 6), task.shown)
    return path


def judge(name: str, record: dict[str, Any], text: str, writer: Writer) -> dict[str, float]:
    """The metrics of one text of a local record."""
    task = GENERATION[name]
    hole = task.hole(record) if task.hole else None
    item = packaged.Prompt("x/0", record, "", hole=None if hole is None else (hole[1], hole[2]))
    return generated.judged(task, item, [Written(text, 1, 1)], writer, "oracle" if hole else "").metrics


@pytest.fixture(scope="module")
def writer(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Writer:
    import diffulm
    from diffulm.convert import convert

    folder = tmp_path_factory.mktemp("longer") / "llama"
    convert(str(parent), folder, trained_length=128)
    model = diffulm.load(folder, dtype="float32")
    return Writer(Rater(diffusion_scorer(model), model.tokenizer, "model"), How(execute=True), model)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(tmp_path: Path, name: str, writer: Writer) -> None:
    """The prompt of a record, and a right text is right, a wrong one wrong."""
    record, end, right, wrong = GOLDEN[name]
    task = GENERATION[name]
    write(tmp_path, name, [record])
    if task.shown.endswith(".gz"):
        write(tmp_path, name, [record], task.shown)
    built = generated.build(name, tmp_path, None if task.shown == "packaged" else 0, execute=True)
    (item,) = generated.prompts(built, writer, None, chat=False)
    assert item.text.endswith(end), item.text[-200:]
    local = read_records(task, tmp_path)[0]
    if name != "asdiv_cot":  # its record's answer is no number
        assert judge(name, local, right, writer)[task.metric] == 1.0
    assert judge(name, local, wrong, writer)[task.metric] < 0.5
    assert judge(name, local, "", writer)[task.metric] == 0.0


def test_every_task_has_its_golden_record() -> None:
    assert set(GOLDEN) == set(GENERATION) and all(name == task.name for name, task in GENERATION.items())


def test_lm_evals_own_metrics_stand_beside(tmp_path: Path, writer: Writer) -> None:
    write(tmp_path, "gsm8k", [GOLDEN["gsm8k"][0]])
    built = generated.build("gsm8k", tmp_path, 0, execute=False)
    (item,) = generated.prompts(built, writer, None, chat=False)
    assert item.judge(" so 7\n#### 7") == {"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}
    assert item.judge(" so 7") == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}


# ---------------------------------------------------------------------------------------------------------- shots


def test_exemplars(folder: Path, tmp_path: Path, writer: Writer) -> None:
    def first(name: str, shots: int | None) -> packaged.Prompt:
        built = generated.build(name, folder, shots, execute=True)
        return generated.prompts(built, writer, 1, chat=False)[0]

    assert first("gsm8k", None).text.count("Question:") == 6 and first("gsm8k", 2).text.count("Question:") == 3
    cot, brief = first("mawps_cot", None).text, first("mawps", None).text
    assert cot.count("Q:") == 9 and brief.count("Q:") == 5
    assert cot.count("The answer is") == 8 and "So there must have been" in cot
    assert brief.count("\nA: The answer is") == 4 and "must have been" not in brief
    assert first("countdown4", 3).text.count("Equations:") == 4
    assert first("mbpp", None).text.count("[DONE]") == 3 and first("mbpp", None).id == "mbpp/0"
    assert "Day 0" in first("mbpp", None).text, "task 11 is the first that is scored"
    shown = first("triviaqa", 2)
    assert shown.text.count("Question:") == 3 and len(generated.prompts(
        generated.build("triviaqa", folder, 2, execute=True), writer, None, chat=False)) == 4  # fmt: skip
    for name, shots, words in (
        ("gsm8k", 7, "gsm8k has 6 exemplars, not 7"),
        ("mawps", 9, "mawps has 8 exemplars, not 9"),
        ("countdown3", 9, "countdown of 3 numbers has 8 exemplars, not 9"),
        ("sat_math", 5, "sat_math has 4 exemplars, not 5"),
        ("mbpp", 4, "mbpp has 3 exemplars, not 4"),
        ("triviaqa", 9, "triviaqa has 8 exemplars, not 9"),
    ):
        with pytest.raises(ValueError, match=words):
            generated.build(name, folder, shots, execute=True)


def test_the_countdown_exemplars_are_solutions() -> None:
    from diffulm.eval.generation_tasks import puzzles

    for count, exemplars in puzzles._EXEMPLARS.items():
        assert len(exemplars) == 8
        for given, found in exemplars:
            assert given.count(",") == count and puzzles.solved({"input": given}, found), (given, found)


# ---------------------------------------------------------------------------------------------------- wrong records

TRAPS = [
    ("gsm8k", {"question": "q", "answer": "none"}, "answer has no number"),
    ("gsm8k", {"instruction": "q", "output": "1"}, "field 'question' is missing"),
    ("mawps", {"input": "q", "target": "7"}, "the answer must be a number, not '7'"),
    ("mawps", {"input": "q", "target": True}, "the answer must be a number, not True"),
    ("sat_math", {**GOLDEN["sat_math"][0], "label": "C"}, "label is 'C', not a letter of the 2 options"),
    ("sat_math", {**GOLDEN["sat_math"][0], "options": "A) 1"}, "options must be a list"),
    ("triviaqa", {"question": "q", "answer": {"aliases": []}}, "answer.aliases must be a list of at least 1"),
    ("nq_open", {"question": "q", "answer": "a"}, "answer must be a list"),
    ("countdown3", {"input": "1;2;3", "output": ""}, "input must be numbers and a target"),
    ("rocstories", {**STORY, "AnswerRightEnding": 2}, "AnswerRightEnding is 2, not one of '1', '2'"),
    ("humaneval_infilling", {**HUMAN, "suffix": "", "canonical_solution": ""}, "canonical_solution is empty"),
    ("mbpp", {**MBPP, "task_id": "11"}, "task_id must be a whole number"),
]


@pytest.mark.parametrize(("name", "record", "words"), TRAPS)
def test_wrong_records_name_file_line_and_field(tmp_path: Path, name: str, record: Any, words: str) -> None:
    path = write(tmp_path, name, [GOLDEN[name][0], record])
    with pytest.raises(ValueError) as caught:
        generated.build(name, tmp_path, 0, execute=True)
    assert words in str(caught.value) and f"{path}, line 2: " in str(caught.value)


def test_what_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="humaneval runs code that a model wrote; give --allow-code-execution"):
        generated.build("humaneval", tmp_path, None, execute=False)
    with pytest.raises(ValueError, match="countdown3 is read from a local file; give --data-dir with countdown/cd3"):
        generated.build("countdown3", None, None, execute=False)
    with pytest.raises(ValueError, match=r"no file .*test.jsonl.gz; check --data-dir, or leave it out to take"):
        generated.build("gsm8k", tmp_path, None, execute=False)
    for name in ("humaneval", "svamp", "countdown3"):  # not to be had from the Hub
        with pytest.raises(ValueError, match=r"there is no file .*; check --data-dir$"):
            generated.build(name, tmp_path, None, execute=True)
    with pytest.raises(ValueError, match="rocstories shows no exemplars; leave it out, or --fewshot 3"):
        generated.build("rocstories", tmp_path, 3, execute=False)
    write(tmp_path, "mbpp", [{**MBPP, "task_id": 5}])
    with pytest.raises(ValueError, match="has no record of the split that is scored"):
        generated.build("mbpp", tmp_path, None, execute=True)
    assert find_tasks(["generation,piqa"], list(GENERATION)) == [*GENERATION, "piqa"]
    with pytest.raises(ValueError, match="unknown task 'gms8k'; did you mean gsm8k"):
        find_tasks(["gms8k"], list(GENERATION))
    with pytest.raises(
        ValueError, match=r"there is no task; .*piqa.*rocstories.*wikitext2.*generation, quality, or text"
    ):
        find_tasks([], list(GENERATION))


# ----------------------------------------------------------------------------------------------------- several texts


def test_several_texts_of_a_document(writer: Writer) -> None:
    """Mean, majority and hit of one document; pass@k of code."""
    task, item = GENERATION["gsm8k"], packaged.Prompt("x/0", GOLDEN["gsm8k"][0], "")
    texts = [Written(f"#### {n}", 1, 1) for n in (7, 8, 8, 7, 7)]
    assert generated.judged(task, item, texts, writer, "").metrics == {
        "exact_match": 0.6,
        "majority@5": 1.0,
        "hit@5": 1.0,
    }
    texts = [Written(f"#### {n}", 1, 1) for n in (7, 8, 8)]
    found = generated.judged(task, item, texts, writer, "").metrics
    assert found == {"exact_match": pytest.approx(1 / 3), "majority@3": 0.0, "hit@3": 1.0}
    record, _, right, wrong = GOLDEN["humaneval"]
    item = packaged.Prompt("x/0", record, "")
    found = generated.judged(
        GENERATION["humaneval"], item, [Written(t, 1, 1) for t in (right, wrong, wrong)], writer, ""
    )
    assert found.metrics == {"pass@1": pytest.approx(1 / 3), "pass@3": 1.0}
    assert [t["text"] for t in found.texts] == [right, wrong, wrong]


# ---------------------------------------------------------------------------------------------------- the real files

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the evaluation files of development are not here")
@pytest.mark.parametrize("name", GENERATION)
def test_the_real_files_and_their_own_solutions(name: str, writer: Writer) -> None:
    """Every record has the schema; the data's own answers are right (of programs, one in forty is run)."""
    task = GENERATION[name]
    records = [r for r in read_records(task, SHARED) if task.role is None or task.role(r) == "scored"]
    wrong = []
    for record in records[:: 40 if task.program else 1]:
        if task.hole is not None:
            text = task.hole(record)[1]
        elif task.program is not None:
            text = record.get("canonical_solution") or record["code"]
        elif name.startswith("countdown"):
            text = record["output"]
        elif "label" in record:
            text = f"The answer is {record['label']}."
        elif isinstance(record["answer"], dict):
            text = record["answer"]["value"]
        else:
            text = record["answer"] if isinstance(record["answer"], str) else record["answer"][0]
        if task.program is None and task.hole is None:
            answer = task.answer(record, text)
            right = answer is not None and task.right is not None and task.right(record, answer)
        else:
            right = judge(name, record, text, writer)[task.metric] == 1.0
        wrong += [] if right else [text]
    allowed = {"asdiv": 56, "asdiv_cot": 56, "triviaqa": 1, "nq_open": 3}
    assert len(wrong) <= allowed.get(name, 0), wrong[:5]
