"""Calibration files: they come back as they were, and nothing else is read."""

from pathlib import Path

import numpy as np
import pytest
from made_up_scores import fit, made_up, web

from capfilt.errors import InputError
from capfilt.evaluation import calibration as cal
from capfilt.inspect.calibration_page import calibration_page


def test_files_come_back_as_they_were(tmp_path: Path):
    pool, _ = web(2000, 0.5)
    found = fit(made_up(200), pool, 0.9, resamples=25)
    path = tmp_path / "deep" / "calibration.json"
    cal.write_calibration(path, found)
    again = cal.read_calibration(path)
    assert again.sources == found.sources and again.score == found.score
    np.testing.assert_array_equal(
        again.probability(pool.itm, pool.itc, "web"), found.probability(pool.itm, pool.itc, "web")
    )
    first = path.read_bytes()
    cal.write_calibration(path, fit(made_up(200), pool, 0.9, resamples=25))
    assert path.read_bytes() == first
    page = calibration_page(again)
    assert page.count("<svg") == 3 and "http" not in page and "web texts" in page
    with pytest.raises(InputError, match="nothing on synthetic"):
        again.keeps(pool.itm, pool.itc, "synthetic")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "other"}',
     '{"format": "capfilt-calibration-1", "sources": {"web": {"threshold": 0.5, "match_share": 0.5, "x": [1, 0], "y": [0, 1]}}, "matcher": "m", "score": "itm", "weights": [1, 1], "target": 0.9}',
     '{"format": "capfilt-calibration-1", "sources": {}, "matcher": "m", "score": "other", "weights": [1, 1], "target": 0.9}'],
)  # fmt: skip
def test_what_is_no_calibration_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(InputError, match="no calibration"):
        cal.read_calibration(path)
    with pytest.raises(InputError, match="capfilt calibrate"):
        cal.read_calibration(tmp_path / "none.json")
