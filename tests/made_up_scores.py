"""Scores of pairs of which it is known whether they match, for the tests of calibration."""

import numpy as np

from capfilt.evaluation import calibration as cal
from capfilt.evaluation import calibration_fit as cfit

MATCHER = "m" * 64


def drawn(
    count: int, kind: str, random: np.random.Generator, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a kind of pair, as a fair matcher gives them."""
    centre = {"match": 2.0, "random": -2.5, "near": -0.8, "swap": 0.5}[kind] + shift
    logit = random.normal(centre, 1.3, count)
    return 1 / (1 + np.exp(-logit)), 0.1 * logit + random.normal(0.2, 0.08, count)


def web(count: int, share: float, seed: int = 0) -> tuple[cfit.Pool, np.ndarray]:
    """A pool, and which of it match."""
    random = np.random.default_rng(seed)
    kinds = random.choice(
        ["match", "random", "near", "swap"], count, p=[share, *((1 - share) * np.array([0.75, 0.17, 0.08]))]
    )  # fmt: skip
    itm, itc = np.empty(count), np.empty(count)
    for kind in ("match", "random", "near", "swap"):  # a set would come in another order each time
        rows = kinds == kind
        itm[rows], itc[rows] = drawn(int(rows.sum()), kind, random)
    return cfit.Pool(itm, itc, count), kinds == "match"


def made_up(count: int = 600, seed: int = 1) -> cfit.Examples:
    random = np.random.default_rng(seed)
    parts = [(kind, drawn(count, kind, random)) for kind in ("match", "random", "near", "swap")]
    kinds = np.array([kind for kind, _ in parts for _ in range(count)], object)
    images = np.array(
        [f"{kind in ('match', 'swap')}{i // 3}" for kind, _ in parts for i in range(count)], object
    )
    return cfit.Examples(
        np.concatenate([each[0] for _, each in parts]), np.concatenate([each[1] for _, each in parts]),
        kinds == "match", images, kinds,
    )  # fmt: skip


def reviewed(pool: cfit.Pool, match: np.ndarray, rows: np.ndarray) -> cfit.Examples:
    return cfit.Examples(
        pool.itm[rows], pool.itc[rows], match[rows], np.array([f"i{row}" for row in rows], object),
        np.array(["label"] * len(rows), object),
    )  # fmt: skip


def fit(
    examples: cfit.Examples, pool: cfit.Pool, target: float = 0.95, **options
) -> cal.Calibration:
    options.setdefault("resamples", 0)
    return cfit.calibrate(
        {"web": examples}, {"web": pool}, target=target, matcher=MATCHER, **options
    )
