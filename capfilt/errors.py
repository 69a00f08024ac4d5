"""What can go wrong, as a small tree.

Every message says what is wrong, where (file, shard, row, YAML key), the value, and what to do.
"""


class CapfiltError(Exception):
    """Any error that capfilt explains to its user; the command line prints no traceback of it."""

    exit_code = 1


class UsageError(CapfiltError):
    """The command, its config or its inputs are wrong; nothing was done."""

    exit_code = 2


class ConfigError(UsageError):
    """The YAML file or an override of it is wrong."""


class InputError(UsageError):
    """A folder, file or column that the run reads is missing or has another form than it should."""


class MismatchError(UsageError):
    """The run folder holds work that was done with another config."""


class MissingExtraError(UsageError):
    """An optional package is needed; the message names the pip command."""


class PartialError(CapfiltError):
    """Part of the work failed; what is done stays done, and the message says how to go on."""


class DivergenceError(CapfiltError):
    """A training loss became NaN or infinite."""
