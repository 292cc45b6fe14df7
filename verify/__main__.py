"""`python -m verify` verifies this installation; `python -m verify model` whole networks and their training losses;
`python -m verify faults` shows that planted bugs are caught, `python -m verify codegen` what the kernels compile to,
without a GPU, and `python -m verify published` that tvm_ref gives the numbers of the published code."""

import sys


def main(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "faults":
        from . import faults

        return faults.main(rest)
    if command == "model":
        from . import model

        return model.main(rest)
    if command == "published":
        from . import published

        return published.main(rest)
    if command == "codegen":
        from . import codegen

        return codegen.main(rest)
    from . import run

    return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
