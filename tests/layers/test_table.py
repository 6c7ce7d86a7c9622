"""The table as data and as text."""

from __future__ import annotations

import json

from graftax.layers import LAYERS, layer_rows, layers_text


def test_rows_are_plain_data_and_say_what_matters():
    rows = layer_rows()
    assert [row["name"] for row in rows] == [layer.name for layer in LAYERS]
    assert len({row["name"] for row in rows}) == len(rows)
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert row["layouts"], row["name"]
        assert row["exactness"].startswith(("exact", "measured", "kernels exact", "kernel and u exact")), row["name"]
        assert row["note"].endswith("."), row["name"]
        for refused in row["refused"]:
            assert refused["what"]
            assert refused["reason"]
            assert refused["rewrite"].endswith("."), refused["what"]


def test_every_refusal_of_the_design_is_listed():
    refused = " ".join(r["what"] for row in layer_rows() for r in row["refused"])
    for word in ("PReLU", "grouped ConvTranspose", "bias_k", "proj_size", "max_norm", "spectral_norm"):
        assert word in refused
    assert "b_hn" in next(row["note"] for row in layer_rows() if row["name"] == "GRU")


def test_text_holds_every_row_and_fits_its_width():
    text = layers_text(width=100)
    for row in layer_rows():
        assert f"{row['name']}  [{row['exactness']}]" in " ".join(text.split("\n  "))
    assert "refused: " in text
    assert "GELU" in text
    assert all(word in text for word in ("flatten", "interleaved", "Rotary"))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert all(ord(char) < 128 for char in text)
