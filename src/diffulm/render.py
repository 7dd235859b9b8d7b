"""Terminal and SVG views of denoising, and the formats of progress lines. Takes plain Python values: no tensors here.

A frame is a list of pieces, one for each position of the canvas. A piece is (text, state):

    given    text that was there from the start: prompt, prefix, suffix
    held     a token revealed at an earlier step
    new      a token revealed at this step
    masked   not known yet; its text is ignored and a block glyph stands for it

A newline is drawn as the sign ⏎ followed by a real break; other control characters are drawn as visible signs, so that
model output can neither move the cursor of a terminal nor break an XML document.
"""

from __future__ import annotations

import itertools
import math
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self
from xml.sax.saxutils import escape

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

Piece = tuple[str, str]
Line = list[Piece]  # runs of equal state

MASK = "░"
STYLES = {"given": "dim", "held": "", "new": "bold green", "masked": "dim"}
PLAIN_CELLS = 100  # text shown in one line of a log that is not a terminal


def duration(seconds: float) -> str:
    """Return `0:42`, `3:20`, `1:02:03`, or from two days on `81 days`, `2.3 years`; fractions of a second are dropped.

    Raises ValueError for a negative, infinite or NaN number.
    """
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"a duration is a finite number of seconds >= 0, not {seconds}")
    days = seconds / 86400
    if days >= 730:
        return f"{days / 365.25:,.1f} years"
    if days >= 2:
        return f"{days:.0f} days"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress_line(
    *,
    step: int,
    steps: int | None = None,
    tokens: int | None = None,
    tokens_per_second: float | None = None,
    loss: float | None = None,
    left: float | None = None,
) -> str:
    """Return `step 12/88  tokens 24,576  312 tok/s  loss 6.21  left 3:20`; what is None is left out.

    `loss` is in nats per token and may be NaN, which is shown; `left` is in seconds. An overrun budget (`left` < 0)
    shows 0:00 and an unknown one (NaN, infinity) is left out: a progress line must never end a run.
    """
    parts = [f"step {step}" if steps is None else f"step {step}/{steps}"]
    if tokens is not None:
        parts.append(f"tokens {tokens:,}")
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:,.0f} tok/s")
    if loss is not None:
        parts.append(f"loss {loss:.2f}")
    if left is not None and math.isfinite(left):
        parts.append(f"left {duration(max(0.0, left))}")
    return "  ".join(parts)


def visible(text: str, *, newline: str = "⏎\n") -> str:
    """Return `text` with its newlines replaced by `newline` and every other control character by a visible sign."""
    return "".join(newline if char == "\n" else _sign(char) for char in text)


def _sign(char: str) -> str:
    """One printable stand-in for a control, invisible or non-XML character; any other character as it is."""
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)  # U+2400.. are the pictures of the C0 controls, in order
    if code == 0x7F:
        return "␡"
    if char in "\u200c\u200d":
        return char  # joiners belong to the spelling of Indic and Persian text and of emoji
    # Cc C1 controls, Cf bidi overrides and zero-width, Cs lone surrogates, Zl/Zp separators; XML bars U+FFFE and U+FFFF
    if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} or code & 0xFFFE == 0xFFFE:
        return f"\\u{code:04x}"
    return char


def wrap(pieces: Sequence[Piece], width: int, *, mask_text: Callable[[int], str] | None = None) -> list[Line]:
    """Break pieces into lines of at most `width` terminal cells, at a space or a one-block mask where there is one.

    `mask_text(i)` is the text whose place masked piece i takes; None draws one block for each. Raises ValueError for
    an unknown state or a width below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1 cell, not {width}")
    lines: list[Line] = []
    line: list[Piece] = []  # single characters
    used, cut = 0, 0  # cells in `line`; characters of it after which it may be broken
    for char, state in _characters(pieces, mask_text):
        cells = cell_len(char)
        if char == "\n":
            lines.append(_runs(line))
            line, used, cut = [], 0, 0
            continue
        if line and used + cells > width:
            cut = len(line) if char == " " else cut or len(line)
            lines.append(_runs(line[:cut]))
            line, cut = line[cut:], 0
            used = sum(cell_len(kept) for kept, _ in line)
            if char == " ":
                continue  # the break stands for the space
        line.append((char, state))
        used += cells
        if char == " " or (state == "masked" and mask_text is None):
            cut = len(line)
    lines.append(_runs(line))
    return lines


def _characters(pieces: Sequence[Piece], mask_text: Callable[[int], str] | None) -> Iterator[Piece]:
    """Yield (character, state) of every piece as drawn; "\n" stands only for a break."""
    for i, (text, state) in enumerate(pieces):
        if state not in STYLES:
            raise ValueError(f"state of a piece must be one of {', '.join(STYLES)}, not {state!r}")
        if state == "masked":
            drawn = visible(mask_text(i)) if mask_text else MASK
            drawn = "".join(char if char in " \n" else MASK * cell_len(char) for char in drawn) or MASK
        else:
            drawn = visible(text)
        for char in drawn:
            yield char, state


def _runs(line: Sequence[Piece]) -> Line:
    return [("".join(c for c, _ in run), state) for state, run in itertools.groupby(line, key=lambda piece: piece[1])]


def _masked(pieces: Sequence[Piece]) -> int:
    return sum(state == "masked" for _, state in pieces)


def _window(lines: list[Line], rows: int) -> list[Line]:
    """At most `rows` lines: those around the last one that changed, or the last ones where none did."""
    newest = max((i for i, line in enumerate(lines) if any(state == "new" for _, state in line)), default=len(lines))
    end = min(len(lines), max(rows, newest + 1 + rows // 2))
    return lines[max(0, end - rows) : end]


class DenoisingView:
    """Draws the canvas while it is denoised: in place on a terminal, one occasional line elsewhere.

    Writes to standard error unless a console is given, because standard output carries only committed text.
    """

    def __init__(self, console: Console | None = None, *, seconds_between_lines: float = 2.0) -> None:
        self.console = console or Console(stderr=True)
        self.seconds_between_lines = seconds_between_lines  # only where the console is not a terminal
        self._live: Live | None = None
        self._last_line = -math.inf  # time.monotonic() of the last plain line
        self._held_back = ""  # the plain line not shown yet

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, auto_refresh=False, redirect_stdout=False)  # stdout is not ours
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._held_back:
            self._print_line(self._held_back)

    def update(self, *, step: int, steps: int, pieces: Sequence[Piece]) -> None:
        """Show the canvas after `step` of `steps`. Raises ValueError for an unknown state."""
        header = f"{progress_line(step=step, steps=steps)}  masked {_masked(pieces)}/{len(pieces)}"
        if self._live is None:
            text = "".join(char for char, _ in _characters(pieces, None) if char != "\n")
            line = f"{header}  {text[:PLAIN_CELLS]}{'...' if len(text) > PLAIN_CELLS else ''}"
            if time.monotonic() - self._last_line < self.seconds_between_lines:
                self._held_back = line
            else:
                self._print_line(line)
            return
        width, height = self.console.size
        rows = max(1, height - 2)  # the header, and a free row: a terminal scrolls when its last row is filled
        lines = _window(wrap(pieces, width), rows)
        texts = [Text.assemble(*((self._printable(text), STYLES[state]) for text, state in line)) for line in lines]
        for text_line in texts:
            text_line.no_wrap, text_line.overflow = True, "crop"
        self._live.update(Group(Text(header, style="bold"), *texts), refresh=True)

    def _printable(self, text: str) -> str:
        """`text` with what the stream's encoding cannot carry written as backslash escapes, and ASCII masks."""
        encoding = self.console.encoding
        if encoding.startswith("utf"):
            return text
        return text.replace(MASK, "_").replace("⏎", "\\n").encode(encoding, "backslashreplace").decode(encoding)

    def _print_line(self, line: str) -> None:
        self.console.print(Text(self._printable(line)), soft_wrap=True)
        self._last_line, self._held_back = time.monotonic(), ""


FONT_PX, CELL_PX, ROW_PX, MARGIN_PX = 15, 9, 22, 18
SVG_COLOURS = {"given": "#8b949e", "held": "#e6edf3", "new": "#7ee787", "masked": "#30405a"}


def frames_to_svg(
    frames: Sequence[Sequence[Piece]],
    *,
    title: str,
    width: int = 72,
    seconds_per_frame: float = 0.15,
    seconds_at_end: float = 3.0,
) -> str:
    """Return an animated SVG (CSS only, no script, loops) of text condensing out of masks, wrapped at `width` cells.

    Where every frame has as many pieces as the last, a mask takes the room of the text that will replace it, so the
    lines do not move. A viewer without animation, or one that asks for reduced motion, sees the last frame.
    Raises ValueError without frames, for an unknown state, or for times that are not above 0.
    """
    if not frames:
        raise ValueError("an animation needs at least one frame")
    if not (seconds_per_frame > 0 and seconds_at_end > 0):
        raise ValueError(f"seconds must be above 0: per frame {seconds_per_frame}, at the end {seconds_at_end}")
    final = frames[-1]
    still = all(len(frame) == len(final) for frame in frames)
    drawn = [wrap(f, width, mask_text=(lambda i: final[i][0]) if still else None) for f in frames]
    count = max(len(lines) for lines in drawn)
    total = seconds_per_frame * (len(frames) - 1) + seconds_at_end
    body, spans = [], set()
    for row in range(count):
        versions = [lines[row] if row < len(lines) else [] for lines in drawn]
        start = 0
        for line, same in itertools.groupby(versions):  # a line that stays as it is over several frames is drawn once
            end = start + len(list(same))
            spans.add((start, end))
            body.append(f'<g class="{_class(start, end, len(frames))}">{_svg_line(line, row + 2)}</g>')
            start = end
    spans.discard((0, len(frames)))
    at = [100 * seconds_per_frame * i / total for i in range(len(frames))] + [100.0]
    rules = [
        f"@keyframes k{a}_{b}{{0%{{opacity:{int(a == 0)}}}{at[a]:.3f}%{{opacity:1}}"
        f"{at[b]:.3f}%{{opacity:{int(b == len(frames))}}}}}"
        f".s{a}_{b}{{opacity:{int(b == len(frames))};animation:k{a}_{b} {total:.3f}s step-end infinite}}"
        for a, b in sorted(spans)
    ]
    return _svg_page(visible(title, newline=" "), width, count, "".join(rules), "\n".join(body))


def _class(start: int, end: int, frames: int) -> str:
    return "always" if (start, end) == (0, frames) else f"s{start}_{end}"


def _svg_line(line: Line, row: int) -> str:
    """The runs of one line at fixed cells: masks as rectangles, because fonts disagree about block glyphs."""
    parts, column = [], 0
    for text, state in line:
        for filled, chars in itertools.groupby(text, key=lambda char: char == MASK and state == "masked"):
            part = "".join(chars)
            word = part.strip(" ")  # viewers differ in what they do with spaces at the ends
            x = MARGIN_PX + (column + len(part) - len(part.lstrip(" "))) * CELL_PX
            y, pixels = MARGIN_PX + row * ROW_PX, cell_len(word) * CELL_PX
            column += cell_len(part)
            if filled:
                parts.append(f'<rect x="{x + 1}" y="{y - 12}" width="{pixels - 2}" height="14" rx="3"/>')
            elif word:  # textLength keeps the columns whatever monospace font the viewer has
                parts.append(f'<text class="{state}" x="{x}" y="{y}" textLength="{pixels}">{escape(word)}</text>')
    return "".join(parts)


def _svg_page(title: str, columns: int, rows: int, rules: str, body: str) -> str:
    wide, high = 2 * MARGIN_PX + columns * CELL_PX, 2 * MARGIN_PX + (rows + 1) * ROW_PX
    name = escape(title, {'"': "&quot;"})
    shown = escape(title if len(title) <= columns else title[: columns - 3] + "...")
    fills = "".join(f"text.{state}{{fill:{colour}}}" for state, colour in SVG_COLOURS.items() if state != "masked")
    return f"""<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" role="img" aria-label="{name}"\
 width="{wide}" height="{high}" viewBox="0 0 {wide} {high}">
<title>{name}</title>
<style>text{{font:{FONT_PX}px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre}}\
text.new{{font-weight:bold}}.title{{fill:#8b949e}}rect{{fill:{SVG_COLOURS["masked"]}}}.card{{fill:#0d1117}}{fills}{rules}\
@media (prefers-reduced-motion:reduce){{g{{animation:none!important}}}}</style>
<rect class="card" width="{wide}" height="{high}" rx="10"/>
<text class="title" x="{MARGIN_PX}" y="{MARGIN_PX + 10}">{shown}</text>
{body}
</svg>
"""
