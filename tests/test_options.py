"""Options are defined once: the library's functions, the commands and their help are made from the fields."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args, get_overloads, get_type_hints

import numpy as np
import pytest
from cyclopts import App

import graftax as gx
from graftax.cli import run
from graftax.cli.commands import app
from graftax.cli.flags import options_given
from graftax.errors import UsageError, flag
from graftax.plans import PlanOptions, WriteOptions
from graftax.plans.options import (
    Dtype,
    PlanAndWriteKeywords,
    PlanKeywords,
    WriteKeywords,
    choices,
    field_types,
)
from graftax.tree import DTYPES

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "plan": gx.plan,
    "port": gx.port,
    "port_file": gx.port_file,
    "load_into": gx.load_into,
}
TORCH = {"fc.weight": np.ones((3, 2), "float32"), "fc.bias": np.ones(3, "float32")}
FLAX = {"fc": {"kernel": np.zeros((2, 3), "float32"), "bias": np.zeros(3, "float32")}}
ENDS = (TORCH, FLAX)
SIDES: dict[str, Any] = {"source_side": "torch", "to": "flax"}


# ---------------------------------------------------------------- one definition


@pytest.mark.parametrize(("keywords", "options"), [(PlanKeywords, PlanOptions), (WriteKeywords, WriteOptions)])
def test_the_keywords_are_the_fields(keywords: type, options: type):
    assert get_type_hints(keywords) == field_types(options)
    assert list(get_type_hints(keywords)) == [f.name for f in fields(options)]


def test_every_field_has_a_default_and_one_help_line():
    for f in (*fields(PlanOptions), *fields(WriteOptions)):
        assert f.metadata["help"].endswith(".")
        assert "\n" not in f.metadata["help"]
    assert PlanOptions() == PlanOptions(None, "error", "error", None, None, "error", source_side=None)
    assert get_type_hints(PlanAndWriteKeywords) == field_types(PlanOptions) | field_types(WriteOptions)


def test_the_dtypes_are_those_that_a_cast_gives():
    floats = [name for name, (bits, kind) in DTYPES.items() if kind == "f" and bits >= 8]
    assert get_args(Dtype) == ("source", "like", *floats)


# ---------------------------------------------------------------- the library


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_shows_its_options(name: str):
    function = FUNCTIONS[name]
    kinds = (PlanOptions, WriteOptions) if name == "port_file" else (PlanOptions,)
    parameters = inspect.signature(function).parameters
    assert not {p.kind for p in parameters.values()} & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    hints, doc = get_type_hints(function), inspect.getdoc(function) or ""
    for kind in kinds:
        for f in fields(kind):
            assert parameters[f.name].default == f.default
            assert hints[f.name] == field_types(kind)[f.name]
            assert f.metadata["help"] in " ".join(doc.split())
            assert f"\n{f.name}" in doc


def test_the_order_that_the_design_promises():
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    promised = ["rules", "missing", "unused", "dtype", "to"]
    for name, ends in (("plan", 2), ("port", 2), ("port_file", 3), ("load_into", 2)):
        parameters = [p.name for p in inspect.signature(FUNCTIONS[name]).parameters.values() if p.kind is positional]
        assert parameters[ends : ends + 5] == promised


def test_options_by_position():
    torch = {**TORCH, "more.weight": np.ones((2, 2), "float32")}
    given = gx.plan(torch, FLAX, None, "error", "drop", "float16", "flax", source_side="torch")
    named = gx.plan(torch, FLAX, unused="drop", dtype="float16", **SIDES)
    assert given == named
    assert given.complete
    assert given.made_from is not None
    assert given.made_from.options.dtype == "float16"


def test_the_functions_use_what_they_are_given(tmp_path):
    tree = gx.port(*ENDS, None, "error", "error", "float16", "flax", source_side="torch", sharding="host")
    assert {leaf.dtype for leaf in tree["fc"].values()} == {np.dtype("float16")}
    out = tmp_path / "o.npz"
    gx.port_file(*ENDS, out, None, "error", "error", "float16", format="npz", **SIDES)
    assert {spec.dtype for spec in gx.open_checkpoint(out).values()} == {"float16"}
    with pytest.raises(gx.errors.StorageError, match="clobber=False"):
        gx.port_file(*ENDS, out, clobber=False, **SIDES)


@pytest.mark.parametrize(
    ("function", "extra", "near"),
    [
        (gx.plan, {"mising": "keep"}, "missing"),
        (gx.port, {"shardng": "host"}, "sharding"),
        (gx.port_file, {"out": "o.npz", "max_memroy": "1MiB"}, "max_memory"),
        (gx.load_into, {"overflw": "error"}, "overflow"),
    ],
)
def test_an_unknown_keyword_is_told_its_neighbour(function: Callable[..., Any], extra: dict[str, Any], near: str):
    wrong = list(extra)[-1]
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got .*'{wrong}'. Did you mean '{near}'\?"):
        function(*ENDS, **extra)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'qqqqqq'$"):
        function(*ENDS, **{name: value for name, value in extra.items() if name == "out"}, qqqqqq=1)


def test_options_of_writing_are_not_for_plan():
    with pytest.raises(TypeError, match=r"plan\(\) got an unexpected keyword argument 'clobber'"):
        gx.plan(*ENDS, clobber=False)  # pyright: ignore[reportCallIssue]


def test_a_value_given_twice_and_too_many():
    with pytest.raises(TypeError, match=r"plan\(\): multiple values for argument 'rules'"):
        gx.plan(*ENDS, None, rules=None)
    with pytest.raises(TypeError, match=r"port\(\) takes at most 8 positional arguments but 9 were given"):
        gx.port(*ENDS, None, "error", "error", None, "flax", "error", "host")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"missing": "kepp"}, "missing='kepp' is not one of error, keep, zeros"),
        ({"missing": None}, "missing='None' is not one of error, keep, zeros"),
        ({"missing": {"fc/bias": "keep"}}, "missing=.* is not one of error, keep, zeros"),
        ({"unused": "keep"}, "unused='keep' is not one of error, drop"),
        ({"overflow": "wrap"}, "overflow='wrap' is not one of error, saturate"),
        ({"to": "jax"}, "to='jax' is not one of torch, flax"),
        ({"source_side": "jax"}, "source_side='jax' is not one of torch, flax"),
        ({"dtype": "int8"}, "dtype='int8' is not one of source, like, float16, "),
        ({"dtype": np.dtype("float32")}, "dtype='float32' is not one of source, like, float16, "),
        ({"dtype": {"fc/bias": "half"}}, "dtype='half' is not one of source, like, float16, "),
        ({"dtype": {"fc/bias": None}}, "dtype='None' is not one of source, like, float16, "),
    ],
)
def test_a_word_that_is_no_choice(wrong: dict[str, Any], text: str):
    with pytest.raises(UsageError, match=text):
        PlanOptions(**wrong).check()


def test_types_of_what_comes_back():
    first, second = get_overloads(gx.replace)
    assert get_type_hints(second)["return"] == get_type_hints(second)["tree"]
    assert get_type_hints(first)["return"] == get_args(get_type_hints(first)["tree"])[1]
    hints = get_type_hints(gx.load_into)
    assert hints["return"] == hints["module"]
    assert inspect.signature(gx.assert_parity) == inspect.signature(gx.check_parity)
    assert gx.assert_parity.__name__ == "assert_parity"
    assert "ParityError" in (gx.assert_parity.__doc__ or "")


# ---------------------------------------------------------------- the command line


def flags_of(command: str) -> dict[str, Any]:
    """name of an option -> its argument, of one command."""
    sub = app[command]
    assert isinstance(sub, App)
    return {name: argument for argument in sub.assemble_argument_collection() for name in argument.names}


@pytest.mark.parametrize(("command", "kinds"), [("plan", [PlanOptions]), ("port", [PlanOptions, WriteOptions])])
def test_every_field_has_an_option(command: str, kinds: list[type], capsys: pytest.CaptureFixture[str]):
    found = flags_of(command)
    assert run([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for kind in kinds:
        for f in fields(kind):
            name = "--no-clobber" if f.name == "clobber" else flag(f.name)
            assert name in found
            text = shown[shown.index(f" {name}") :]
            assert re.sub("`(.*?)`", lambda parameter: parameter[1].upper(), f.metadata["help"]) in text
            if words := choices(field_types(kind)[f.name]):
                assert f"[choices: {', '.join(words)}]" in text
    assert "--clobber" not in found
    assert "--no-resume" not in found


def test_options_of_a_command():
    given = {"source_side": "torch", "max_memory": "1MiB", "no_clobber": True}
    assert options_given(WriteOptions, given) == WriteOptions(max_memory="1MiB", clobber=False)
    assert options_given(PlanOptions, given) == PlanOptions(source_side="torch")
    assert options_given(WriteOptions, {}) == WriteOptions()


def test_an_option_that_a_finished_plan_refuses_though_it_is_the_default(tmp_path, capsys: pytest.CaptureFixture[str]):
    for f in fields(PlanOptions):
        word = (choices(field_types(PlanOptions)[f.name]) or ("r.toml",))[0]
        code = run(["port", "a.npz", "--plan", "p.json", "-o", str(tmp_path / "o.npz"), flag(f.name), word])
        assert (code, f"{flag(f.name)} cannot change it" in capsys.readouterr().err) == (2, True)


def test_help_loads_the_options_alone():
    code = (
        "import sys, graftax.cli.commands\nprint(*[m for m in sys.modules if m[:11] in ('graftax.ops', 'graftax.pla')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["graftax.plans", "graftax.plans.options"]


def test_options_beside_a_finished_plan_are_refused(tmp_path):
    plan = gx.plan(*ENDS, **SIDES)
    out = tmp_path / "out.npz"
    with pytest.raises(UsageError, match="the plan is finished: missing, dtype cannot change it"):
        gx.port_file(*ENDS, out, plan=plan, dtype="float16", missing="zeros")
    with pytest.raises(UsageError, match="plan= is a str, not a Plan") as error:
        gx.port_file(*ENDS, out, plan="plan.json")  # type: ignore[arg-type]
    assert "gx.load_plan" in str(error.value)
    plan.save(tmp_path / "plan.json")
    np.savez(tmp_path / "t.npz", **TORCH)
    words = ["port", str(tmp_path / "t.npz"), "--plan", str(tmp_path / "plan.json"), "-o", str(out)]
    assert run([*words, "--suggest", str(tmp_path / "s.toml")]) == 2
    assert run([*words, "--missing", "error"]) == 2
    assert not out.exists()
    assert run([*words, "--format", ".NPZ"]) == 0
    gx.port_file(*ENDS, out, plan=plan, max_memory="1MiB")


def test_the_help_of_a_choice_lists_it():
    doc = " ".join((inspect.getdoc(gx.plan) or "").split())
    assert '"error", "keep", "zeros".' in doc
    assert '"torch", "flax".' in doc


def test_too_many_positional_arguments_are_counted():
    with pytest.raises(TypeError, match=r"plan\(\) takes at most 8 positional arguments but 10 were given"):
        gx.plan(*ENDS, None, "error", "error", None, None, "error", None, None)
