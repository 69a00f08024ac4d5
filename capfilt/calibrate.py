"""`capfilt calibrate`: from a run's labels, or from pairs made up for it, to a calibration.

Without review labels it takes human pairs that the matcher was not trained on as matches, and makes
mismatches of three kinds: a web picture with the text of another one at random; with the text that
ITC finds nearest to its own among a sample; and a human pair with one word of its text exchanged.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from capfilt import manifest
from capfilt.config import Config, Human
from capfilt.errors import InputError, UsageError
from capfilt.evaluation.calibration import Calibration, write_calibration
from capfilt.evaluation.calibration_fit import (
    FEWEST,
    Examples,
    Pool,
    calibrate,
    check_examples,
)
from capfilt.inspect.calibration_page import calibration_page
from capfilt.inspect.labels import Label, read_labels, verdicts_of
from capfilt.shards import RunDir, Shard

log = logging.getLogger(__name__)

LARGEST_POOL = 200_000
"""Scored pairs of a source that thresholds are chosen on; a larger run is sampled by shards."""
PICTURES = 2_000
"""Web pictures, and held-out human texts, that pairs are made up of."""
CANDIDATES = 100
"""Texts among which the nearest one is looked for."""


def run_calibration(
    config: Config,
    *,
    target: float,
    labels: Path | None = None,
    pairs: Path | None = None,
    out: Path | None = None,
    score: str = "auto",
    device: Callable[[], str] = lambda: "cpu",
    use_features: bool = False,
) -> tuple[Calibration, Path]:
    """Calibrates a run and writes the file that `filter.calibration` takes, and a page beside it.

    Args:
        config: of the run, which must be scored.
        target: precision that what is kept of each source shall have.
        labels: folder of review labels; the run's own `labels/` by default, where it is there.
        pairs: list of human pairs that nothing was trained on, as `human.pairs`; used instead of
            labels.
        out: the file; `<run_dir>/calibration.json` by default.
        score: `itm`, `itc`, `fused` or `auto`.
        device: says where the matcher runs; asked when pairs are made up only, as it needs torch.
        use_features: whether pictures come from `features/`.

    Returns:
        The calibration and where it was written.

    Raises:
        UsageError: the folder of labels is not there, or they are too few, of one class, or of
            another matcher; or `target` is too high.
        InputError: the run is not scored.
    """
    if labels is not None and not labels.is_dir():
        raise UsageError(
            f"labels {str(labels)!r}: the folder is not there, so its labels are too few (none); "
            "give labels/ of a run that was reviewed with `capfilt inspect RUN`"
        )
    run = RunDir(config.run_dir)
    matcher = matcher_of(run)
    random = np.random.default_rng(config.seed)
    pools, texts = _read_pools(run, random)
    folder = labels or Path(run.local("labels"))
    if pairs is None and (labels is not None or read_labels(folder)):
        examples = from_labels(run, read_labels(folder), folder, matcher, tuple(pools))
    else:
        made = _MadeUp(run, config, device(), use_features, random)
        examples = made.examples(pairs, texts)
    calibration = calibrate(
        examples, pools, target=target, matcher=matcher, score=score, seed=config.seed
    )
    path = out or Path(run.local("calibration.json"))
    write_calibration(path, calibration)
    path.with_suffix(".html").write_text(calibration_page(calibration), encoding="utf-8")
    return calibration, path


def matcher_of(run: RunDir) -> str:
    """Digest of the matcher's weights that the run's scores are of.

    Raises:
        InputError: the run is not scored, or its shards by different matchers.
    """
    found: dict[str, str] = {}
    for name in run.shards("scores", ("web",)):
        record = manifest.read(run, run.manifest("scores", name))
        found[str((record or {}).get("weights", {}).get("matcher"))] = name
    if not found:
        raise InputError(
            f"{run.at('scores')} holds no finished shards of web pairs: run `capfilt score CONFIG` "
            "first"
        )
    if len(found) > 1:
        raise InputError(
            f"the shards {', '.join(found.values())} of {run.at('scores')} are of different "
            "matchers; run `capfilt score CONFIG --redo`"
        )
    return next(iter(found))


def _read_pools(
    run: RunDir, random: np.random.Generator
) -> tuple[dict[str, Pool], dict[str, list[tuple[str, str]]]]:
    """By source the scores of the run's pairs, and the first text of each picture: (key, text)."""
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"web": [], "synthetic": []}
    texts: dict[str, dict[str, str]] = {"web": {}, "synthetic": {}}
    held = dict.fromkeys(parts, 0)
    total = dict.fromkeys(parts, 0)
    names = run.shards("scores", ("web",))
    for position in random.permutation(len(names)):
        columns = ["key", "source", "caption", "itm_prob", "itc_sim"]
        table = Shard(run, names[position]).read("scores", columns)
        scored = table.filter(
            pa.compute.and_(
                pa.compute.is_valid(table["itm_prob"]), pa.compute.is_valid(table["itc_sim"])
            )
        )
        for source in parts:
            chosen = scored.filter(pa.compute.equal(scored["source"], source))
            total[source] += chosen.num_rows
            if held[source] >= LARGEST_POOL or not chosen.num_rows:
                continue
            held[source] += chosen.num_rows
            parts[source].append(
                tuple(
                    chosen[name].to_numpy().astype(np.float64) for name in ("itm_prob", "itc_sim")
                )
            )
            if len(texts[source]) < 2 * PICTURES:
                for key, text in zip(
                    chosen["key"].to_pylist(), chosen["caption"].to_pylist(), strict=True
                ):
                    texts[source].setdefault(key, text)
    pools = {}
    for source, found in parts.items():
        if found:
            itm, itc = (np.concatenate(column) for column in zip(*found, strict=True))
            pools[source] = Pool(itm, itc, total[source])
    if not pools:
        raise InputError(
            f"{run.at('scores')} holds no scored web or synthetic text; see "
            "`capfilt inspect RUN --text`"
        )
    return pools, {source: list(texts[source].items()) for source in pools}


# --- review labels -------------------------------------------------------------------------------


def from_labels(
    run: RunDir, labels: list[Label], folder: Path, matcher: str, sources: tuple[str, ...]
) -> dict[str, Examples]:
    """Examples by source from review labels, with the scores that the pairs have in the run now.

    A pair that several people judged goes by their majority; `unsure`, and a draw, say nothing. A
    source with too few labels of its own gets those of all sources, with `Examples.own` set.

    Raises:
        UsageError: there are too few of every source, they are all of one class, or of another
            matcher.
    """
    judged = [label for label in labels if label.verdict in ("right", "wrong")]
    usable = [label for label in judged if label.matcher in (None, matcher)]
    strange = len(judged) - len(usable)
    if strange and not usable:
        raise UsageError(
            f"all {strange} labels in {folder} were given with another matcher than the run's "
            f"({matcher[:12]}…), which may have learnt from them since; review pairs of this run "
            "anew with `capfilt inspect RUN`"
        )
    if strange:
        log.warning("%d labels in %s are of another matcher and are left out", strange, folder)
    verdicts = verdicts_of(usable)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for name in run.shards("scores", ("web",)):
        table = Shard(run, name).read("scores")
        wanted = pa.array(sorted(verdicts), pa.string())
        here = pa.compute.or_(
            pa.compute.is_in(table["uid"], value_set=wanted),
            pa.compute.is_in(table["pair_id"], value_set=wanted),
        )
        for row in table.filter(here).to_pylist():
            pair = row["uid"] if row["uid"] in verdicts else row["pair_id"]
            if pair not in seen and row["itm_prob"] is not None:
                seen.add(pair)
                rows.append({**row, "match": verdicts[pair]})
    lost = len(verdicts) - len(seen)
    if lost:
        log.warning("%d labelled pairs are not among the run's scored web pairs", lost)
    everything = _examples(rows)
    note = f" in {folder}" + (f" ({strange} more are of another matcher)" if strange else "")
    check_examples(everything, f"labels{note}")
    found, counts = {}, []
    for source in sources:
        own = _examples([row for row in rows if row["source"] == source])
        right = int(own.match.sum())
        enough = min(right, len(own) - right) >= FEWEST
        found[source] = own if enough else replace(everything, own=len(own))
        counts.append(f"{source} texts: {right} right, {len(own) - right} wrong")
    if all(part.own is not None for part in found.values()):
        raise UsageError(
            f"the labels{note} are too few of each source ({'; '.join(counts)}): a calibration "
            f"needs at least {FEWEST} right and {FEWEST} wrong ones of one; review more pairs with "
            "`capfilt inspect RUN`"
        )
    return found


def _examples(rows: list[dict[str, Any]]) -> Examples:
    return Examples(
        np.array([row["itm_prob"] for row in rows], np.float64),
        np.array([row["itc_sim"] for row in rows], np.float64),
        np.array([row["match"] for row in rows], bool),
        np.array([row["key"] for row in rows], object),
        np.array([row.get("kind", "label") for row in rows], object),
    )


# --- made-up pairs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """A pair to score."""

    key: str
    text: str
    kind: str


@dataclass(frozen=True)
class _MadeUp:
    """Makes pairs up and scores them with the run's matcher."""

    run: RunDir
    config: Config
    device: str
    use_features: bool
    random: np.random.Generator

    def examples(
        self, pairs: Path | None, texts: dict[str, list[tuple[str, str]]]
    ) -> dict[str, Examples]:
        """Examples by source.

        Args:
            pairs: list of human pairs that nothing was trained on; None takes those that
                `matcher.val_fraction` held out.
            texts: by source, a key and a text for some of the web pictures.

        Raises:
            UsageError: no human pairs were held out.
        """
        from capfilt.models import folder as model_folder
        from capfilt.training.data import take_inventory
        from capfilt.training.swaps import WordSwaps

        images = None
        if pairs is None:
            fraction = self.config.matcher.val_fraction
            if not fraction or self.config.human is None:
                raise UsageError(
                    "there are no review labels, and no human pairs that the matcher was not "
                    "trained on (those it was trained on score far better): review pairs with "
                    "`capfilt inspect RUN`, give other human pairs with --pairs FILE, or set "
                    "matcher.val_fraction (0.1, say) and train again"
                )
            inventory = take_inventory(self.run, ("human",))
            inventory, held_out = inventory.split(fraction, self.config.seed)
            learnt_from: Iterable[str] = inventory.captions()
            keys = [f"{name}-{row:05d}" for name, rows in held_out.shards.items() for row in rows]
            human = dict(zip(keys, held_out.texts(), strict=True))
        else:
            images = self._read_pairs(pairs)
            human = {
                row["key"]: [text for text in row["captions"] if text]
                for row in images.select(["key", "captions"]).to_pylist()
            }
            learnt_from = [text for texts_ in human.values() for text in texts_]
            if self.config.human is not None:
                learnt_from = take_inventory(self.run, ("human",)).captions()
        model, tokenizer, _ = model_folder.load(self.run.local("models", "matcher"))
        model = model.to(self.device).eval()
        swaps = WordSwaps.learn(model, tokenizer, learnt_from)
        right = [_Asked(key, text, "match") for key, found in human.items() for text in found]
        if len(right) > PICTURES:
            right = [right[i] for i in np.sort(self.random.choice(len(right), PICTURES, False))]
        swapped = [
            _Asked(pair.key, text, "swap")
            for pair in right
            if (text := swaps.swap(pair.text, self.random)) is not None
        ]
        wrong = {
            source: self._mismatches(listed, model, tokenizer) for source, listed in texts.items()
        }
        asked = [*right, *swapped]
        of_human = self._score(
            asked, model, tokenizer, images, _shards_of(asked) if images is None else []
        )
        if len({row["key"] for row in of_human if row["match"]}) < FEWEST:
            raise UsageError(
                f"{len({row['key'] for row in of_human})} held-out human pictures are too few: at "
                f"least {FEWEST} are needed; raise matcher.val_fraction, or give --pairs FILE"
            )
        found = {}
        for source, listed in wrong.items():
            of_web = self._score(listed, model, tokenizer, None, _shards_of(listed))
            found[source] = _examples([*of_human, *of_web])
        return found

    def _read_pairs(self, pairs: Path) -> pa.Table:
        """The pictures and texts of a list, as `ingest` reads `human.pairs`."""
        from capfilt.stages.ingest import IngestStage, list_shards

        human = self.config.human or Human(pairs=str(pairs))
        section = human.model_copy(update={"pairs": str(pairs), "images": None, "limit": PICTURES})
        config = self.config.model_copy(update={"human": section})
        read = IngestStage(config, "human").open("cpu")
        parts = [read(Shard(self.run, name)) for name in list_shards(config, "human")]
        table = pa.concat_tables(parts)
        return table.filter(pa.compute.is_null(table["reason"]))

    def _mismatches(
        self, listed: list[tuple[str, str]], model: Any, tokenizer: Any
    ) -> list[_Asked]:
        """Each picture with a random other one's text, and with the nearest of a sample of them."""
        import torch

        from capfilt.models.tokens import clean, tokenize

        if len(listed) < FEWEST:
            raise UsageError(
                f"{len(listed)} scored web pictures are too few to make mismatches of; at least "
                f"{FEWEST} are needed"
            )
        if len(listed) > PICTURES:
            chosen = np.sort(self.random.choice(len(listed), PICTURES, False))
            listed = [listed[i] for i in chosen]
        cleaned = [clean(text) for _, text in listed]
        vectors = []
        with torch.inference_mode():
            for start in range(0, len(cleaned), 128):
                part = cleaned[start : start + 128]
                ids, mask = tokenize(
                    tokenizer, part, self.config.score.max_tokens, first_token="cls"
                )
                vectors.append(model.embed_text(ids.to(self.device), mask.to(self.device)).cpu())
        embedded = torch.cat(vectors).float().numpy()
        asked = []
        for row, (key, _) in enumerate(listed):
            others = self.random.choice(len(listed), min(CANDIDATES, len(listed)), False)
            others = np.array([i for i in others if cleaned[i] != cleaned[row]], np.int64)
            if len(others) == 0:
                continue
            near = others[int((embedded[others] @ embedded[row]).argmax())]
            asked.append(_Asked(key, listed[others[0]][1], "random"))
            asked.append(_Asked(key, listed[near][1], "near"))
        return asked

    def _score(
        self,
        asked: list[_Asked],
        model: Any,
        tokenizer: Any,
        images: pa.Table | None,
        shards: list[str],
    ) -> list[dict[str, Any]]:
        """Rows of examples: scores of pairs, read by the shards that hold their pictures."""
        import torch

        from capfilt.stages.batches import autocast
        from capfilt.stages.score import score_pairs

        by_key: dict[str, list[_Asked]] = {}
        for pair in asked:
            by_key.setdefault(pair.key, []).append(pair)
        rows = []
        with torch.inference_mode():
            for keys, features in self._features(model, images, shards):
                here = [row for row, key in enumerate(keys) if key in by_key]
                wanted = [
                    (place, pair) for place, row in enumerate(here) for pair in by_key[keys[row]]
                ]
                if not wanted:
                    continue
                with autocast(self.device, self.config.score.precision):
                    itm, itc = score_pairs(
                        model,
                        tokenizer,
                        features[here],
                        [pair.text for _, pair in wanted],
                        [place for place, _ in wanted],
                        self.config.score,
                    )
                for (_, pair), probability, similarity in zip(wanted, itm, itc, strict=True):
                    rows.append(
                        {
                            "key": pair.key,
                            "kind": pair.kind,
                            "match": pair.kind == "match",
                            "itm_prob": probability,
                            "itc_sim": similarity,
                        }
                    )
        return rows

    def _features(
        self, model: Any, images: pa.Table | None, shards: list[str]
    ) -> Iterator[tuple[list[str], Any]]:
        """Keys and image tokens, from a table of pictures or from shards of the run."""
        from capfilt.models.images import open_rgb, pixels
        from capfilt.stages.batches import autocast, image_batches

        size = self.config.score.batch_size
        for name in shards:
            shard = Shard(self.run, name)
            yield from image_batches(
                shard, model, self.use_features, size, self.device, self.config.score.precision
            )
        for start in range(0, 0 if images is None else images.num_rows, size):
            assert images is not None
            part = images.slice(start, size)
            pictures = [open_rgb(value.as_py()) for value in part["image"]]
            values = pixels(pictures, model.config.image_size_px, model.config.image_tower)
            with autocast(self.device, self.config.score.precision):
                tokens = model.encode_image(values.to(self.device))
            yield part["key"].to_pylist(), tokens


def _shards_of(asked: list[_Asked]) -> list[str]:
    return sorted({pair.key.rpartition("-")[0] for pair in asked})
