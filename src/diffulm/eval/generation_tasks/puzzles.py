"""Countdown: reach a target from numbers by a chain of equations (arXiv 2404.03683; arXiv 2410.14157 for diffusion)."""

from __future__ import annotations

from .. import extract
from ..schemas import Record, check_text
from .task import Generation, shown_first

#: (numbers and target, a solution), by how many numbers are given.
_EXEMPLARS = {
    3: [("4,17,30,43", "30+17=47,47-4=43"), ("6,7,8,50", "6*7=42,42+8=50"), ("9,36,20,24", "36/9=4,20+4=24"),
        ("25,3,11,64", "25*3=75,75-11=64"), ("60,12,8,13", "60/12=5,5+8=13"), ("14,2,9,19", "14*2=28,28-9=19"),
        ("90,45,33,12", "90-45=45,45-33=12"), ("5,16,11,91", "5*16=80,80+11=91")],
    4: [("4,17,30,9,52", "30+17=47,47-4=43,43+9=52"), ("6,7,8,10,40", "6*7=42,42+8=50,50-10=40"),
        ("9,36,20,5,29", "36/9=4,20+4=24,24+5=29"), ("25,3,11,4,16", "25*3=75,75-11=64,64/4=16"),
        ("60,12,8,3,39", "60/12=5,5+8=13,13*3=39"), ("14,2,9,31,50", "14*2=28,28-9=19,19+31=50"),
        ("90,45,33,8,96", "90-45=45,45-33=12,12*8=96"), ("5,16,11,7,13", "5*16=80,80+11=91,91/7=13")],
    5: [("4,17,30,9,2,26", "30+17=47,47-4=43,43+9=52,52/2=26"), ("6,7,8,10,5,45", "6*7=42,42+8=50,50-10=40,40+5=45"),
        ("9,36,20,5,3,87", "36/9=4,20+4=24,24+5=29,29*3=87"), ("25,3,11,4,9,25", "25*3=75,75-11=64,64/4=16,16+9=25"),
        ("60,12,8,3,19,20", "60/12=5,5+8=13,13*3=39,39-19=20"), ("14,2,9,31,5,10", "14*2=28,28-9=19,19+31=50,50/5=10"),
        ("90,45,33,8,40,56", "90-45=45,45-33=12,12*8=96,96-40=56"),
        ("5,16,11,7,6,78", "5*16=80,80+11=91,91/7=13,13*6=78")],
}  # fmt: skip


def _puzzle(r: Record) -> Record:
    check_text(r, "input", "output")
    if not all(part.isdigit() for part in r["input"].split(",")) or r["input"].count(",") < 2:
        raise ValueError("input must be numbers and a target, comma separated")
    return r


def solved(record: Record, answer: str) -> bool:
    """Whether equations solve a record: true, of the given numbers, each used once, ending at the target."""
    *numbers, target = map(int, record["input"].split(","))
    return extract.reaches(answer, numbers, target)


def _prompt(record: Record, shots: int) -> str:
    """Exemplars of as many numbers, then the puzzle."""
    count = record["input"].count(",")
    shown = [f"Numbers and target: {given}\nEquations: {found}" for given, found in _EXEMPLARS.get(count, [])]
    asked = f"Numbers and target: {record['input']}\nEquations:"
    return "\n\n".join([*shown_first(shown, shots, f"countdown of {count} numbers"), asked])


TASKS = [
    Generation(
        f"countdown{n}", f"countdown/cd{n}_test.jsonl.gz", _puzzle, "solved",
        lambda record, text: extract.equations(text), solved, prompt=_prompt, shots=8, until=("\n",), cap=16 * n,
        vote=True,
    )
    for n in (3, 4, 5)
]  # fmt: skip
