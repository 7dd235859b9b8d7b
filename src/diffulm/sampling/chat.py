"""A conversation with a diffusion model: history, answers as they become final, spans of an answer written again.

The chat template says what stands before an answer and what ends it (template.py). An answer is a completion behind
that text; one that has to begin, end or hold something, or be of a given length, is a hole between given text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..template import Message, Turn, check_messages, end_token, open_turn, use_template
from ..tokenizer import decode, encode, encode_after, special_tokens
from .draw import Draw
from .end import EndOfText
from .fill import Model, Watch, completions, given_ids, unmask
from .infill import infill
from .names import policy_from_name
from .policies import Policy

#: Tokens of an answer unless something else is asked for, where the window has twice that.
MAX_TOKENS = 128


_REWRITE = re.compile(r"(?P<old>.+?)\s*=>\s*(?P<tokens>\d+|auto)(?: tokens?)?", re.DOTALL)


def read_rewrite(text: str) -> tuple[str, int | Literal["auto"]]:
    """(old text, tokens) of `old text => 8 tokens`, `=> 8` or `=> auto`. ValueError for anything else."""
    found = _REWRITE.fullmatch(text.strip())
    if not found:
        raise ValueError("write /infill old text => N tokens, where N is a number or auto")
    return found["old"], "auto" if found["tokens"] == "auto" else int(found["tokens"])


@dataclass
class Chat:
    """A conversation. `say` answers, `rewrite` writes a span of the last answer again, `reset` begins anew.

    max_tokens: room for an answer, tokens; None: 128, at most half the trained length. `prefix` begins every answer,
    `suffix` ends it, `must` are words that it holds, `must_not` such that it does not; `length` is its exact number of
    generated tokens ("auto": the likeliest up to max_tokens, at the cost of trying them all, and the rule where a
    suffix or words are asked for without a length).
    """

    model: Model
    system: str = ""
    max_tokens: int | None = None
    steps: int | None = None
    policy: str | Policy = "confidence"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    prefix: str = ""
    suffix: str = ""
    must: Sequence[str] = ()
    must_not: Sequence[str] = ()
    length: int | Literal["auto"] | None = None
    messages: list[Message] = field(default_factory=list)
    dropped: int = 0

    def __post_init__(self) -> None:
        use_template(self.model.tokenizer)
        if self.max_tokens is None:
            self.max_tokens = min(MAX_TOKENS, int(self.model.config["trained_length"]) // 2)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        self.reset()

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.messages = [{"role": "system", "content": self.system}] if self.system.strip() else []
        self.dropped = 0

    def say(self, text: str, watch: Watch | None = None) -> Iterator[str]:
        """The answer to a user's message, in pieces of final text.

        The turn is remembered when the last piece is taken, unless the answer is empty. The oldest turns are left out
        for good where the window would be too short for the answer; `dropped` counts them. Raises ValueError, and
        remembers nothing, when the message alone leaves no room.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        check_messages(asked)
        after = self.suffix if self._is_constrained else None
        kept, turn = self._fitted(asked, self.prefix, after, self._room(self.length))
        answer = ""
        for piece in self._constrained(turn, watch) if self._is_constrained else self._streamed(turn, watch):
            answer += piece
            yield piece
        if answer.strip():
            self._remember(asked, kept, answer)

    def rewrite(self, old: str, tokens: int | Literal["auto"], watch: Watch | None = None) -> str:
        """The last answer with `old` (its first occurrence) written again in `tokens` tokens; it replaces the answer.

        Both sides are context: what stands behind the span is given too. The oldest turns give way to it as in `say`.
        ValueError where there is no such text, or for a block checkpoint.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("there is no answer yet whose text could be written again")
        answer = self.messages[-1]["content"]
        before, found, after = answer.partition(old)
        if not old or not found:
            raise ValueError(f"the last answer does not hold {old!r}; quote it as it stands")
        asked = self.messages[:-1]
        kept, turn = self._fitted(asked, before, after, self._room(tokens))
        made = self._hole(turn, before, after, tokens, watch)
        if not made.strip():
            raise ValueError(
                "nothing but space came out, so the answer stays; give the span more tokens, or another seed"
            )
        self._remember(asked, kept, made)
        return made

    def _remember(self, asked: list[Message], kept: list[Message], answer: str) -> None:
        """What is left of the messages that were asked, and the answer."""
        self.dropped += (len(asked) - len(kept)) // 2
        self.messages = [*kept, {"role": "assistant", "content": answer}]

    def _room(self, length: int | str | None) -> int:
        """Tokens that may be generated: just so many where a length was asked for."""
        return length if isinstance(length, int) else self.max_tokens or 1

    @property
    def _is_constrained(self) -> bool:
        return bool(self.suffix or self.must or self.must_not or self.length is not None)

    def _fitted(self, messages: list[Message], before: str, after: str | None, room: int) -> tuple[list[Message], Turn]:
        """(messages, open turn) without the oldest turns that leave no room for an answer of `room` tokens between
        `before` and, in a hole, `after` (else None)."""
        tokenizer, limit = self.model.tokenizer, int(self.model.config["trained_length"])
        first = int(messages[0]["role"] == "system")
        kept = list(messages)
        while True:
            turn = open_turn(tokenizer, kept)
            given = 1 + len(encode(tokenizer, turn.context + before))
            given += len(encode(tokenizer, self._behind(turn, after))) if after is not None else 0
            if given + room <= limit:
                return kept, turn
            if len(kept) < first + 3:
                lower = "the length" if isinstance(self.length, int) or after else "--max-tokens"
                raise ValueError(
                    f"the message needs {given} tokens and the answer {room}, and the model was trained on {limit}; "
                    f"shorten the message or lower {lower}"
                )
            del kept[first : first + 2]

    def _streamed(self, turn: Turn, watch: Watch | None) -> Iterator[str]:
        """Pieces of an answer as they become final: without half a character, up to the first end token."""
        model, tokenizer, special = self.model, self.model.tokenizer, special_tokens(self.model.tokenizer)
        assert self.max_tokens is not None
        given = given_ids(model, [*encode(tokenizer, turn.context), *encode_after(tokenizer, self.prefix)])
        # A block layout's last block may have room for more than was asked; that is not shown.
        limit, asked = int(model.config["trained_length"]), self.max_tokens
        canvas = completions([given], asked, special, model.layout, limit).to(model.device)
        policy = policy_from_name(self.policy) if isinstance(self.policy, str) else self.policy
        ends = (end_token(tokenizer, turn), special.eos, special.bos)
        first = 1 + len(given)
        steps = self.max_tokens if self.steps is None else self.steps
        shown, upto, ids = "", first, canvas.ids
        if self.prefix:
            yield self.prefix
        for step in unmask(
            model, canvas, steps=steps, tokens=asked, policy=policy, seeds=[self._turn_seed], end=EndOfText(ends),
            draw=Draw(self.temperature, self.top_k, self.top_p),
        ):  # fmt: skip
            ids = step.ids
            if watch is not None:
                watch(canvas, step)
            done = min(int(step.committed_upto[0]), first + asked)
            if getattr(policy, "remasks", None) is False and done > upto:
                upto = done
                text = _text_of(tokenizer, given, ids[0, first:upto].tolist(), ends)
                # A character of several tokens shows as a replacement sign until its last one stands.
                text = text.rstrip("\ufffd") if upto < first + asked else text
                if text.startswith(shown) and len(text) > len(shown):
                    yield text[len(shown) :]
                    shown = text
        whole = _text_of(tokenizer, given, ids[0, first : first + asked].tolist(), ends)
        if whole.startswith(shown) and len(whole) > len(shown):
            yield whole[len(shown) :]

    def _constrained(self, turn: Turn, watch: Watch | None) -> Iterator[str]:
        """An answer between given text, whole."""
        if self.length is None and not (self.suffix or self.must):
            tokens: int | Literal["auto"] = self.max_tokens or 1
        else:
            tokens = "auto" if self.length is None else self.length
        yield self._hole(turn, self.prefix, self.suffix, tokens, watch, self.must, self.must_not)

    def _hole(
        self, turn: Turn, before: str, after: str, tokens: int | Literal["auto"], watch: Watch | None,
        must: Sequence[str] = (), must_not: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """before + a fill of that many tokens + after, as an answer: its end stands behind it and nowhere inside."""
        tokenizer = self.model.tokenizer
        end = turn.end or str(tokenizer.eos_token)
        # What ends a text may not be in it; the start token too, which opens the next one.
        ends = dict.fromkeys([end, str(tokenizer.eos_token), str(tokenizer.bos_token or end)])
        filled = infill(
            self.model, turn.context + before, self._behind(turn, after), length=tokens,
            max_length=self.max_tokens or 1, must=must, must_not=(*must_not, *ends), steps=self.steps,
            policy=self.policy, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            seed=self._turn_seed, watch=watch,
        )  # fmt: skip
        return before + filled.fills[0] + after

    def _behind(self, turn: Turn, after: str) -> str:
        """What stands behind the hole of an answer: its end too, but for a block, which sees nothing there."""
        if self.model.layout.name != "full":
            return after
        return after + turn.answer + (turn.end or str(self.model.tokenizer.eos_token))

    @property
    def _turn_seed(self) -> int:
        return self.seed * 1_000_003 + len(self.messages) + 2 * self.dropped


def _text_of(tokenizer: Any, given: list[int], new: list[int], ends: Sequence[int]) -> str:
    """Text of the new tokens up to the first end, as it stands behind the given ones."""
    cut = next((i for i, token in enumerate(new) if token in ends), len(new))
    before, whole = decode(tokenizer, given), decode(tokenizer, given + new[:cut])
    return whole[len(before) :] if whole.startswith(before) else decode(tokenizer, new[:cut])
