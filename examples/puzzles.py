"""Countdown puzzles to fine-tune on (recipe countdown-diffugpt), and the answers of a fine-tune judged by arithmetic.

python examples/puzzles.py 500000 --avoid data/countdown/cd4_test.jsonl.gz > countdown.jsonl
python examples/puzzles.py --score runs/countdown/report.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from countdown import Puzzle, is_solution, make_puzzle, read_puzzles, wilson


def puzzles(count: int, numbers: int, seed: int, avoid: set[tuple[int, ...]]) -> Iterator[Puzzle]:
    """Different puzzles of a seed's stream, in its order, none of which has the numbers and target of one to avoid."""
    seen, index = set(avoid), 0
    while count:
        puzzle = make_puzzle(seed, index, numbers)
        index += 1
        if puzzle.key not in seen:
            seen.add(puzzle.key)
            count -= 1
            yield puzzle


def solved(report: Path) -> tuple[int, int]:
    """(solved, asked): held-out puzzles that a fine-tune has answered, by any way to the target."""
    rows = json.loads(report.read_text(encoding="utf-8"))["answers"]["after"]["heldout"]
    # The question is stored as the template wrote it: the puzzle, then a separator.
    given = [re.match(r"[\d,]+", row["question"]) for row in rows]
    hits = [match is not None and is_solution(match[0], row["answer"]) for match, row in zip(given, rows, strict=True)]
    return sum(hits), len(hits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=0, help="puzzles to write")
    parser.add_argument("--numbers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--avoid", type=Path, help="a file of puzzles (jsonl.gz, input and output) not to be written")
    parser.add_argument("--score", type=Path, help="report.json of a fine-tune")
    options = parser.parse_args()
    if options.score:
        hits, asked = solved(options.score)
        low, high = wilson(hits, asked) if asked else (0.0, 1.0)
        print(f"solved {hits} of {asked} held-out puzzles ({100 * low:.1f} to {100 * high:.1f} %)")
    avoid = {puzzle.key for puzzle in read_puzzles(options.avoid, 10**9)} if options.avoid else set()
    for puzzle in puzzles(options.count, options.numbers, options.seed, avoid):
        print(json.dumps({"input": puzzle.given, "output": puzzle.solution}))


if __name__ == "__main__":
    main()
