"""Every task's construction against golden records (invented, in the files' schemas), and files that are wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from diffulm.eval.tasks import EXEMPLARS, TASKS, TEXTS, documents_of, find_tasks, read_records, read_text, set_aside

pytest.importorskip("lm_eval", reason="needs the extra eval")

from diffulm.eval import harness

#: task -> (record as in the file, prompts, continuations, index of the gold option or None)
GOLDEN: dict[str, tuple[dict[str, Any], list[str], list[str], int | None]] = {
    "lambada": (
        {"context": "Ann had a kite. She flew the", "continuation": "kite"},
        ["Ann had a kite. She flew the"], [" kite"], None,
    ),
    "lambada_standard": (
        {"text": "ann had a kite . she flew the kite"}, ["ann had a kite . she flew the"], [" kite"], None,
    ),
    "hellaswag": (
        {"activity_label": "Kites", "ctx_a": "Ann runs. [header] Now", "ctx_b": "she", "ctx": "", "ind": 0,
         "endings": ["lets go [title] End", "[step] sleeps.", "eats  it.", "sits."], "label": "2"},
        ["Kites: Ann runs. Now She"] * 4, [" lets go. End", "  sleeps.", " eats it.", " sits."], 2,
    ),
    "winogrande": (
        {"sentence": "Ann called Bea since _ was late.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        ["Ann called Bea since Ann", "Ann called Bea since Bea"], [" was late."] * 2, 1,
    ),
    "piqa": (
        {"goal": "Dry a sock", "sol1": "Hang it.", "sol2": "Wet it.", "label": 1},
        ["Question: Dry a sock\nAnswer:"] * 2, [" Hang it.", " Wet it."], 1,
    ),
    "siqa": (
        {"context": "Ann left.", "question": "Why?", "answerA": "rain", "answerB": "sun", "answerC": "fun",
         "label": "3"},
        ["Q: Ann left. Why?\nA:"] * 3, [" rain", " sun", " fun"], 2,
    ),
    "arc_easy": (
        {"id": "x", "query": "Question: What flies?", "choices": ["kite", "stone", "sock"], "gold": 0},
        ["Question: What flies?\nAnswer:"] * 3, [" kite", " stone", " sock"], 0,
    ),
    "arc_challenge": (
        {"id": "x", "question": "What flies?", "choices": {"text": ["sock", "kite", "cup"], "label": ["1", "2", "3"]},
         "answerKey": "2"},
        ["Question: What flies?\nAnswer:"] * 3, [" sock", " kite", " cup"], 1,
    ),
    "boolq": (
        {"question": "do kites fly", "answer": True, "passage": "Kites fly."},
        ["Kites fly.\nQuestion: do kites fly?\nAnswer:"] * 2, [" no", " yes"], 1,
    ),
    "openbookqa": (
        {"query": "A kite needs", "choices": ["milk", "wind"], "gold": 1}, ["A kite needs"] * 2, [" milk", " wind"], 1,
    ),
    # Two spaces: lm-eval puts one in the option and one between prompt and option. Comparable, so kept.
    "copa": (
        {"premise": "The wind blew.", "choice1": "The kite rose.", "choice2": "It sank.", "question": "effect",
         "idx": 0, "label": 0},
        ["The wind blew therefore"] * 2, ["  the kite rose.", "  it sank."], 0,
    ),
    "sciq": (
        {"question": "What lifts a kite?", "distractor1": "milk", "distractor2": "sand", "distractor3": "ink",
         "correct_answer": "wind", "support": " Wind lifts."},
        ["Wind lifts.\nQuestion: What lifts a kite?\nAnswer:"] * 4, [" milk", " sand", " ink", " wind"], 3,
    ),
    "commonsense_qa": (
        {"id": "x", "question": "What flies? ", "question_concept": "fly", "answerKey": "D",
         "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["sock", "cup", "pan", "kite", "rug"]}},
        ["Question: What flies?\nA. sock\nB. cup\nC. pan\nD. kite\nE. rug\nAnswer:"] * 5,
        [" A", " B", " C", " D", " E"], 3,
    ),
    "winograd": (
        {"context_options": ["Ann lost it, so Ann", "Ann lost it, so it"], "continuation": "was gone.", "gold": 1},
        ["Ann lost it, so Ann", "Ann lost it, so it"], [" was gone."] * 2, 1,
    ),
}  # fmt: skip


def write(folder: Path, name: str, records: list[dict[str, Any]], *, end: str = "\n") -> Path:
    """A task's local file."""
    path = folder / TASKS[name].file
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(r, ensure_ascii=False) if ".jsonl" in path.name else r["text"] for r in records]
    path.write_bytes(gzip.compress(end.join([*lines, ""]).encode()))
    return path


def mmlu_records() -> list[dict[str, Any]]:
    """One dev and two test questions of each of the 57 subjects."""
    import lm_eval.tasks

    files = Path(lm_eval.tasks.__file__).parent.glob(TASKS["mmlu"].packaged)
    subjects = sorted(p.stem.removeprefix("mmlu_") for p in files)
    made = []
    for subject in subjects:
        for split, number in (("dev", 0), ("test", 1), ("validation", 2), ("test", 3)):
            record = {"subject": subject, "split": split, "question": f" {subject} {number}?", "choices": list("pqrs")}
            made.append({**record, "answer": number})
    return made


def requests(one: Any, *, shots: int = 0, limit: int | None = 1) -> list[Any]:
    one.set_config("num_fewshot", shots)
    with harness.quiet():
        one.build_all_requests(limit=limit)
    return list(one.instances)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(tmp_path: Path, name: str) -> None:
    record, prompts, answers, gold = GOLDEN[name]
    write(tmp_path, name, [record])
    (one,) = harness.build(TASKS[name], tmp_path, 0)
    made = requests(one)
    assert [r.args for r in made] == list(zip(prompts, answers, strict=True))
    # What lm-eval counts as right: the options rated so that each in turn is the best.
    document = one.task_docs[0]
    rated = [
        one.process_results(document, [(-1.0 if i == best else -9.0, i == best) for i in range(len(made))])["acc"]
        for best in range(len(made))
    ]
    assert rated == [float(gold is None or i == gold) for i in range(len(made))]
    assert TASKS[name].metric in one.process_results(document, [(-1.0, True)] * len(made))


def test_every_task_has_its_golden_record() -> None:
    assert set(GOLDEN) | {"mmlu"} == set(TASKS)


def test_mmlu_is_57_tasks_with_their_own_exemplars(tmp_path: Path) -> None:
    write(tmp_path, "mmlu", mmlu_records())
    built = harness.build(TASKS["mmlu"], tmp_path, 1)
    assert len(built) == 57 and all(len(one.task_docs) == 2 for one in built)
    one = next(b for b in built if b.config.task == "mmlu_astronomy")
    (first, *_) = requests(one, shots=1)
    head = "The following are multiple choice questions (with answers) about astronomy.\n\n"
    options = "\nA. p\nB. q\nC. r\nD. s\nAnswer:"
    assert first.args == (f"{head}astronomy 0?{options} A\n\nastronomy 1?{options}", " A")
    with pytest.raises(ValueError, match="mmlu has 1 exemplars, not 2; lower --fewshot"):
        harness.build(TASKS["mmlu"], tmp_path, 2)
    write(tmp_path, "mmlu", mmlu_records()[:4])
    with pytest.raises(ValueError, match="has no test records of anatomy"):
        harness.build(TASKS["mmlu"], tmp_path, 0)


def piqa(number: int) -> dict[str, Any]:
    return {"goal": f"g{number}", "sol1": "a", "sol2": "b", "label": number % 2}


def test_exemplars_are_fixed_and_never_scored(tmp_path: Path) -> None:
    write(tmp_path, "piqa", [piqa(i) for i in range(40)])
    seen = {}
    for shots in (0, 2, 8):
        (one,) = harness.build(TASKS["piqa"], tmp_path, shots)
        made = requests(one, shots=shots, limit=None)
        scored = {r.doc["goal"] for r in made}
        seen[shots] = made[0].args[0]
        shown = {f"g{i}" for i in range(40) if f"Question: g{i}\nAnswer: " in made[0].args[0]}
        assert len(shown) == shots and not shown & scored and len(scored) == (40 - EXEMPLARS if shots else 40)
        assert len({r.args[0].rpartition("Question:")[0] for r in made}) == 1, "the same exemplars for every document"
    assert seen[2].split("\n\n")[:2] == seen[8].split("\n\n")[:2], "more shots add to the same ones"
    assert seen[2].startswith("Question: g2\nAnswer: a\n\nQuestion: g7\nAnswer: b\n\nQuestion: ")
    with pytest.raises(ValueError, match="piqa has 8 exemplars, not 9"):
        harness.build(TASKS["piqa"], tmp_path, 9)
    with pytest.raises(ValueError, match="x has 8 records, too few to set 8 aside"):
        set_aside([{}] * 8, "x")


# ----------------------------------------------------------------------------------------------------- wrong files

TRAPS = [
    ("piqa", {**GOLDEN["piqa"][0], "label": "1"}, "label is '1', not one of 0, 1"),
    ("piqa", {**GOLDEN["piqa"][0], "label": True}, "label is True, not one of 0, 1"),
    ("hellaswag", {**GOLDEN["hellaswag"][0], "label": 2}, "label is 2, not one of '0', '1', '2', '3'"),
    ("winogrande", {**GOLDEN["winogrande"][0], "answer": "0"}, "answer is '0', not one of '1', '2'"),
    ("winogrande", {**GOLDEN["winogrande"][0], "sentence": "No blank."}, "sentence has no blank"),
    ("siqa", {**GOLDEN["siqa"][0], "label": "0"}, "label is '0', not one of '1', '2', '3'"),
    ("arc_easy", {**GOLDEN["arc_easy"][0], "gold": 3}, "gold is 3, not one of 0, 1, 2"),
    ("arc_easy", {**GOLDEN["arc_challenge"][0]}, "field 'query' is missing"),
    ("arc_challenge", {**GOLDEN["arc_challenge"][0], "answerKey": "B"}, "answerKey is 'B', not one of '1', '2', '3'"),
    ("boolq", {**GOLDEN["boolq"][0], "answer": 1}, "answer is 1, not one of False, True"),
    ("copa", {**GOLDEN["copa"][0], "question": "reason"}, "question is 'reason', not one of"),
    ("commonsense_qa", {**GOLDEN["commonsense_qa"][0], "answerKey": "F"}, "answerKey is 'F'"),
    ("winograd", {**GOLDEN["winograd"][0], "gold": 2}, "gold is 2, not one of 0, 1"),
    ("sciq", {**GOLDEN["sciq"][0], "support": None}, "support must be text, not NoneType"),
    ("lambada", {"context": "a", "continuation": " "}, "continuation is empty"),
    ("mmlu", {"subject": "s", "split": "test", "question": "q", "choices": ["a"], "answer": 0}, "at least 4 texts"),
]


@pytest.mark.parametrize(("name", "record", "words"), TRAPS)
def test_wrong_records_name_file_line_and_field(tmp_path: Path, name: str, record: Any, words: str) -> None:
    good = GOLDEN[name][0] if name in GOLDEN else {**record, "choices": list("abcd")}
    path = write(tmp_path, name, [good, record])
    with pytest.raises(ValueError) as caught:
        read_records(TASKS[name], tmp_path)
    said = str(caught.value)
    assert words in said and f"{path}, line 2: " in said and "\n" not in said, said


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*piqa.*; check --data-dir"):
        read_records(TASKS["piqa"], tmp_path)
    path = write(tmp_path, "piqa", [])
    with pytest.raises(ValueError, match="holds no records"):
        read_records(TASKS["piqa"], tmp_path)
    path.write_bytes(gzip.compress(b"x" * 999)[:20])
    with pytest.raises(ValueError, match=r"cannot be read .*fetch it again"):
        read_records(TASKS["piqa"], tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="cannot be read"):
        read_records(TASKS["piqa"], tmp_path)
    path.write_bytes(b'{"goal": 1\n')
    with pytest.raises(ValueError, match="line 1: "):
        read_records(TASKS["piqa"], tmp_path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(ValueError, match="a line must be a JSON object"):
        read_records(TASKS["piqa"], tmp_path)


def test_line_ends_and_line_separators(tmp_path: Path) -> None:
    """CRLF ends lines and leaves no trace; U+2028 and U+0085 end none."""
    strange = {"goal": "a\u2028b\x85c", "sol1": "x", "sol2": "y", "label": 0}
    path = write(tmp_path, "piqa", [strange, piqa(1)], end="\r\n")
    assert read_records(TASKS["piqa"], tmp_path) == [strange, piqa(1)]
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    assert read_records(TASKS["piqa"], tmp_path) == [strange, piqa(1)], "not compressed"
    write(tmp_path, "lambada_standard", [{"text": "one two\u2028 three"}], end="\r\n")
    assert read_records(TASKS["lambada_standard"], tmp_path) == [{"text": "one two\u2028 three"}]


# ----------------------------------------------------------------------------------------------- names and texts


def test_names(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert find_tasks(["piqa,copa", "piqa", str(text)]) == ["piqa", "copa", str(text)]
    assert find_tasks(["all"]) == list(TASKS)
    for wrong, words in (
        ("hellaswg", "did you mean hellaswag?"),
        ("wikitext", "did you mean wikitext2"),
        ("zzz", "known: "),
    ):
        with pytest.raises(ValueError, match=f"unknown task '{wrong}'; ") as caught:
            find_tasks(["piqa", wrong])
        assert words in str(caught.value)
    with pytest.raises(
        ValueError, match=r"there is no task; give --tasks with some of .*, all, quality, or text files"
    ):
        find_tasks([","])


def test_texts(tmp_path: Path) -> None:
    wiki = " \n = One = \n \n Text . \n = = Part = = \n More . \n = Two = \n \n End . \n"
    (tmp_path / "wikitext2_raw").mkdir()
    (tmp_path / TEXTS["wikitext2"]).write_bytes(gzip.compress(wiki.encode()))
    first, second = documents_of("wikitext2", tmp_path)
    assert first.startswith(" \n = One = ") and "Part" in first and second.startswith(" = Two = ")
    assert f"{first}\n{second}" == wiki, "nothing is dropped"
    with pytest.raises(ValueError, match="wikitext2 is read from a local file; give --data-dir"):
        documents_of("wikitext2", None)
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"text": "a\u2028b"}\n\n{"text": "c"}\n')
    assert documents_of(str(lines), None) == ["a\u2028b", "c"]
    lines.write_text('{"txt": "a"}\n')
    with pytest.raises(ValueError, match="line 1: not a JSON object with a field text"):
        documents_of(str(lines), None)
    plain = tmp_path / "x.txt"
    plain.write_bytes(b"a\r\nb")
    assert documents_of(str(plain), None) == ["a\nb"] == [read_text(plain)]


# -------------------------------------------------------------------------------------------------- the real files

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the evaluation files of development are not here")
@pytest.mark.parametrize("name", TASKS)
def test_the_real_files_have_the_schemas(name: str) -> None:
    counts = {"hellaswag": 10042, "winogrande": 1267, "piqa": 1838, "siqa": 1954, "mmlu": 15858, "boolq": 3270}
    found = len(read_records(TASKS[name], SHARED))
    assert found == counts.get(name, found) > 90
