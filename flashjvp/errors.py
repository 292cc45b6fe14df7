"""The errors that flashjvp raises. Each is also the builtin error that a PyTorch user would catch."""


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
    """Something slower serves than this device could have.

    The message says why, and how to mend it."""
