"""The error of a setting that is valid, but not for the network, run or data set that it is used with."""


class UnsuitableError(ValueError):
    """A setting does not suit the network, the run or the data set. The message names it."""
