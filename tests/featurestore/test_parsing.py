"""Texts that PyYAML itself fails at are mistakes of the text: a ValueError of one line, as all others."""

import pytest

from featurestore.parsing import parse_yaml


@pytest.mark.parametrize(
    "text",
    ["!!bool x", "!!int ''", "!!float ''", "!!timestamp x", '"\\UFFFFFFFF"', ":".join(["1"] * 400) + ".5"],
    ids=lambda text: text[:16],
)
def test_what_pyyaml_fails_at_is_a_mistake_of_the_text(text: str) -> None:
    with pytest.raises(ValueError) as failure:
        parse_yaml(f"a: {text}")
    assert "\n" not in str(failure.value)


def test_yaml_nested_too_deep_is_refused_before_it_is_looked_through() -> None:
    for text in ("[" * 100 + "]" * 100, "- " * 100 + "a"):
        parse_yaml(text)
    for text in ("[" * 101 + "]" * 101, "a: " + "{a: " * 20_000, "- " * 101 + "a", "? " * 101 + "a", "- " * 20_000):
        with pytest.raises(ValueError, match="nested too deep"):
            parse_yaml(text)
