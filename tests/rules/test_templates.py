"""Key templates: what they match, what they write, and what is no template."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftax.errors import RulesError
from graftax.rules import escape_key
from graftax.rules.template import KeyIndex, parse_template


@pytest.mark.parametrize(
    ("template", "side", "key", "numbers", "wilds"),
    [
        ("a.weight", "torch", "a.weight", (), ()),
        ("layers.{i}.w", "torch", "layers.12.w", (12,), ()),
        ("layers.{i}.w", "torch", "layers.0.w", (0,), ()),
        ("layers.{4*c+1}.w", "torch", "layers.9.w", (2,), ()),
        ("layers.{1*c}.w", "torch", "layers.9.w", (9,), ()),
        ("layers.{c*4+1}.w", "torch", "layers.9.w", (2,), ()),
        ("layers.{ 4 * c - 1 }.w", "torch", "layers.11.w", (3,), ()),
        ("l.{4*i+j}.w", "torch", "l.11.w", (2, 3), ()),
        ("l.{4*i+j+1}.{j}", "torch", "l.12.3", (2, 3), ()),
        ("l.{4 * i + j - 1}.w", "torch", "l.10.w", (2, 3), ()),
        ("l.{i}.e.{e}.{i}", "torch", "l.3.e.4.3", (3, 4), ()),
        ("layer{i}_{j}/k", "flax", "layer1_22/k", (1, 22), ()),
        ("layer1{i}", "flax", "layer123", (23,), ()),
        ("layer{i}0", "flax", "layer100", (10,), ()),
        ("*.weight", "torch", "a.weight", (), (("a",),)),
        ("**.weight", "torch", "a.b.weight", (), (("a", "b"),)),
        ("**.weight", "torch", "weight", (), ((),)),
        ("a.**", "torch", "a.b.c", (), (("b", "c"),)),
        ("a.**", "torch", "a", (), ((),)),
        ("a.**.z", "torch", "a.z", (), ((),)),
        ("**", "torch", "a.b", (), (("a", "b"),)),
        ("a/*/w", "flax", "a/x~1y~0/w", (), (("x/y~",),)),
        ("a/**/w", "flax", "a/x~1y/z/w", (), (("x/y", "z"),)),
        ("x_*.w", "torch", "x_.w", (), (("",),)),
        ("{{i}}.w", "torch", "{i}.w", (), ()),
        ("{*}.w", "torch", "*.w", (), ()),
        ("a.b+(c)$.w", "torch", "a.b+(c)$.w", (), ()),
        ("a\n.{i}", "torch", "a\n.3", (3,), ()),
    ],
)
def test_matches(template, side, key, numbers, wilds):
    made = parse_template(template, side)
    found = made.match(key)
    assert found is not None
    assert (tuple(found.numbers.values()), found.wilds) == (numbers, wilds)
    assert made.render(found.numbers, found.wilds) == key
    assert [k for k, _ in KeyIndex([key, "other"]).find(made) if k != "other"] == [key]


@pytest.mark.parametrize(
    ("template", "key"),
    [
        ("a.weight", "a.weight2"), ("a.weight", "b.a.weight"), ("a.weight", "axweight"),
        ("layers.{i}.w", "layers.x.w"), ("layers.{i}.w", "layers.01.w"), ("layers.{i}.w", "layers.-1.w"),
        ("layers.{i}.w", "layers.٣.w"), ("layers.{i}.w", "layers.1.w\n"), ("layers.{4*c+1}.w", "layers.4.w"),
        ("layers.{i+2}.w", "layers.1.w"), ("l.{4*i+j}.{j}", "l.11.2"), ("l.{4*i+j+4}", "l.3"),
        ("l.{i}.{i}", "l.1.2"), ("*.weight", "a.b.weight"), ("a.**", "ab"),
        ("layers.{i}.w", "layers.12345678901.w"),
    ],
)  # fmt: skip
def test_does_not_match(template, key):
    made = parse_template(template, "torch")
    assert made.match(key) is None
    assert list(KeyIndex([key]).find(made)) == []


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("", "empty"), ("a.{", "a literal brace is written twice"), ("a.}", "is not an index"),
        ("a.{}", "is not an index"), ("a.{__import__('os')}", "is not an index"),
        ("a.{i+j}", "two indices apart"), ("a.{1*i+j}", "two indices apart"), ("a.{4*i+i}", "two indices apart"),
        ("a.{4*i+2*j}", "is not an index"), ("a.{i**2}", "is not an index"), ("a.{0*i}", "factor 0"),
        ("a.{2*i*3}", "two factors"), ("a.{i}{j}", "where {j} begins"), ("a.{i}5{j}", "where {j} begins"),
        ("a.*b*", "one wildcard"), ("a.*{i}", "no index beside it"), ("a.{i}*", "no index beside it"),
        ("a.***", "neither"), ("a.b**", "whole parts"), ("a.**b", "whole parts"), ("a.**.**", "once"),
    ],
)  # fmt: skip
def test_what_is_no_template(template, text):
    with pytest.raises(RulesError) as error:
        parse_template(template, "torch")
    assert text in str(error.value)


def test_a_negative_number_is_not_written():
    made = parse_template("a.{i-2}", "torch")
    assert made.render({"i": 1}, ()) is None
    assert made.render({"i": 2}, ()) == "a.0"
    assert parse_template("a.{3*i+j}", "torch").render({"i": 2, "j": 3}, ()) is None


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12))
def test_an_escaped_key_matches_itself_only(key):
    for side in ("torch", "flax"):
        made = parse_template(escape_key(key), side)
        assert not made.names
        assert not made.wilds
        assert made.match(key) is not None
        assert made.render({}, ()) == key
        assert made.match(key + "x") is None


PARTS = st.lists(st.sampled_from(["a", "b{i}", "c_{j}", "{2*i+1}", "*", "x*"]), min_size=1, max_size=4)


@given(PARTS, st.integers(0, 400), st.integers(0, 400), st.lists(st.text("ab1_", min_size=1), min_size=4, max_size=4))
def test_what_it_writes_it_matches(parts, i, j, texts):
    made = parse_template(".".join(parts), "torch")
    wilds = tuple((text,) for text in texts[: len(made.wilds)])
    key = made.render({"i": i, "j": j}, wilds)
    found = made.match(key)
    assert found is not None
    assert found.wilds == wilds
    assert found.numbers == {n: {"i": i, "j": j}[n] for n in made.names}


def test_the_index_gives_keys_in_their_order():
    keys = [f"layers.{n}.w" for n in (2, 10, 1)] + ["x"]
    found = [key for key, _ in KeyIndex(keys).find(parse_template("layers.{i}.w", "torch"))]
    assert found == keys[:3]
    keys = ["b.x1.w", "a.y.w", "b.x.w", "a.x2.w", "b.x0.w"]
    assert [key for key, _ in KeyIndex(keys).find(parse_template("*.*.w", "torch"))] == keys


def test_hostile_keys_do_not_hang():
    hostile = ["a" * 20000 + "!", "a." * 10000 + "!", "1" * 20000, "a1" * 10000]
    templates = ["**.weight", "*.*.*.weight", "a{i}a{j}a{k}.w", "**.{i}.*.w", "*.**.x"]
    start = time.process_time()
    for template in templates:
        assert list(KeyIndex(hostile).find(parse_template(template, "torch"))) == []
    assert time.process_time() - start < 10
