import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from small_run import TINY, write_run

from capfilt.config import HeadWarmup
from capfilt.errors import MismatchError
from capfilt.models.med import MED
from capfilt.models.med_files import unique_state
from capfilt.models.tokens import load_tokenizer, tokenize
from capfilt.schema import FEATURES
from capfilt.shards import Shard
from capfilt.training import warmup
from capfilt.training.data import Stream, take_inventory
from capfilt.training.pooled import pool_pairs

LITE = dataclasses.replace(
    TINY,
    image_tower="efficientnet_lite",
    image_size_px=64,
    text_pool="mean",
    image_pool="mean_max",
    projection_hidden=32,
    embed_dim=32,
    text_residual=True,
    itc_token=True,
    itm_from_itc=True,
)
SETTINGS = HeadWarmup(steps=120, weighted_steps=60, batch_size=32, lr=3e-3, dropout=0.2)


def warm_up(model, tokenizer, stream, folder: Path, *, settings=SETTINGS, **more):
    more = {
        "seed": 0,
        "fingerprint": os.urandom(32).hex(),
        "progress": lambda done, total: None,
        **more,
    }
    return warmup.warm_up_heads(
        model, tokenizer, stream, settings, max_tokens=16, device="cpu", folder=folder / "model", **more
    )  # fmt: skip


@pytest.fixture
def prepared(tmp_path: Path):
    """Human pairs that fit and web pairs of which every other has its neighbour's features."""
    run = write_run(tmp_path, {"human-00000": 60, "web-00000": 40})
    words = {}
    rng = np.random.default_rng(0)
    wrong = set()
    for name in ("human-00000", "web-00000"):
        table = Shard(run, name).read("images", ["key", "captions"])
        rows = []
        for row, (key, captions) in enumerate(zip(*table.to_pydict().values(), strict=True)):
            text = captions[0].split(" near")[0]
            if name.startswith("web") and row % 4 == 3:
                wrong.add(key)
                text = f"nothing of this {row}"
            base = words.setdefault(text, rng.random((1, 1280)))
            cells = base + 0.05 * rng.random((4, 1280))
            rows.append({"key": key, "tokens": cells.astype(np.float16).tobytes()})
        run.write_table(run.table("features", name), pa.Table.from_pylist(rows, schema=FEATURES))
    torch.manual_seed(0)
    model = MED(LITE)
    inventory = take_inventory(run, ("web", "human"))
    stream = Stream(
        run, inventory, model.config, batch_size=16, seed=0, use_features=True, train=False
    )
    return model, load_tokenizer(), stream, wrong


def test_web_pairs_that_do_not_fit_weigh_less(prepared, tmp_path: Path) -> None:
    model, tokenizer, stream, wrong = prepared
    seen = []
    weights = warm_up(
        model, tokenizer, stream, tmp_path, progress=lambda done, total: seen.append((done, total))
    )
    assert set(weights) == {f"web-00000-{row:05d}" for row in range(40)}
    assert min(weights.values()) == 0.0 and max(weights.values()) == 1.0
    right = np.mean([weight for key, weight in weights.items() if key not in wrong])
    assert right > np.mean([weights[key] for key in wrong]) + 0.2
    assert json.loads((tmp_path / "model" / "web_weights.json").read_text()) == weights
    assert seen[-1] == (180, 180)
    # ITM starts from the similarity: more similar is more probable, and its own part is silent
    assert model.itm_start.weights[0].item() > 0
    assert not model.itm_head.weight.any()


def test_the_same_seed_gives_the_same_heads(prepared, tmp_path: Path) -> None:
    model, tokenizer, stream, _ = prepared
    results = []
    for _ in range(2):
        weights = warm_up(model, tokenizer, stream, tmp_path, seed=3)
        results.append((weights, model.temp.item()))
    assert results[0] == results[1]


def test_a_stopped_training_keeps_what_the_warm_up_found(
    prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, tokenizer, stream, _ = prepared
    config = dataclasses.replace(
        LITE, pooled_components=16, grid_components=8, itm_bank=150, itm_words=60
    )
    settings = HeadWarmup(steps=20, weighted_steps=20, dropout=0.4, text_residual_scale=2.0)
    found, seen = [], []
    for fingerprint in ("a" * 64, "a" * 64, "b" * 64):
        torch.manual_seed(0)
        model = MED(config)
        steps: list[int] = []
        weights = warm_up(
            model, tokenizer, stream, tmp_path, settings=settings, fingerprint=fingerprint,
            progress=lambda done, total, steps=steps: steps.append(done),
        )  # fmt: skip
        found.append((weights, unique_state(model), model.config, str(model)))
        seen.append(len(steps))
    assert seen == [40, 0, 40]  # another training warms up its own
    first, again = found[:2]
    assert first[0] == again[0] and first[2:] == again[2:]
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    (path,) = (tmp_path / "model" / "checkpoints").glob("warmup-*-aaaaaaaaaaaa.pt")
    path.write_bytes(path.read_bytes()[:1000])
    warm_up(model, tokenizer, stream, tmp_path, settings=settings, fingerprint="a" * 64)
    assert "the heads are warmed up anew" in caplog.text
    with pytest.raises(MismatchError, match="another version of capfilt wrote it"):
        warm_up(
            MED(dataclasses.replace(config, itm_bank=100)), tokenizer, stream, tmp_path,
            settings=settings, fingerprint="a" * 64,
        )  # fmt: skip


def test_the_towers_are_not_touched(prepared, tmp_path: Path) -> None:
    model, tokenizer, stream, _ = prepared
    before = {n: p.clone() for n, p in model.named_parameters() if n.startswith("encoder.")}
    warm_up(model, tokenizer, stream, tmp_path, settings=HeadWarmup(steps=3, weighted_steps=3))
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])


def test_further_rounds_and_heads(prepared, tmp_path: Path) -> None:
    _, tokenizer, stream, wrong = prepared
    torch.manual_seed(0)
    model = MED(dataclasses.replace(LITE, itc_heads=2, embed_dim=64))
    seen = []
    weights = warm_up(
        model,
        tokenizer,
        stream,
        tmp_path,
        settings=SETTINGS.model_copy(update={"rounds": 2}),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (240, 240) and [done for done, _ in seen] == list(range(1, 241))
    right = np.mean([weight for key, weight in weights.items() if key not in wrong])
    assert right > np.mean([weights[key] for key in wrong]) + 0.2
    # the heads were trained apart: they are not the same
    first, second = model.vision_proj.heads
    assert not torch.equal(first[2].weight, second[2].weight)


def test_components_and_bank_are_found_in_the_data(prepared, tmp_path: Path) -> None:
    _, tokenizer, stream, wrong = prepared
    torch.manual_seed(0)
    config = dataclasses.replace(
        LITE, pooled_components=16, grid_components=8, itm_bank=150, itm_words=60
    )
    model = MED(config)
    weights = warm_up(model, tokenizer, stream, tmp_path)
    right = np.mean([weight for key, weight in weights.items() if key not in wrong])
    assert right > np.mean([weights[key] for key in wrong]) + 0.2
    start = model.itm_start
    # 100 pictures fill a bank of 150: all of them are there, half of them twice
    torch.testing.assert_close(start.bank_images.norm(dim=1), torch.ones(150))
    assert len(start.bank_images.unique(dim=0)) == 100
    similarity, common_text, common_image, *further = start.weights.tolist()
    assert similarity > 0 and common_text < 0 and common_image < 0
    assert len(further) == 4 and min(further) > 0  # style, neighbours, words, wrong word
    found = model.adapter.components.clone()
    torch.testing.assert_close(found @ found.T, torch.eye(8), atol=1e-3, rtol=0)
    pooled = pool_pairs(model, tokenizer, stream, 16, "cpu")
    assert torch.equal(model.adapter.components, found)  # what reads them knows them by now
    # the web's own texts ("nothing of this 3") are told from people's, who wrote none of them
    with torch.no_grad():
        style = start.style(model.project_text(pooled.texts))[:, 0]
    human = {text for row in np.flatnonzero(pooled.human) for text in pooled.owned[row]}
    web = {text for row in np.flatnonzero(~pooled.human) for text in pooled.owned[row]} - human
    assert style[sorted(human)].mean() > style[sorted(web)].mean() + 1
    known = (start.words.columns < start.words.size).nonzero()[:, 0].tolist()
    for word, token in zip(known, tokenizer.convert_ids_to_tokens(known), strict=True):
        assert start.words.whole[start.words.columns[word]] == token.isalpha()
    # the words of a picture's own text are held less against it than those of another's
    ids = tokenize(tokenizer, pooled.captions, 16)[0]
    own = torch.tensor([texts[0] for texts in pooled.owned])
    with torch.no_grad():
        logits = start.words.logits(pooled.images)
        right = start.words(logits, ids[own])[torch.from_numpy(pooled.human)]
        wrong = start.words(logits, ids[own.roll(7)])[torch.from_numpy(pooled.human)]
    assert right.mean() > wrong.mean() + 0.5
    assert not any(parameter.requires_grad for parameter in start.words.parameters())


def test_what_people_said_of_a_text_outweighs_the_heads(prepared, tmp_path: Path) -> None:
    model, tokenizer, stream, _ = prepared
    weights = warm_up(
        model,
        tokenizer,
        stream,
        tmp_path,
        reviewed={"web-00000-00000": False, "web-00000-00003": True, "web-00009-00000": True},
    )
    assert weights["web-00000-00000"] == 0.0 and weights["web-00000-00003"] == 1.0
    assert len(weights) == 40 and len(set(weights.values())) > 10
