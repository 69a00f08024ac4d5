import dataclasses
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import TINY, picture, tiny_med, write_features, write_run, write_shard

from capfilt.config import Config
from capfilt.errors import ConfigError, InputError
from capfilt.shards import RunDir
from capfilt.training import data
from capfilt.training import pretrain as pretraining
from capfilt.training.data import Batch, Inventory, Stream, take_inventory


def plain_inventory(sizes: list[int]) -> Inventory:
    """Pictures that exist in name only."""
    names = [f"web-{i:05d}" for i in range(len(sizes))]
    return Inventory(
        RunDir("nowhere"),
        {name: np.arange(size) for name, size in zip(names, sizes, strict=True)},
        {name: np.arange(size) for name, size in zip(names, sizes, strict=True)},
    )


def stream_of(inventory: Inventory, run: RunDir | None = None, **options: object) -> Stream:
    arguments = {"batch_size": 4, "seed": 0, "use_features": False, **options}
    return Stream(run or RunDir("nowhere"), inventory, TINY, **arguments)


def same(left: Batch, right: Batch) -> bool:
    for field in dataclasses.fields(Batch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            return False
    return True


def joined(batches: list[Batch], field: str) -> list[str]:
    return [value for batch in batches for value in getattr(batch, field)]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(1, 40),
)
def test_an_epoch_gives_every_picture_once(
    sizes: list[int], batch_size: int, epoch: int, window: int
) -> None:
    stream = stream_of(plain_inventory(sizes), batch_size=batch_size)
    old, data.WINDOW_ROWS = data.WINDOW_ROWS, window
    try:
        batches = list(stream._epoch(epoch))
        again = list(stream_of(plain_inventory(sizes), batch_size=batch_size)._epoch(epoch))
        other = list(stream_of(plain_inventory(sizes), batch_size=batch_size, seed=1)._epoch(epoch))
    finally:
        data.WINDOW_ROWS = old
    size = min(batch_size, sum(sizes))
    assert len(batches) == max(1, sum(sizes) // batch_size)
    assert all(len(members) == size for members, _ in batches)
    given_out = Counter(member for members, _ in batches for member in members)
    assert set(given_out.values()) == {1}
    assert sum(given_out.values()) == len(batches) * size > sum(sizes) - size
    assert batches == again
    assert sum(sizes) < 12 or batches != other
    for members, names in batches:
        # a window is one shard or fits, and a batch goes back to the window before at most
        assert len(names) == 1 or sum(sizes[int(n[-5:])] for n in names) <= window
        assert len({m for m in members if m[0] not in names}) < size


def test_the_order_differs_between_epochs() -> None:
    stream = stream_of(plain_inventory([40]), batch_size=40)
    orders = [next(stream._epoch(epoch))[0] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7])
def test_going_on_at_a_step_gives_what_running_there_gives(tmp_path: Path, start: int) -> None:
    run = write_run(tmp_path, {"human-00000": 5, "web-00000": 8})
    inventory = take_inventory(run, ("human", "web"))
    whole = list(islice(stream_of(inventory, run).batches(), 9))
    rest = list(islice(stream_of(inventory, run).batches(start), 9 - start))
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))
    assert not torch.equal(whole[0].pixels, whole[3].pixels)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_parts_are_the_batch(tmp_path: Path, world_size: int) -> None:
    run = write_run(tmp_path, {"web-00000": 13})
    inventory = take_inventory(run, ("web",))
    whole = list(islice(stream_of(inventory, run).batches(), 4))
    parts = [
        list(islice(stream_of(inventory, run).batches(rank=rank, world_size=world_size), 4))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        mine = [part[step] for part in parts]
        assert joined(mine, "keys") == batch.keys
        assert joined(mine, "captions") == batch.captions
        assert torch.equal(torch.cat([b.pixels for b in mine]), batch.pixels)
        assert torch.equal(torch.cat([b.image_ids for b in mine]), batch.image_ids)


def test_a_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"batch_size: a batch of 4 .* 3 processes"):
        stream_of(plain_inventory([9])).batches(world_size=3)


def test_only_the_shards_of_the_window_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, {f"web-{i:05d}": 6 for i in range(8)})
    stream = stream_of(take_inventory(run, ("web",)), run, batch_size=5)
    monkeypatch.setattr(data, "WINDOW_ROWS", 12)
    read: list[str] = []
    real = stream._read
    monkeypatch.setattr(stream, "_read", lambda name: (read.append(name), real(name))[1])
    for _ in islice(stream.batches(), 9):
        # two of the window, and what the batch on its border still needs
        assert len(stream._held) <= 4
    # each shard once in the first epoch; the batch ahead may have begun the second
    assert len(read) <= 8 + 2
    assert set(read[:8]) == set(stream.inventory.shards)


def test_validation_reads_every_picture_in_order_with_its_first_text(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"human-00000": 5, "human-00001": 4})
    stream = stream_of(take_inventory(run, ("human",)), run, train=False)
    batches = list(stream.in_order())
    assert [len(b.keys) for b in batches] == [4, 4, 1]
    assert joined(batches, "keys") == [f"human-00000-{i:05d}" for i in range(5)] + [
        f"human-00001-{i:05d}" for i in range(4)
    ]
    assert joined(batches, "captions") == [picture(i)[1] for i in range(9)]
    assert all(b.human.all() for b in batches)


def test_what_cannot_be_used_is_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDir(str(tmp_path))
    good = {"image": picture(0)[0], "captions": ["A red dog.", "  ", ""]}
    rows = [
        good,
        {"image": picture(1)[0], "captions": ["", " .! "]},
        {"image": picture(1)[0], "captions": []},
        {"captions": ["a cat"], "reason": "download_failed"},
        {"captions": ["a cat"], "reason": "image_unreadable"},
        good,
    ]
    write_shard(run, "human-00000", rows)
    caplog.set_level("INFO")
    inventory = take_inventory(run, ("human",))
    assert len(inventory) == 2
    assert list(inventory.texts()) == [["a red dog"], ["a red dog"]]
    assert inventory.skipped == {"empty_caption": 2, "download_failed": 1, "image_unreadable": 1}
    assert inventory.examples["empty_caption"] == ["human-00000-00001", "human-00000-00002"]
    assert "2 " in caplog.text and "human-00000-00001" in caplog.text
    # equal bytes are the same picture
    assert len(set(inventory.image_ids["human-00000"].tolist())) == 1
    part, held_out = inventory.split(0.0, 0)
    assert part.skipped == inventory.skipped and len(held_out) == 0


def test_nothing_left_is_an_error_that_says_what_was_there(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    write_shard(run, "human-00000", [{"captions": ["a cat"], "reason": "image_unreadable"}] * 3)
    with pytest.raises(
        InputError, match=r"two pictures .* found 0; left out: \{'image_unreadable': 3\}"
    ):
        take_inventory(run, ("human",))
    with pytest.raises(InputError, match="found 0"):
        take_inventory(RunDir(str(tmp_path / "none")), ("human",))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 5), st.floats(0.0, 0.6), st.integers(20, 60))
def test_the_split_is_disjoint_and_stable(seed: int, fraction: float, size: int) -> None:
    inventory = plain_inventory([size, size])
    train, held_out = inventory.split(fraction, seed)
    for name, rows in inventory.shards.items():
        parts = [part.shards.get(name, np.array([], int)) for part in (train, held_out)]
        assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    assert len(train) == sum(len(ids) for ids in train.image_ids.values())
    # a picture's part does not change when pictures come after it
    longer, _ = plain_inventory([size + 10, size]).split(fraction, seed)
    first = [row for row in longer.shards["web-00000"].tolist() if row < size]
    assert first == train.shards["web-00000"].tolist()


def test_a_split_that_leaves_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match=r"val_fraction: 0\.99"):
        plain_inventory([4]).split(0.99, 0)


def test_a_picture_that_rotted_names_its_key_and_shard(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    good = picture(0)
    rows = [{"image": good[0], "captions": [good[1]]} for _ in range(4)]
    rows[2] = {"image": good[0][:50], "captions": ["a cut one"]}
    write_shard(run, "web-00000", rows)
    stream = stream_of(take_inventory(run, ("web",)), run)
    with pytest.raises(InputError, match=r"images/web-00000\.parquet: the picture web-00000-00002"):
        next(stream.batches())


def test_features_are_found_by_key(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    rows = [{"image": picture(i)[0], "captions": [picture(i)[1]]} for i in range(6)]
    rows[1] = {"captions": ["gone"], "reason": "download_failed"}
    rows[3]["captions"] = [""]
    write_shard(run, "web-00000", rows)
    keys = [f"web-00000-{i:05d}" for i in (0, 2, 3, 4, 5)]
    width, tokens = TINY.image_width, TINY.image_tokens
    write_features(run, "web-00000", keys, tokens, width)
    stream = stream_of(take_inventory(run, ("web",)), run, use_features=True)
    (batch,) = stream.in_order()
    assert batch.pixels is None and batch.features.shape == (4, tokens, width)
    assert batch.features.dtype == torch.float32
    assert [keys[int(row)] for row in batch.features[:, 0, 0]] == batch.keys
    write_features(run, "web-00000", keys[:3], tokens, width)
    with pytest.raises(InputError, match=r"no features of 2 pictures, web-00000-00004"):
        next(stream_of(take_inventory(run, ("web",)), run, use_features=True).in_order())


def test_pretraining_crops_further_than_finetuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, {"human-00000": 6})
    seen: list[tuple[float, float]] = []

    def augment(image, rng, size_px, scale):  # type: ignore[no-untyped-def]
        seen.append(scale)
        return image

    monkeypatch.setattr(data, "augment", augment)
    inventory = take_inventory(run, ("human",))
    for more in ({}, {"crop_scale": (0.2, 1.0)}):
        stream = Stream(run, inventory, TINY, batch_size=2, seed=0, use_features=False, **more)
        next(iter(stream.batches()))
    assert set(seen) == {(0.5, 1.0), (0.2, 1.0)}

    def stop(*arguments, **named):  # type: ignore[no-untyped-def]
        raise KeyError(named["crop_scale"])

    monkeypatch.setattr(pretraining, "Stream", stop)
    monkeypatch.setattr(pretraining.model_folder, "fresh_model", lambda *_: tiny_med())
    config = Config.model_validate(
        {"run_dir": str(tmp_path), "human": {"pairs": "x"}, "web": {"pairs": "x"}, "model": {"preset": "base"}}
    )  # fmt: skip
    with pytest.raises(KeyError, match=r"\(0\.2, 1\.0\)"):
        pretraining.pretrain(run, config, tmp_path, "a" * 64, "cpu", None)


def test_a_split_too_small_to_validate_says_so(caplog: pytest.LogCaptureFixture) -> None:
    plain_inventory([40]).split(1e-6, 0)
    assert "holds out 0, too few to measure" in caplog.text
