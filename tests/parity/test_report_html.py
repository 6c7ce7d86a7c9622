"""The page of a parity report: whole HTML, nothing from elsewhere, every name escaped, every link leads somewhere."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from graftax.errors import StorageError
from graftax.parity.pairing import ModulePair
from graftax.parity.records import Site
from graftax.parity.report import view
from graftax.parity.report.html import parity_html, save_parity_html
from graftax.parity.report.model import Cause, OutputRow, ParityReport, SettingRow, WeightRow

from . import reports

VOID = {"meta", "br", "hr", "img", "input", "link", "circle", "path", "line", "rect", "polygon"}


class Page(HTMLParser):
    """Checks nesting, gathers ids, links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src"):
                self.links.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


@pytest.mark.parametrize("name", reports.ALL)
def test_the_page_is_whole_and_self_contained(name: str):
    report = reports.ALL[name]()
    text = parity_html(report)
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    # every call has its line, and a mark in the chart for each of its two errors
    assert sum(i.startswith("call-") for i in page.ids) == len(report.layers)
    drawn = view.chart(report)
    assert drawn is not None
    compared = [row for row in report.layers if row.status != "not compared"]
    assert len(drawn.points) == 2 * len(compared)
    assert all(drawn.left <= p.x <= drawn.right and 0 < p.y <= drawn.bottom for p in drawn.points)
    words = " ".join("".join(page.text).split())
    assert ("parity holds" if report.ok else "parity fails") in words
    assert ("Where it first diverges" in words) == (report.first is not None)
    if report.first is not None:
        assert words.count("first divergence") == 2  # in the chart, and in the trees
        assert text.count('class="guilty"') == 1


def test_the_guilty_step_is_the_right_one():
    steps = [part.split("</li>")[0] for part in parity_html(reports.functional()).split('<li class="')[1:]]
    guilty = next(step for step in steps if step.startswith("guilty"))
    assert "the code before it" in guilty
    steps = [part.split("</li>")[0] for part in parity_html(reports.epsilon()).split('<li class="')[1:]]
    assert "the module itself" in next(step for step in steps if step.startswith("guilty"))


def test_every_name_is_escaped():
    evil = '</style><script>alert("x")</script>\x1b&'
    report = reports.transposed()
    first = replace(
        report.layers[2], pair=ModulePair(evil, evil), site_torch=Site(evil), site_flax=Site(evil), kind=evil, text=evil
    )
    report = ParityReport(
        False,
        (OutputRow(evil, (2,), 1.0, 1e-7, 1e7, False, {evil: 1.0}, evil),),
        (*report.layers[:2], first, replace(first, site_torch=Site(f"{evil}.0.{evil}"))),
        first,
        "out",
        (Cause(evil, evil + "x", evil, evil, 1.0, 1e-8),),
        (WeightRow(evil, 1, 2, 1.0, evil),),
        (SettingRow(evil, evil, evil, evil, evil, "error", evil),),
        {evil: evil},
        (evil,),
        seconds={evil: 1.0},
        torch_name=evil,
        flax_name=evil,
    )
    text = parity_html(report)
    assert "<script" not in text
    assert "\x1b" not in text
    assert text.count("</style>") == 1
    Page(text)


def test_reports_without_layers_have_no_chart():
    report = replace(reports.transposed(), layers=(), first=None, where=None)
    assert view.chart(report) is None
    assert "<svg" not in parity_html(report)
    Page(parity_html(ParityReport(True, ())))


def test_trees_stand_side_by_side():
    """Containers appear when they are entered, the deepest beside each other; calls in order."""
    [block] = [b for b in view.blocks(reports.passing(3)) if b.torch == "encoder.layer.1"]
    assert block.flax == "encoder/layer_1"
    lines = [(n.torch_depth, n.torch, n.flax_depth, n.flax, n.row is not None) for n in block.nodes]
    assert lines[:5] == [
        (0, "attention", 0, "attention", False),
        (1, "self", 1, "self", False),
        (2, "query", 2, "query", True),
        (2, "key", 2, "key", True),
        (2, "value", 2, "value", True),
    ]
    assert [n.number for n in block.nodes if n.row] == list(range(11, 19))


def test_trees_of_unlike_depth():
    rows = reports.encoder_rows(0)[:1]
    one, two = (
        replace(rows[0], pair=ModulePair(t, f), site_torch=Site(t), site_flax=Site(f))
        for t, f in (("net.0.fc", "deep/er/net/Dense_0"), ("net.0.out.proj", "deep/er/net/Dense_1"))
    )
    container = replace(
        one, pair=ModulePair("net.0.out", "deep/er/net", leaf=False), site_torch=Site("net.0.out"),
        site_flax=Site("deep/er/net"),
    )  # fmt: skip
    [block] = view.blocks(replace(reports.passing(0), layers=(one, two, container)))
    lines = [(n.torch, n.flax, n.number) for n in block.nodes]
    assert lines == [("fc", "Dense_0", 0), ("out", "deep/er/net", 2), ("proj", "Dense_1", 1)]


def test_the_model_itself_is_in_the_trees_and_not_in_the_chart():
    """Containers begin before their layers: they stand where they are entered, and break no line."""
    rows = reports.encoder_rows(2)
    model, block = (
        replace(rows[0], pair=ModulePair(t, f, leaf=False), site_torch=Site(t), site_flax=Site(f))
        for t, f in (("", ""), ("encoder.layer.1", "encoder/layer_1"))
    )
    report = replace(reports.passing(2), layers=(model, *rows[:11], block, *rows[11:]))
    found = view.blocks(report)
    assert [b.torch for b in found] == [
        "",
        "embeddings",
        "encoder.layer.0",
        "encoder.layer.1",
        "pooler.dense",
        "classifier",
    ]
    assert [node.number for b in found for node in b.nodes if node.row] == list(range(len(report.layers)))
    drawn = view.chart(report)
    assert drawn is not None
    assert drawn.free.count("M") == 1
    assert min(point.row for point in drawn.points) == 1
    Page(parity_html(report))


def test_save_replaces_only_reports(tmp_path: Path):
    path = tmp_path / "out.html"
    reports.passing().save_html(path)
    first = path.read_text("utf-8")
    save_parity_html(reports.epsilon(), path)
    assert path.read_text("utf-8") != first
    assert [p.name for p in tmp_path.iterdir()] == ["out.html"]
    path.write_text("my thesis")
    with pytest.raises(StorageError, match="is not a parity report"):
        reports.passing().save_html(path)
    assert path.read_text() == "my thesis"
    with pytest.raises(StorageError, match="cannot write"):
        reports.passing().save_html(tmp_path / "gone" / "out.html")
