"""The errors that flashjvp raises, each also the builtin error that a PyTorch user would catch, and its one warning."""


class FlashJVPError(Exception):
    """Base of every error that flashjvp raises on purpose."""


class ArgumentValueError(FlashJVPError, ValueError):
    """An argument has the right type but a shape, device or value that attention cannot take."""


class ArgumentTypeError(FlashJVPError, TypeError):
    """An argument has the wrong Python type or dtype."""


class UnsupportedError(FlashJVPError, NotImplementedError):
    """A well-formed call that flashjvp, or the backend that was asked for, does not implement."""


class SecondOrderError(UnsupportedError):
    """A derivative beyond one JVP followed by one backward pass was asked for."""


class FlashJVPPerformanceWarning(UserWarning):
    """A call is served by something slower than it might be, for a reason that the user can change."""


def second_order(name: str) -> SecondOrderError:
    """The error of operator `name`, which is a derivative already."""
    return SecondOrderError(
        f"{name}: expected at most one JVP followed by one backward pass, got a derivative of that; "
        "leave the forward-mode level (torch.func.jvp, dual_level) before the backward pass"
    )
