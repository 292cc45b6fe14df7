"""`python -m verify` verifies this installation; `python -m verify model` whole networks and their training losses;
`python -m verify faults` shows that planted bugs are caught, `python -m verify codegen` what the kernels compile to,
without a GPU, and `python -m verify published` that tvm_ref gives the numbers of the published code."""

import sys


def main(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "faults":
        from .faults import command as faults

        return faults.main(rest)
    if command == "model":
        from .model import command as model

        return model.main(rest)
    if command == "published":
        from .model import published

        return published.main(rest)
    if command == "codegen":
        from .codegen import command as codegen

        return codegen.main(rest)
    from .run import command as run

    return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
