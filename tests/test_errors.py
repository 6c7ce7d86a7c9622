"""The words of messages."""

from __future__ import annotations

import pytest

import graftax as gx
from graftax.errors import UsageError, with_article


@pytest.mark.parametrize(
    "text", ["a float", "an int", "an nnx module", "a torch module", "an ndarray", "a uint8", "an UnpicklingError"]
)
def test_articles(text: str) -> None:
    assert with_article(text.split(" ", 1)[1]) == text


def test_what_is_no_array_is_named() -> None:
    with pytest.raises(UsageError, match="steps is an int, not an array"):
        gx.plan({"steps": 3}, None, rules=[])
