"""Reading and writing rules: every form, every fault with its line, all faults at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftax.errors import RulesError, StorageError
from graftax.rules import load_rules, rule_line
from graftax.rules.schema import KEYS
from graftax.rules.text import rule_lines

LINE = '{ torch = "fc.weight", flax = "fc/kernel" }'


def faults(text: str) -> list[str]:
    with pytest.raises(RulesError) as error:
        load_rules(text)
    assert error.value.exit_code == 2
    return [str(failure) for failure in error.value.failures] or [str(error.value)]


@pytest.mark.parametrize(
    "given_", [
        f"rules = [\n  {LINE},\n]", f"rules = [{LINE}]", LINE, f"{LINE},", [LINE], [f"{LINE},"],
        {"torch": "fc.weight", "flax": "fc/kernel"}, [{"torch": "fc.weight", "flax": "fc/kernel"}],
        {"rules": [{"torch": ["fc.weight"], "flax": ["fc/kernel"]}]},
        '[[rules]]\ntorch = "fc.weight"\nflax = "fc/kernel"\n', (LINE,), iter([LINE]), f"\n# c\nrules=[{LINE},]",
    ],
)  # fmt: skip
def test_every_form(given_):
    rules = load_rules(given_)
    assert [(rule.left, rule.right) for rule in rules] == [(("fc.weight",), ("fc/kernel",))]
    assert load_rules(rules) is rules
    assert [r.left for r in load_rules([rules, *rules])] == [("fc.weight",)] * 2


def test_nothing():
    assert len(load_rules(None)) == 0
    assert len(load_rules([])) == 0
    assert len(load_rules("rules = []")) == 0


def test_a_file(tmp_path):
    path = tmp_path / "R.toml"
    path.write_bytes(b"\xef\xbb\xbf" + f"rules = [\r\n  {LINE},\r\n]\r\n".encode())
    for form in (path, str(path)):
        assert [rule.where for rule in load_rules(form)] == ["R.toml, line 2"]
    assert [rule.evidence for rule in load_rules(path)] == ["R.toml line 2"]
    assert len(load_rules([path, LINE])) == 2


def test_one_more_rule():
    rules = load_rules([LINE]).extended('{ torch = "a.bias", drop = "x" }')
    assert [rule.left for rule in rules] == [("fc.weight",), ("a.bias",)]
    with pytest.raises(RulesError):
        rules.extended("{ torch = ")


@pytest.mark.parametrize("name", ["missing.toml", ".", "a\0b"])
def test_files_that_cannot_be_read(tmp_path, name):
    with pytest.raises(StorageError) as error:
        load_rules(str(tmp_path / name) if name != "." else tmp_path)
    assert error.value.exit_code == 5


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "R.toml"
    with path.open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(RulesError, match="larger than 16 MiB"):
        load_rules(path)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "R.toml"
    path.write_bytes(b"rules = [\n\xff\n]")
    with pytest.raises(RulesError, match=r"R\.toml, line 2: not UTF-8"):
        load_rules(path)


MANY = """# head
rules = [   # ] } tricky "
  # { torch = "commented" }
  { torch = "a.weight", flax = "a/kernel" }, { torch = "b.weight", flux = "b/kernel" },

  { torch = ["c", 'd#]'], flax = "x", fused = "tied" }, # }

  { torch = '''e''', flax = \"\"\"f\"\"\", heds = 3 },
  { torch = [
      "g",
      "h",
    ], flax = "gh", fuse = "tied" },
  { torch = "a\\"]{#b", flux = "c" },
]
"""


def test_line_numbers_survive_comments_strings_and_arrays():
    assert rule_lines(MANY) == [4, 4, 6, 8, 9, 13]
    found = faults(MANY)
    assert [text.partition(":")[0] for text in found if "no key of a rule" in text] == [
        "rules, line 4", "rules, line 8", "rules, line 9", "rules, line 13",
    ]  # fmt: skip


def test_a_text_of_several_lines_counts_its_lines():
    text = 'rules = [\n  { torch = """\\\n  a""", drop = "x" },\n  { torch = "b", drp = "x" },\n]'
    assert rule_lines(text) == [2, 4]
    assert faults(text)[0].startswith("rules, line 4:")


def test_lines_of_table_headers():
    text = '[[rules]]\ntorch = "a"\ndrop = "x"\n\n[[rules]] # y\ntorch = "b"\ndrp = "x"\n'
    assert rule_lines(text) == [1, 5]
    assert faults(text)[0].startswith("rules, line 5:")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('rules = [\n  { torch = "a" }\n  { torch = "b" }\n]', 3, "a comma must follow every rule"),
        ('rules = [\n  { torch = "a",\n flax = "b" }\n]', 2, "must be on one line"),
        ("rules = [\n", 1, "not TOML"),
        ('rules = [\n  { torch = "a", torch = "b" },\n]', 2, "not TOML"),
        ("rules = 3", 1, "rules = [ ... ]"),
        ('rules = [{torch = "a", drop = "b"}]\nrule = 3', 2, "unknown key 'rule'"),
        ("rules = [" + "[" * 5000, 1, ""),
    ],
)
def test_what_is_no_rules_file(text, line, said):
    with pytest.raises(RulesError) as error:
        load_rules(text, "R.toml")
    assert said in str(error.value)
    if line > 1:
        assert f"R.toml, line {line}" in str(error.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('torch = "a", flax = "b", heds = 4', ("'heds' is no key", "Near: heads")),
        ('torch = "a", flax = "b", heads = "4"', ("`heads` is '4'", "whole number")),
        ('torch = "a", flax = "b", heads = 0', ("`heads` is 0", "at least 1")),
        ('torch = ["a", "b"], flax = "b", fused = "blok"', ("`fused` is 'blok'", "'block', 'interleaved'")),
        ('torch = 3, flax = "b"', ("`torch` is 3", "a key template or a list of them")),
        ('torch = "a"', ("names one side only", "Name the other side")),
        ("heads = 3", ("names no key",)),
        ('torch = "a", source = "b"', ("mixes torch and source",)),
        ('torch = ["a", "b"], flax = "c"', ("how 2 tensors lie in one", 'fused = "block"')),
        ('torch = ["a", "b"], flax = ["c", "d"]', ("both sides are lists",)),
        ('torch = ["a", "b"], flax = ["c", "d"], fused = "block"', ("both sides are lists", 'fused = "sum"')),
        ('torch = ["a.{l}", "b.{l}"], flax = ["c", "d"], fused = "sum", stack = {l = 0}', ("both sides are lists",)),
        ('torch = "a", flax = "b", fused = "block"', ("both sides are one tensor",)),
        ('torch = "a", flax = ["b", "c"], fused = "sum"', ("list on the left",)),
        ('torch = ["a", "b"], flax = "c", fused = "block", stack = 0', ("exclude each other",)),
        ('torch = "a.{l}", flax = "b"', ("index l is on one side only", "stack = {l = 0}")),
        ('torch = "a.{l}", flax = "b.{m}"', ("l is on the left only and m is on the right only",)),
        ('torch = "a.{l}", flax = "b", stack = {m = 0}', ("'m', which is no index",)),
        ('torch = "a.{l}", flax = "b.{l}", stack = {l = 0}', ("'l', which is on both sides",)),
        ('torch = "a.{l}.{m}", flax = "b", stack = 0', ("`stack` is one number", "stack = {l = 0, m = 0}")),
        ('torch = "a.{l}", flax = "b", ops = "l o i", stack = {l = 0}', ("in `stack` and in `ops`",)),
        ('torch = "a.{l}", flax = "b.{l}", ops = "l o i"', ("`ops` names 'l', which is on both sides",)),
        ('torch = "a.{l}", flax = "b", ops = "l o i -> o i"', ("wrong side of '->'",)),
        ('torch = "a.{l}", flax = "b", ops = "o i -> (l o) i"', ("must be alone",)),
        ('torch = "a.{l}", flax = "b", stack = 0, l = "5..3"', ("`l` is '5..3'", 'l = "3..60"')),
        ('torch = "a.{l}", flax = "b", stack = 0, l = -1', ("`l` is -1",)),
        ('torch = "a.{l}", flax = "b", stack = 0, l = "0..99999999"', ("`l` is '0..99999999'",)),
        ('torch = ["a.{l}", "b"], flax = "c", fused = "tied"', ("different indices",)),
        ('torch = "a.*", flax = "b"', ("different wildcards",)),
        ('torch = "a.**", flax = "b/*"', ("different wildcards",)),
        ('torch = "a.{l", flax = "b"', ("is not an index",)),
        ('torch = "a", flax = "b", ops = "o i -> i"', ("on one side only: o",)),
        ('torch = "a", flax = "b", ops = "i h d"', ("where h, d come from", "'(h d) i -> i h d'")),
        ('torch = "a", flax = "b", ops = "(h d) i"', ("groups need both sides",)),
        ('torch = "a", flax = "b", ops = "(h d) i -> i h d", h = 0', ("`h` is 0",)),
        ('torch = "a", flax = "b", layout = "lin"', ("`layout` is 'lin'", "Near: linear")),
        ('torch = "a", flax = "b", layout = "conv", ops = "o i"', ("`ops` and `layout` exclude",)),
        ('torch = "a", flax = "b", transpose = "yes"', ("`transpose` is 'yes'", "boolean")),
        ('torch = "a", flax = "b", flatten = "H W"', ("`flatten` is 'H W'", "C, the channels")),
        ('torch = "a", flax = "b", flatten = "C=x H"', ("`flatten`",)),
        ('torch = "a", flax = "b", pad = -1.5', ("`pad` is -1.5", "its new rows")),
        ('torch = "a", flax = "b", pad = {o = -1}', ("`pad`",)),
        ('torch = "a", flax = "b", repeat = {o = 0}', ("`repeat`", "how often each")),
        ('torch = "a", flax = "b", scale = true', ("`scale` is True", "a number")),
        ('torch = "a", flax = "b", drop = "x"', ("`drop` is for a key of one side alone",)),
        ('torch = "a", drop = true', ("`drop` is True", "string")),
        ('torch = "a", drop = ""', ("`drop` is ''",)),
        ('torch = "a", missing = "zero"', ("`missing` is 'zero'", "'zeros'")),
        ('torch = "a", drop = "x", heads = 3', ("`heads` needs both sides",)),
        ('torch = "a", flax = "b", fill = 1', ("`fill` is for",)),
    ],
)  # fmt: skip
def test_faults_of_one_rule(keys, said):
    found = faults(f"rules = [\n\n  {{ {keys} }},\n]")
    assert len(found) == 1, found
    assert found[0].startswith("rules, line 3: ")
    for text in said:
        assert text in found[0]


def test_an_element_that_is_no_table():
    assert faults('rules = [\n  {torch = "a", drop = "x"},\n  "b",\n]')[0].startswith(
        "rules, line 3: a rule is a table"
    )


def test_all_faults_at_once():
    lines = [f'  {{ torch = "a{i}", flax = "b", heds = 1, layout = 3 }},' for i in range(50)]
    with pytest.raises(RulesError) as error:
        load_rules("\n".join(["rules = [", *lines, "]"]))
    assert len(error.value.failures) == 100
    assert "50 rules are not well formed" in str(error.value)
    assert len(str(error.value).encode()) <= 2000


def test_names_in_messages_are_escaped():
    (text,) = faults('rules = [\n { torch = "a\\u001b[31m", flax = "b", "h\\u202eds" = 1 },\n]')
    assert "\x1b" not in text
    assert "\u202e" not in text


# ---------------------------------------------------------------- writing

TEXT = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.one_of(TEXT, st.integers(-(2**62), 2**62), st.booleans(), st.floats(allow_nan=False)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(list(KEYS)) | st.text("abl_-", min_size=1), VALUES, min_size=1))
def test_a_written_line_reads_back(keys):
    import tomllib

    line = rule_line(**keys)
    assert "\n" not in line
    assert tomllib.loads(f"rule = {line}")["rule"] == keys
    text = f"rules = [\n  # a comment\n  # of two lines\n  {line},\n  {line},\n]\n"
    assert tomllib.loads(text)["rules"] == [keys, keys]
    assert rule_lines(text) == [4, 5]


def test_the_order_of_a_line():
    line = rule_line(l="3..60", heads=4, flax=["a", "b"], torch='x"\\', fused="block", stack={"l": -1}, drop=None)
    expected = '{ torch = "x\\"\\\\", flax = ["a", "b"], fused = "block", heads = 4, stack = {l = -1}, l = "3..60" }'
    assert line == expected


def test_what_toml_cannot_write():
    for value in ("\ud800", object()):
        with pytest.raises(RulesError):
            rule_line(torch=value)


def test_importing_rules_imports_no_framework():
    code = "import sys, graftax.rules; print(*(m for m in ('numpy','torch','jax','flax') if m in sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    assert out.stdout.strip() == ""


def test_a_plan_is_no_rules_file(tmp_path):
    (tmp_path / "p.json").write_text('{\n "graftax_plan": 1,\n "complete": true\n}\n')
    with pytest.raises(RulesError, match=r"p\.json is a plan"):
        load_rules(tmp_path / "p.json")


def test_lines_of_a_file_name_no_other_file(tmp_path):
    other, file = tmp_path / "other.toml", tmp_path / "r.toml"
    other.write_text('rules = [\n  { torch = "a", drop = "b" },\n]\n')
    file.write_text(f'{{ torch = "c", drop = "d" }},\n# more\n{other}\n')
    with pytest.raises(RulesError) as error:
        load_rules(file)
    assert [failure.key for failure in error.value.failures] == ["r.toml, line 3"]
    file.write_text('{ torch = "c", drop = "d" },\n\n# more\n{ torch = "e", drop = "f" }\n')
    assert len(load_rules(file)) == 2
