import inspect

import pytest

from capfilt import errors


def test_exit_codes_say_whose_turn_it_is() -> None:
    codes = {
        name: kind.exit_code
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.CapfiltError)
    }
    partial = {"CapfiltError", "PartialError", "DivergenceError"}
    assert {name for name, code in codes.items() if code == 1} == partial
    assert {name for name, code in codes.items() if code == 2} == codes.keys() - partial


def test_every_error_is_caught_as_one() -> None:
    with pytest.raises(errors.CapfiltError, match="x"):
        raise errors.MismatchError("x")
