"""The text of a parity report: the verdict first, names whole where they matter, short however many layers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graftax.parity.pairing import ModulePair
from graftax.parity.records import Site
from graftax.parity.report import words
from graftax.parity.report.model import Cause, ParityReport
from graftax.parity.report.text import parity_text

from . import reports


@pytest.mark.parametrize("name", reports.ALL)
@pytest.mark.parametrize("width", [20, 80, 110, 200])
def test_every_report_fits_its_width(name: str, width: int):
    text = parity_text(reports.ALL[name](), width=width)
    assert max(map(len, text.splitlines())) <= max(64, min(width, 160))
    assert len(text.splitlines()) < 75
    assert "\x1b" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("name", reports.ALL)
def test_ascii_is_ascii_and_colour_is_asked_for(name: str):
    report = reports.ALL[name]()
    assert parity_text(report, 100, ascii=True).isascii()
    assert "\x1b[" in parity_text(report, 100, color=True)


def test_the_verdict_and_the_first_layer_come_first():
    lines = parity_text(reports.epsilon(), 110).splitlines()
    assert lines[0].startswith("Parity fails: BertForSequenceClassification (torch)")
    head = "\n".join(lines[:10])
    assert "embeddings.LayerNorm  ↔  embeddings/LayerNorm" in head
    assert "the module itself: it gets torch's input, and its output is off by 2.9e-05, 93x float32's own error" in head
    assert "epsilon: torch has eps=1e-12, Flax has epsilon=1e-06" in head
    assert "nn.LayerNorm(epsilon=1e-12)   error 2.9e-05 → 9.1e-08" in head


def test_a_cause_is_not_named_twice():
    cause = Cause("rotary theta", "", "rotary theta: 10000 in torch, 500000 in Flax", "", 1.0, 1e-8)
    assert "cause  rotary theta: 10000 in torch" in parity_text(replace(reports.epsilon(), causes=(cause,)), 120)


def test_times_add_up():
    """Passes that are parts of another time are not listed beside it."""
    assert (
        words.seconds_text(reports.passing().seconds)
        == "7.2 s (torch 0.8, Flax 6.3 including 4.4 compiling, audit 0.1)"
    )
    assert words.seconds_text({}) == ""


def test_the_code_before_a_layer_is_told_from_the_layer():
    text = parity_text(reports.functional(), 200)
    assert (
        "the code before it: the layers before give torch's outputs, and the input that arrives here is off by 1.1e-03"
        in text
    )


def test_layers_fold():
    text = parity_text(reports.epsilon(), 160)
    assert "encoder.layer.{0..11}.output.LayerNorm" in text
    assert "… 68 more, none above 1.5" in text
    assert str(reports.epsilon(400)).count("\n") < 60


def test_all_calls_are_accounted_for():
    for make in (reports.epsilon, reports.functional, reports.long_names):
        report = make()
        lines = words.layer_lines(report)
        assert sum(len(line.rows) + line.hidden for line in lines) == len(report.layers)
        shown = {id(row) for line in lines for row in line.rows}
        assert sum(line.first for line in lines) == 1
        assert all(id(row) in shown for row in report.layers if row.status == "diverges")


def test_more_divergences_than_fit_are_counted():
    rows = reports.encoder_rows(3)
    names = [f"block{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(40)]  # no numbers: nothing folds
    bad = [
        replace(
            rows[5], pair=ModulePair(n, n), site_torch=Site(n), site_flax=Site(n), out_error=1e-3, status="diverges"
        )
        for n in names
    ]
    report = replace(reports.passing(3), ok=False, layers=(*rows, *bad), first=bad[0], where="out")
    lines = words.layer_lines(report)
    assert sum(len(line.rows) + line.hidden for line in lines) == len(report.layers)
    assert "of them diverge, by up to" in parity_text(report, 120)


def test_unknown_causes_say_what_next():
    text = parity_text(reports.unknown(), 120)
    assert "its output is NaN" in text
    assert "unknown: no explanation that was tried makes the layer agree. Compare this layer's weights" in text
    with_settings = replace(reports.unknown(), settings=reports.epsilon().settings)
    assert "Start with the settings below that differ" in parity_text(with_settings, 120)


def test_reports_without_a_layer_to_blame():
    assert "do not hold the same weights" in parity_text(reports.weights_only(), 160)
    assert "1 of 65,536 values, by at most 1 ulp" in parity_text(reports.weights_only(), 160)
    text = parity_text(reports.outputs_only(), 160)
    assert "do not give the same outputs" in text
    assert "torch gives (4, 3), Flax (4, 1, 3)" in text
    assert "The layers were not compared" in parity_text(replace(reports.transposed(), layers=(), first=None), 120)
    assert "Nothing was compared" in parity_text(ParityReport(True, ()), 120)


def test_names_from_models_cannot_reach_the_terminal():
    evil = "fc\x1b[2J\u202e[bold]x[/bold]"
    report = reports.transposed()
    first = replace(report.layers[2], site_torch=Site(evil), site_flax=Site(evil), kind=evil)
    cause = Cause(evil, evil, evil, evil, 1.0, 1e-8)
    report = replace(
        report, layers=(*report.layers[:2], first), first=first, causes=(cause,), torch_name=evil, flax_name=evil,
        notes=(evil,), not_traced={evil: evil},
    )  # fmt: skip
    text = parity_text(report, 120)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[bold]x[/bold]" in text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(None, "–"), (0.0, "0"), (1.26, "1.3"), (9.96, "10"), (5234.0, "5,234"), (1.2e8, "1e8"), (float("inf"), "∞")],
)
def test_ratios_read_well(ratio: float | None, text: str):
    assert words.times(ratio) == text


def test_long_paths_keep_the_number_of_their_layer():
    path = "encoder.layer.2.attention.output.LayerNorm"
    assert words.shortened(path, 60, ".") == path
    assert words.shortened(path, 30, ".") == "…r.2.attention.output.LayerNorm"[-30:] or "2." in words.shortened(
        path, 30, "."
    )
    assert len(words.shortened(path, 30, ".")) <= 30
    assert words.shortened("model.backbone.encoder.dense", 20, ".") == "…encoder.dense"
