"""eval.report: the three files say what the dictionary says, escape what a model wrote, and never half exist."""

import copy
import json
import math
import os
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from rich.console import Console

from diffulm.eval.report import summary, write_report

EVIL = "<script>alert('x')</script> & | a*b_c `d` [e](http://f) $g$\n\n second\x1b[2J"
VOID = {"meta", "br", "link", "img", "hr", "input"}


def score(bits, error, nats, **more):
    return {"bits_per_byte": bits, "stderr": error, "nats_per_token": nats, **more}


def nelbo(bits, error, nats, error_nats, first):
    levels = [{"level": i / 10, "nats_per_masked_token": first + i / 8} for i in range(1, 11)]
    more = {"stderr_nats_per_token": error_nats, "draws": 4, "seed": 17, "forwards": 1234, "by_level": levels}
    return score(bits, error, nats, **more, kind="NELBO")


def steps(first, speed):
    return [
        {
            "step": i,
            "tokens": 2048 * i,
            "seconds": 6.8 * i,
            "loss": first - i / 20,
            "learning_rate": 1e-3,
            "annealing": min(1.0, i / 22),
            "tokens_per_second": speed,
            "heldout": first - 1 if i % 11 == 0 else None,
        }
        for i in range(1, 45)
    ]


@pytest.fixture
def report():
    return {
        "recipe": "smollm2-cpu",
        "dtype": "float32 + autocast(bfloat16)",
        "threads": 2,
        "machine": "x86_64, 2 cores, no GPU",
        "tokens": 90112,
        "seconds": 301.2,
        "total_seconds": 800.0,
        "peak_memory_bytes": 4.1e9,
        "versions": {"diffulm": "0.1.0", "torch": "2.13.0"},
        "command": "diffulm adapt parent --text '*.txt' --minutes 5",
        "heldout": {"documents": 30, "windows": 31, "tokens": 15012, "bytes": 60345, "overlap_13gram": 0.0123},
        "parent": score(1.1111, 0.0211, 3.0999, name="smol_parent", kind="exact"),
        "parent_continued": score(1.0222, 0.0213, 2.8777, name="smol_parent", kind="exact"),
        "before": nelbo(3.8765, 0.0444, 10.7654, 0.1234, 10.0),
        "after": nelbo(2.4321, 0.0333, 6.7531, 0.0987, 5.0),
        "gain": {"nats_per_token": 4.0123, "stderr": 0.0512},
        "train": {"adapted": steps(9.0, 311.0), "continued": steps(3.2, 345.0)},
        "samples": {
            "completions": [{"prompt": "Once", "parent": " upon a time", "after": EVIL}],
            "infills": [{"prefix": EVIL, "suffix": "end", "truth": "the truth", "before": "", "after": "guess"}],
            "settings": "greedy",
        },
        "projection": {
            "parent_level_nats": 3.0999,
            "points": [[2048, 9.1], [90112, 6.75]],
            "fit": {"a": 2.7, "b": 60.1, "c": 0.23},
            "tokens_to_parent": 2.1e9,
            "statement": "Far to go.",
        },
    }


class Page(HTMLParser):
    """Collects text, tags and attributes, and checks that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.attributes, self.open = "", [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


def read(out):
    return (out / "report.md").read_text("utf-8"), (out / "report.html").read_text("utf-8")


def flat(markdown):
    """Markdown as a reader sees it: without the escapes."""
    return re.sub(r"\\(.)", r"\1", markdown)


def test_json_is_the_dictionary(report, tmp_path):
    write_report(report, tmp_path / "new" / "folder")
    text = (tmp_path / "new" / "folder" / "report.json").read_text("utf-8")
    assert json.loads(text) == report
    assert text.startswith('{\n "recipe": "smollm2-cpu",\n')
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]


def test_both_texts_give_the_numbers(report, tmp_path):
    write_report(report, tmp_path)
    markdown, page = read(tmp_path)
    for text in (flat(markdown), Page(page).text):
        for number in (
            *("1.111 ± 0.021", "1.022 ± 0.021", "3.877 ± 0.044", "2.432 ± 0.033"),  # bits per byte
            *("3.100", "2.878", "10.765 ± 0.123", "6.753 ± 0.099", "4.012 ± 0.051"),  # nats per token
            *("90,112", "5.0 minutes", "5:01", "13:20", "4.10 GB", "311", "345", "2.1e+09", "81 days", "60.1"),
            *("30 documents", "31 windows", "15,012 tokens", "60,345 bytes", "1.2%", "1,234 forward", "seed 17"),
            *("10.125", "6.250", "52%", "1.321"),
            *("smol_parent", "x86_64, 2 cores, no GPU", "float32 + autocast(bfloat16)", "2.13.0", "Far to go."),
        ):
            assert number in text, number
        assert report["command"] in text


def test_order_is_the_order_of_questions(report, tmp_path):
    write_report(report, tmp_path)
    headings = ["Held-out loss", "Completions", "Infilling", "Training", "Budget", "What it took"]
    markdown, page = read(tmp_path)
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == headings
    assert re.findall("<h2>(.*?)</h2>", page) == headings
    assert markdown.index("far from enough") < markdown.index("## Held-out loss")


def verdict(report, out):
    write_report(report, out)
    return flat(read(out)[0]).split("\n\n")[1]


def test_verdict_calls_the_nelbo_a_bound_and_the_run_short(report, tmp_path):
    said = verdict(report, tmp_path)
    assert "a NELBO, an upper bound and not an exact likelihood" in said
    assert "the true gap is at most about 1.321 bits per byte" in said
    assert "5.0 minutes of training (x86_64, 2 cores, no GPU) is far from enough for fluent text" in said
    assert "lowered the diffusion loss by 4.012" in said
    assert "from 1.111 to 1.022" in said


@pytest.mark.parametrize(
    ("nats", "words"),
    [(0.05, "no measurable difference (0.050 ± 0.051"), (-0.3, "RAISED the diffusion loss by 0.300")],
)
def test_verdict_does_not_sell_noise_or_a_loss_as_a_gain(report, tmp_path, nats, words):
    report["gain"]["nats_per_token"] = nats
    said = verdict(report, tmp_path)
    assert words in said and "lowered" not in said


def test_a_block_model_is_said_to_be_scored_by_blocks(report, tmp_path):
    report |= {"layout": "block", "block_size": 4, "ar_weight": 0.5}
    write_report(report, tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "the sum of the bounds of blocks of 4 tokens, each given the clean text before it" in text
        assert "plus 0.5 times the next-token loss of the clean copy" in text
        assert "under full attention" not in text and "expect broken sentences" in text


def test_verdict_near_and_below_the_parent(report, tmp_path):
    report["after"]["bits_per_byte"] = 1.15
    assert "far from enough" not in verdict(report, tmp_path)
    report["after"]["bits_per_byte"] = 1.01
    said = verdict(report, tmp_path)
    assert "ahead by at least about 0.101 bits per byte" in said and "gap" not in said and "%" not in said


def test_html_shows_model_text_and_runs_none_of_it(report, tmp_path):
    report["parent"]["name"] = report["command"] = EVIL
    write_report(report, tmp_path)
    markdown, html = read(tmp_path)
    page = Page(html)
    shown = EVIL.replace("\x1b", "␛")
    assert page.text.count(shown) == 6  # title, heading, verdict, completion, infill, command
    assert "script" not in page.tags and "a" not in page.tags and "\x1b" not in html
    assert "<script" not in markdown.split("```")[0] and "\x1b" not in markdown
    row = next(line for line in markdown.splitlines() if line.startswith("| Once"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 4  # three cells: the pipe of the sample is escaped
    assert r"a\*b\_c \`d\` \[e\](http://f) \$g\$<br><br> second" in row


def test_html_is_self_contained(report, tmp_path):
    write_report(report, tmp_path)
    page = Page(read(tmp_path)[1])
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), value
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert ("name", "viewport") in page.attributes
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))  # several plots on one page


def svgs(html):
    return re.findall(r"<svg.*?</svg>", html, re.DOTALL)


def test_plots_are_well_formed_follow_the_page_colour_and_hold_the_data(report, tmp_path):
    write_report(report, tmp_path)
    plots = svgs(read(tmp_path)[1])
    texts = ["".join(ET.fromstring(plot).itertext()) for plot in plots]
    titles = ("Training loss", "Loss by noise level", "Annealing", "Throughput", "Held-out loss against tokens")
    assert len(plots) == 5 and all(title in text for title, text in zip(titles, texts, strict=True))
    assert all("currentColor" in plot and "#010203" not in plot and "matplotlib.org" not in plot for plot in plots)
    assert "Diffusion" in texts[0] and "Parent (control)" in texts[0] and "held out" in texts[0]
    assert "before training" in texts[1] and "after training" in texts[1]
    markers = [plot.count("<use ") for plot in plots]
    report["before"]["by_level"] = []
    write_report(report, tmp_path)
    fewer = svgs(read(tmp_path)[1])
    assert markers[1] - fewer[1].count("<use ") >= 10  # ten points are gone
    assert fewer[0] == plots[0]  # the same numbers give the same bytes


def test_without_matplotlib_the_report_says_how_to_get_plots(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(report, tmp_path)
    markdown, html = read(tmp_path)
    assert svgs(html) == [] and "Plot in report.html" not in markdown
    assert markdown.count("pip install 'diffulm\\[plot\\]'") == 1
    assert Page(html).text.count("pip install 'diffulm[plot]'") == 1
    assert "10.125" in markdown  # the numbers by noise level are still there


@pytest.mark.parametrize("plots", [True, False])
def test_sparse_reports_are_still_written(report, tmp_path, monkeypatch, plots):
    if not plots:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    least = {key: {"bits_per_byte": report[key]["bits_per_byte"]} for key in ("parent", "before", "after")}
    write_report(least, tmp_path)
    markdown, html = read(tmp_path)
    assert "1.111" in markdown and "NELBO" in markdown and "nan" not in markdown and "None" not in markdown
    assert svgs(html) == [] and "diffulm[plot]" not in html  # nothing to plot, nothing to install
    Page(html)
    report["train"] = {"adapted": [{"step": 1, "loss": 9.0}, {"tokens": 5}], "continued": []}
    report["projection"] = {"points": [], "fit": None, "tokens_to_parent": None, "statement": "Too short to say."}
    report["after"]["by_level"] = [{"level": 0.5}]
    report["parent_continued"] = None
    write_report(report, tmp_path)
    assert "Too short to say." in read(tmp_path)[0]


def test_numbers_that_are_not_finite_are_refused_before_anything_is_written(report, tmp_path):
    for bad in (math.nan, math.inf):
        broken = copy.deepcopy(report)
        broken["train"]["adapted"][3]["loss"] = bad
        with pytest.raises(ValueError, match=r"report\.train\.adapted\[3\]\.loss is (nan|inf)"):
            write_report(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_report_without_its_figures_is_refused(report, tmp_path):
    del report["parent"], report["after"]["bits_per_byte"]
    with pytest.raises(ValueError, match="bits_per_byte of parent, after"):
        write_report(report, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["report.json", "report.md", "report.html"])
def test_a_failed_write_leaves_the_old_file_whole_and_no_litter(report, tmp_path, monkeypatch, name):
    write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rename = os.replace

    def failing(source, target):
        if str(target).endswith(name):
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    report["parent"]["bits_per_byte"] = 1.2345
    with pytest.raises(OSError, match="disk full"):
        write_report(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(before)
    assert (tmp_path / name).read_bytes() == before[name]


def test_a_lone_surrogate_in_a_sample_does_not_lose_the_report(report, tmp_path):
    report["samples"]["completions"][0]["after"] = "a\ud800b"
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == report
    assert "a\\ud800b" in read(tmp_path)[1]


def test_summary_for_the_terminal(report):
    report["before"]["kind"] = "[red]odd[/red]"
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(summary(report))
    console.file.close()
    text = console.export_text()
    for part in ("1.111 ± 0.021", "2.432 ± 0.033", "6.753 ± 0.099", "[red]odd[/red]", "upper bound", "4.012 ± 0.051"):
        assert part in text
    assert len(text.splitlines()) <= 12
