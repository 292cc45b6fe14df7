"""What the commands have in common."""

import argparse

import pytest

from flashjvp_commands.arguments import a_device, names_out_of


@pytest.mark.parametrize("text", ["cpu", "cuda", "cuda:1"])
def test_a_device_is_kept_as_it_was_written(text: str) -> None:
    assert a_device(text) == text


@pytest.mark.parametrize("text", ["tpu", "cuda:one", "cuda:-1", ""])
def test_what_is_no_device_is_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not one of cpu, cuda"):
        a_device(text)


def test_names_are_those_known_in_the_order_given() -> None:
    parse = names_out_of({"a": 1, "b": 2, "c": 3})
    assert parse("c,a") == ["c", "a"]
    for text, wrong in (("a,d", "d"), ("", ""), ("a,", "")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{wrong}' is not one of a, b, c"):
            parse(text)
