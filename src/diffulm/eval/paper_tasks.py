"""The paper's tasks as the released scripts write them: prompts from local files, pieces tokenised apart and joined.

A piece has the tokens it would have alone; no space is put between pieces.

    task        given                                     scored or written
    lambada     the line without its last word            the last word: its true number of tokens, as many steps, drawn
                                                          at temperature 1; a hit if the text is the word
    hellaswag   activity: ctx_a Ctx_b, brackets removed   the ending, with no space before it
    winogrande  the sentence up to the blank              the option, then the rest of the sentence
    piqa        Question: goal, Answer: and a space       a space and the solution
    siqa        Question: context question, Answer: and   the answer, with no further space
                a space
    roc         sentences 1 and 2; 4 and 5                sentence 3: its true number of tokens; ROUGE of 1,000
    humaneval_  the code before and behind a line         the line: its true number of tokens; the function's tests, if
    infilling                                             all has at most 1,000 tokens
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..tokenizer import encode, special_tokens
from .generation_tasks import GENERATION
from .protocol import PaperProtocol, Text, fitted
from .schemas import Record
from .store import content_key
from .tasks import TASKS, Local, Task


@dataclass(frozen=True)
class Question:
    """A prompt and its options, each in pieces; `special`: tokenised with the tokenizer's special tokens."""

    prompt: str
    options: tuple[tuple[str, ...], ...]
    gold: int
    special: bool


def hellaswag(r: Record) -> Question:
    query = _clean(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}")
    return Question(query, tuple((_clean(ending),) for ending in r["endings"]), int(r["label"]), True)


def _clean(text: str) -> str:
    """Without the marks of the WikiHow half."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def winogrande(r: Record) -> Question:
    before, _, after = r["sentence"].partition("_")
    options = tuple((r[name], after.strip()) for name in ("option1", "option2"))
    return Question(before, options, int(r["answer"]) - 1, False)


def piqa(r: Record) -> Question:
    options = tuple((" " + r[name],) for name in ("sol1", "sol2"))
    return Question(f"Question: {r['goal']}\nAnswer: ", options, int(r["label"]), True)


def siqa(r: Record) -> Question:
    options = tuple((r[f"answer{letter}"],) for letter in "ABC")
    return Question(f"Question: {r['context']} {r['question']}\nAnswer: ", options, int(r["label"]) - 1, False)


def story(r: Record) -> Record:
    """A five-sentence story with its right ending, in the file's own fields."""
    sentences = [r[f"InputSentence{i}"] for i in range(1, 5)]
    ending = r[f"RandomFifthSentenceQuiz{int(r['AnswerRightEnding'])}"]
    if not all(isinstance(s, str) and s for s in (*sentences, ending)):
        raise TypeError("the sentences of a story must be text")
    return {"sentences": [*sentences, ending]}


CHOICES: dict[str, Callable[[Record], Question]] = {
    "hellaswag": hellaswag, "winogrande": winogrande, "siqa": siqa, "piqa": piqa,
}  # fmt: skip
_ROC = Task("roc", "", "roc_cloze/cloze_test_val__spring2016.jsonl.gz", "validation", story)
#: The task whose answers are programs.
CODE = "humaneval_infilling"
FILES: dict[str, Local] = {
    "lambada": TASKS["lambada_standard"], "roc": _ROC, CODE: GENERATION[CODE], **{name: TASKS[name] for name in CHOICES}
}  # fmt: skip
#: The tasks, in the order in which the released main() runs them: `leaked_steps` depends on it.
ORDER = ("lambada", "hellaswag", CODE, "roc", "winogrande", "siqa", "piqa")
#: Tokens above which the script leaves code out (`skip_long`).
LONG = 1000


@dataclass(frozen=True)
class Joiner:
    """Text to ids as the scripts join it."""

    tokenizer: Any
    protocol: PaperProtocol
    length: int

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a piece; special: with what the tokenizer adds to a text by itself."""
        if not special:
            return encode(self.tokenizer, text, plain=True)
        return list(self.tokenizer(text, verbose=False, split_special_tokens=True)["input_ids"])

    def front(self, text: str, *, special: bool) -> list[int]:
        """Ids of what begins a text, our start token before them unless `no_start`."""
        if self.protocol.no_start:
            return self.ids(text, special=special)
        return [special_tokens(self.tokenizer).bos, *self.ids(text)]

    def options(self, question: Question) -> list[Text]:
        """Each option behind the prompt. ValueError for one without tokens, or longer than the model."""
        prefix = self.front(question.prompt, special=question.special)
        extra = question.special and self.protocol.extra_bos
        name = content_key(question.prompt, question.options)
        found = []
        for i, pieces in enumerate(question.options):
            new = [token for piece in pieces for token in self.ids(piece, special=extra)]
            if not new:
                raise ValueError(f"an option of {question.prompt[:60]!r} has no tokens; mend the data")
            key = name if self.protocol.shared_noise else f"{name} {i}"
            text = Text((*prefix, *new), len(prefix), len(prefix) + len(new), key)
            found.append(fitted(text, self.length))
        return found

    def last_word(self, line: str) -> Text:
        """A LAMBADA line with its last word open; the number of its tokens is that of the line less the rest."""
        line = line.strip()
        whole, before = (self.front(t, special=True) for t in (line, " ".join(line.split()[:-1])))
        return fitted(Text(tuple(whole), min(len(before), len(whole)), len(whole), line), self.length)

    def middle(self, sentences: Sequence[str]) -> Text:
        """A story with its third sentence open."""
        pieces = (f"{sentences[0]} {sentences[1]}", sentences[2], f"{sentences[3]} {sentences[4]}")
        return self._hole(pieces, "\n".join(sentences))

    def line(self, r: Record) -> Text | None:
        """A program with one line open; None where it is too long for the script (`skip_long`)."""
        pieces = (r["prompt"], r["canonical_solution"], r["suffix"])
        if self.protocol.skip_long and sum(len(self.ids(piece)) for piece in pieces) > LONG:
            return None
        return self._hole(pieces, content_key(*pieces))

    def _hole(self, pieces: tuple[str, str, str], key: str) -> Text:
        """The second of three pieces open, each tokenised by itself."""
        before, between, behind = self.front(pieces[0], special=False), self.ids(pieces[1]), self.ids(pieces[2])
        return fitted(Text((*before, *between, *behind), len(before), len(before) + len(between), key), self.length)
