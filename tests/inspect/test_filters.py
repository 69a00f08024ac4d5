from dataclasses import replace

import pytest

from capfilt.errors import InputError
from capfilt.inspect.filters import parse_query, parse_thresholds
from capfilt.inspect.thresholds import Thresholds, decided_thresholds

HALF = Thresholds(0.5)


@pytest.mark.parametrize(
    "params",
    [
        {"keep": "maybe"},
        {"source": "web' OR 1=1"},
        {"order": "row; DROP TABLE run.pairs"},
        {"itm_min": "nan"},
        {"limit": "100000"},
        {"limit": "-1"},
        {"seed": "x"},
        {"after": "x"},
        {"after": "1~" + "9" * 50},
        {"before": "1~" + "9" * 5000},
        {"after": "nan~1"},
        {"before": "inf~1"},
        {"after": "1~-1"},
        {"review": "x"},
        {"changes": "x"},
    ],
)
def test_a_wrong_parameter_is_named(params: dict[str, str]) -> None:
    with pytest.raises(InputError, match=next(iter(params))):
        parse_query(params)


def test_thresholds_of_synthetic_texts_are_those_of_web_texts_unless_said() -> None:
    """In a `filter` section, in the page's URL, and in a run that decided with its own."""
    assert decided_thresholds({"itm_threshold": 0.5}) == Thresholds(0.5)
    own = decided_thresholds({"itm_threshold": 0.5, "synthetic_itm_threshold": 0.8})
    assert own == Thresholds(0.5, None, (0.8, None))
    assert own.of("synthetic") == {"itm": 0.8, "itc": None} and own.of("web")["itm"] == 0.5
    assert (
        decided_thresholds({"itm_threshold": 0.5, "synthetic_itm_threshold": 0.5}).synthetic is None
    )
    assert parse_thresholds({"t_itm": "0.6"}, HALF) == Thresholds(0.6)
    assert parse_thresholds({"t_itm": "0.6"}, own) == Thresholds(0.6, None, (0.8, None))
    assert parse_thresholds({"t_synthetic_itm": "0.5"}, own) == HALF
    tried = parse_thresholds({"t_itm": "off", "t_synthetic_itc": "0.2"}, HALF)
    assert tried == Thresholds(None, None, (None, 0.2))
    assert not parse_thresholds({"t_synthetic_itm": "off"}, replace(HALF, as_run=True)).as_run
    with pytest.raises(InputError, match="t_synthetic_itc is 'high', expected a number"):
        parse_thresholds({"t_synthetic_itc": "high"}, HALF)


def test_only_an_unfiltered_random_order_counts_as_random() -> None:
    assert parse_query({"order": "random"}).sampling == "random"
    assert parse_query({"order": "random", "review": "todo", "source": "web"}).sampling == "random"
    assert parse_query({"order": "random", "itm_min": "0.5"}).sampling == "browse"
    assert parse_query({"order": "random", "words": "dog"}).sampling == "browse"
    assert parse_query({"order": "random", "review": "wrong"}).sampling == "browse"
    assert parse_query({"order": "threshold"}).sampling == "threshold"
    assert parse_query({}).sampling == "browse"
