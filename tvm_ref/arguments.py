"""Types of command-line arguments that several commands share, such as `--nfe 1,2,4`."""

from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"expected whole numbers separated by commas, got {text!r}") from error


Numbers = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT,...",
        instance_from_str=lambda strings: _numbers(strings[0]),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(number, int) for number in value),
        str_from_instance=lambda numbers: [",".join(str(number) for number in numbers)],
    ),
]
