"""render: every piece is drawn, nothing a model emits can act as a control, and the SVG is a well-formed animation."""

import io
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from diffulm.render import MASK, DenoisingView, duration, frames_to_svg, progress_line, visible, wrap

SVG = "{http://www.w3.org/2000/svg}"
FRAMES = [
    [("Once", "given"), (" upon", "masked"), (" a", "masked"), (" time", "masked")],
    [("Once", "given"), (" upon", "masked"), (" a", "new"), (" time", "masked")],
    [("Once", "given"), (" upon", "new"), (" a", "held"), (" time", "new")],
]


def terminal(*, width=40, height=10, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n", write_through=True)
    console = Console(
        file=file, force_terminal=True, width=width, height=height, color_system="standard", legacy_windows=False
    )
    return console, lambda: file.buffer.getvalue().decode(encoding)


def plain(line):
    return "".join(text for text, _ in line)


def test_duration():
    assert [duration(s) for s in (0, 59.9, 200, 3723, 172_800, 86400 * 3652.5)] == [
        "0:00",
        "0:59",
        "3:20",
        "1:02:03",
        "2 days",
        "10.0 years",
    ]
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite number of seconds"):
            duration(bad)


def test_progress_line():
    full = progress_line(step=12, steps=88, tokens=24576, tokens_per_second=311.7, loss=6.214, left=200.4)
    assert full == "step 12/88  tokens 24,576  312 tok/s  loss 6.21  left 3:20"
    assert progress_line(step=3) == "step 3"
    assert progress_line(step=3, loss=math.nan, left=-0.5) == "step 3  loss nan  left 0:00"
    assert progress_line(step=3, left=math.inf) == "step 3"


def test_visible_leaves_no_control_characters():
    shown = visible("a\nb\tc\x1b[31m\x7f\x85\u202e\u2028\ud800\uffff é 字 \u200d")
    assert shown == "a⏎\nb␉c␛[31m␡\\u0085\\u202e\\u2028\\ud800\\uffff é 字 \u200d"
    assert visible("a\nb", newline="\n") == "a\nb"


def test_wrap_keeps_every_character_and_the_width():
    pieces = [("The quick", "given"), (" brown", "held"), ("", "masked"), (" fox jumps", "new"), ("x" * 25, "held")]
    lines = wrap(pieces, 10)
    assert all(len(plain(line)) <= 10 for line in lines)
    whole = "The quick brown" + MASK + " fox jumps" + "x" * 25
    assert "".join(map(plain, lines)).replace(" ", "") == whole.replace(" ", "")
    assert plain(lines[0]).rstrip() == "The quick"  # broken at a space, which the break stands for
    assert {state for line in lines for _, state in line} == {"given", "held", "masked", "new"}


def test_wrap_breaks_at_newlines_counts_wide_characters_and_masks():
    assert [plain(line) for line in wrap([("a\nb", "held")], 10)] == ["a⏎", "b"]
    assert [plain(line) for line in wrap([("字" * 5, "held")], 4)] == ["字字", "字字", "字"]
    assert [plain(line) for line in wrap([("ignored", "masked")] * 7, 5)] == [MASK * 5, MASK * 2]
    assert [plain(line) for line in wrap([("?", "masked")], 9, mask_text=lambda i: " two\n")] == [
        " " + MASK * 4,
        "",
    ]  # the newline itself is a block, then the break
    assert wrap([], 5) == [[]]


def test_wrap_refuses_bad_input():
    with pytest.raises(ValueError, match="given, held, new, masked"):
        wrap([("a", "revealed")], 10)
    with pytest.raises(ValueError, match="width"):
        wrap([("a", "held")], 0)


def test_view_on_a_terminal_shows_header_masks_and_states():
    console, output = terminal()
    with DenoisingView(console) as view:
        view.update(step=1, steps=2, pieces=FRAMES[1])
        first = output()
        view.update(step=2, steps=2, pieces=FRAMES[2])
    assert "step 1/2  masked 2/4" in first
    assert f"\x1b[2mOnce\x1b[0m\x1b[2m{MASK}\x1b[0m\x1b[1;32m a\x1b[0m" in first
    assert "step 2/2  masked 0/4" in output()[len(first) :]
    assert "\x1b[1;32m upon\x1b[0m a\x1b[1;32m time" in output()


def test_view_passes_no_control_sequence_or_markup_of_the_model():
    console, output = terminal()
    with DenoisingView(console) as view:
        view.update(step=1, steps=1, pieces=[("\x1b[2J\r\x07[bold]x[/bold]", "held")])
    assert "\x1b[2J" not in output() and "\x07" not in output()
    assert "␛[2J␍␇[bold]x[/bold]" in output()


def test_view_leaves_standard_output_alone(capsys):
    console, output = terminal()
    with DenoisingView(console) as view:
        view.update(step=1, steps=2, pieces=FRAMES[1])
        print("committed text")
    assert capsys.readouterr().out == "committed text\n"
    assert "committed" not in output()


def test_view_fits_the_terminal_and_follows_the_newest_change():
    def shown(states):
        console, output = terminal(width=20, height=8)
        with DenoisingView(console) as view:
            view.update(step=1, steps=9, pieces=[(f"line{i}\n", state) for i, state in enumerate(states)])
            return re.findall(r"line\d+", output())

    states = ["held"] * 40
    assert shown(states) == [f"line{i}" for i in range(35, 40)]  # 8 rows: header, a free one, 5 lines, an empty last
    states[20] = "new"
    around = shown(states)
    assert "line20" in around and len(around) == 6
    states[20], states[0] = "held", "new"
    assert shown(states)[0] == "line0"


def test_view_without_a_terminal_prints_occasional_lines_and_the_last():
    file = io.StringIO()
    with DenoisingView(Console(file=file, width=40), seconds_between_lines=3600) as view:
        for step in range(1, 51):
            view.update(step=step, steps=50, pieces=FRAMES[1] if step < 50 else FRAMES[2])
    lines = file.getvalue().splitlines()
    assert lines == [
        f"step 1/50  masked 2/4  Once{MASK} a{MASK}",
        "step 50/50  masked 0/4  Once upon a time",
    ]
    assert "\x1b" not in file.getvalue()


def test_view_survives_a_stream_that_is_not_utf8():
    console, output = terminal(encoding="ascii")
    with DenoisingView(console) as view:
        view.update(step=1, steps=1, pieces=[("é\n", "held"), ("", "masked")])
    assert "\\xe9\\n" in output() and "_" in output()


def test_svg_is_well_formed_and_escapes_what_it_is_given():
    evil = '<script>alert("1")</script> & ]]> \x00\x1b'
    root = ET.fromstring(frames_to_svg([[(evil, "held")]], title=f'"{evil}', width=80))
    assert root.tag == f"{SVG}svg"
    assert root.get("aria-label") == root.findtext(f"{SVG}title") == '"' + visible(evil)
    assert not list(root.iter(f"{SVG}script"))
    assert visible(evil) in [element.text for element in root.iter(f"{SVG}text")]


def test_svg_is_self_contained_and_sized_from_its_content():
    svg = frames_to_svg(FRAMES, title="t", width=30)
    assert re.findall(r"https?://[^\"']+", svg) == ["http://www.w3.org/2000/svg"]
    assert "<script" not in svg and "@import" not in svg and "url(" not in svg
    tall = frames_to_svg([[("a\n" * 20, "held")]], title="t", width=30)
    height = {name: float(ET.fromstring(s).get("height", 0)) for name, s in (("short", svg), ("tall", tall))}
    assert height["tall"] > height["short"] + 300
    root = ET.fromstring(tall)
    edge = [float(e.get("y")) for e in root.iter(f"{SVG}text")]
    assert max(edge) < height["tall"]


def visible_at(svg, percent):
    """The text shown at a point of the loop, computed from the document's own keyframes."""
    root = ET.fromstring(svg)
    rules = dict(re.findall(r"@keyframes k(\w+)\{(.*?\})\}", root.findtext(f"{SVG}style")))
    texts, masks = [], 0
    for group in root.iter(f"{SVG}g"):
        name = group.get("class", "")
        if name == "always":
            opacity = "1"
        else:
            steps = [(float(at), value) for at, value in re.findall(r"([\d.]+)%\{opacity:(\d)\}", rules[name[1:]])]
            opacity = [value for at, value in steps if at <= percent][-1]
        if opacity == "1":
            texts += [e.text for e in group.iter(f"{SVG}text")]
            masks += sum(float(e.get("width")) + 2 for e in group.iter(f"{SVG}rect")) // 9
    return "".join(texts), masks


def test_svg_shows_each_frame_in_its_turn_and_ends_on_the_last():
    svg = frames_to_svg(FRAMES, title="t", width=30, seconds_per_frame=1, seconds_at_end=2)  # 25%, 25%, 50%
    assert visible_at(svg, 10) == ("Once", 9)  # a mask takes the room of the word to come: upon, a, time
    assert visible_at(svg, 30) == ("Oncea", 8)
    for late in (50.1, 99.9):
        assert visible_at(svg, late) == ("Onceuponatime", 0)
    assert "4.000s step-end infinite" in svg


def test_svg_lines_do_not_move_while_masks_are_filled():
    words = [f" {word}" for word in re.findall(r"\w+", "a few words that take more than one line of twenty cells")]
    both = [[(word, state) for word in words] for state in ("masked", "held")]
    root = ET.fromstring(frames_to_svg(both, title="t", width=20))
    texts = [e for e in root.iter(f"{SVG}text") if e.get("class") == "held"]
    held = {float(e.get("y")) - 12: (float(e.get("x")) - 18) / 9 + len(e.text) for e in texts}
    masks: dict[float, float] = {}
    for e in root.iter(f"{SVG}rect"):
        if e.get("class") != "card":
            end = (float(e.get("x")) + float(e.get("width")) + 1 - 18) / 9
            masks[float(e.get("y"))] = max(end, masks.get(float(e.get("y")), 0))
    assert len(held) == 3 and held == masks  # as many lines, at the same places, ending in the same column


def test_svg_rows_that_come_and_go():
    frames = [[("one\ntwo", "new")], [("one", "held")]]
    svg = frames_to_svg(frames, title="t", seconds_per_frame=1, seconds_at_end=1)
    assert visible_at(svg, 20)[0] == "one⏎two"
    assert visible_at(svg, 80)[0] == "one"


def test_svg_refuses_bad_input():
    with pytest.raises(ValueError, match="at least one frame"):
        frames_to_svg([], title="t")
    with pytest.raises(ValueError, match="above 0"):
        frames_to_svg(FRAMES, title="t", seconds_per_frame=0)
    with pytest.raises(ValueError, match="state"):
        frames_to_svg([[("a", "x")]], title="t")


def test_import_is_light():
    code = "import sys, diffulm.render; print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
