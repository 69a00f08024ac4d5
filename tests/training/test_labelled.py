"""Reviewed pairs in ITM: found by content or position, balanced, learnt from, and remembered."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from small_run import TINY, picture, tiny_med, write_features, write_shard
from tiny import Said, Tiny

from capfilt import manifest
from capfilt.config import Score
from capfilt.errors import InputError
from capfilt.inspect.labels import Label, LabelStore
from capfilt.models import folder as model_folder
from capfilt.models.images import open_rgb, pixels
from capfilt.models.med import MED
from capfilt.models.tokens import load_tokenizer, tokenize
from capfilt.schema import CAPTIONS, pair_uid
from capfilt.shards import RunDir, Shard
from capfilt.stages.score import score_pairs
from capfilt.training.labelled import Labelled, fit_start, labelled_itm, read_labelled

Cli = Callable[..., Said]
LITE = dataclasses.replace(
    TINY, image_tower="efficientnet_lite", image_size_px=64, projection_hidden=32, embed_dim=32,
    text_pool="mean", image_pool="mean_max", text_residual=True, itc_token=True, itm_from_itc=True,
)  # fmt: skip


def reviewed_run(folder: Path) -> tuple[RunDir, dict[str, str]]:
    """Two web shards of four pictures, the fourth unreadable; uids by pair id."""
    run = RunDir(str(folder))
    number = 0
    for name in ("web-00000", "web-00001"):
        rows = []
        for row in range(4):
            data, text = picture(number)
            reason = "image_unreadable" if row == 3 else None
            rows.append({"image": data, "captions": [text.upper() + "!"], "reason": reason})
            number += 1
        write_shard(run, name, rows)
    synthetic = {"pair_id": "web-00000-00002/synthetic0", "key": "web-00000-00002",
                 "source": "synthetic", "caption": "a thing", "logprob": -1.0}  # fmt: skip
    run.write_table(run.table("captions", "web-00000"), pa.Table.from_pylist([synthetic], CAPTIONS))
    run.write_text(run.manifest("captions", "web-00000"), "{}")
    uids = {}
    for name in run.shards("images"):
        for row in Shard(run, name).read("images").to_pylist():
            uids[f"{row['key']}/text0"] = pair_uid(row["sha256"], row["captions"][0])
            uids[f"{row['key']}/synthetic0"] = pair_uid(row["sha256"], "a thing")
    return run, uids


def losses_of(model: MED, found, steps: int) -> list[float]:
    tokenizer = load_tokenizer()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        loss = labelled_itm(
            model, tokenizer, found, count=6, max_tokens=20, generator=generator, device="cpu"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_reviewed_pairs_are_found_and_learnt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, uids = reviewed_run(tmp_path / "run")
    verdicts = {
        uids["web-00001-00002/text0"]: True,
        "web-00000-00001/text0": False,
        uids["web-00000-00000/text0"]: True,
        uids["web-00000-00002/synthetic0"]: False,
        uids["web-00000-00003/text0"]: True,  # unreadable
        "gone": False,
    }
    found = read_labelled(run, verdicts, use_features=False)
    assert found.texts == [picture(0)[1], picture(1)[1], "a thing", picture(6)[1]]
    assert found.match.tolist() == [1, 0, 0, 1] and found.rows.tolist() == [0, 1, 2, 3]
    assert found.pictures == [picture(number)[0] for number in (0, 1, 2, 6)]
    # a synthetic text's verdict says nothing of the text that came with the picture
    assert found.web_pictures == {
        "web-00000-00000": True, "web-00000-00001": False, "web-00001-00002": True,
    }  # fmt: skip
    assert "2 of 6 reviewed pairs are not in" in caplog.text

    model = tiny_med()
    losses = losses_of(model, found, 25)
    assert losses[-1] < 0.5 * losses[0]
    assert any(p.grad is not None for p in model.vision.parameters()), "a tower that is trained"
    only_wrong = read_labelled(run, {uids["web-00000-00001/text0"]: False}, use_features=False)
    assert losses_of(tiny_med(), only_wrong, 1)[0] > 0


def test_cached_features_take_the_place_of_pictures(tmp_path: Path) -> None:
    run, uids = reviewed_run(tmp_path / "run")
    keys = [f"web-00000-{row:05d}" for row in range(3)]
    write_features(run, "web-00000", keys, 4, 1280)
    verdicts = {uids[f"{keys[2]}/text0"]: True, uids[f"{keys[0]}/text0"]: False}
    found = read_labelled(run, verdicts, use_features=True)
    assert found.cached and [len(data) for data in found.pictures] == [2 * 4 * 1280] * 2
    torch.manual_seed(0)
    model = MED(LITE).train()
    assert losses_of(model, found, 2)[0] > 0
    write_features(run, "web-00000", keys[:2], 4, 1280)
    with pytest.raises(InputError, match=f"no features of 1 reviewed pictures, {keys[2]}"):
        read_labelled(run, verdicts, use_features=True)


@pytest.mark.parametrize("pairs", [30, 1500])
def test_itm_starts_from_what_reviewers_said(pairs: int) -> None:
    """Scale and bias go to those that made the labels, as far as there are labels."""
    torch.manual_seed(0)
    model = MED(dataclasses.replace(LITE, itm_bank=8, itm_words=12))
    start, tokenizer = model.itm_start, load_tokenizer()
    with torch.no_grad():
        start.bank_images.normal_()
        start.bank_texts.normal_()
        start.neighbours.images.normal_()
        start.neighbours.texts.normal_()
        start.style.weight.normal_(std=5)
        start.words.columns[104:] = torch.arange(len(start.words.columns) - 104) % 12
        for net in start.words.nets:
            net[-1].weight.normal_(std=0.3)
        start.weights.copy_(torch.tensor([4.0, -1.0, -1.0, 0.1, 0.2, 0.1, 0.1]))
        start.bias.fill_(-1.0)
    rng = torch.Generator().manual_seed(1)
    tokens = [(6 * torch.rand(4, 1280, generator=rng)).half() for _ in range(20)]
    words = ["red", "blue", "a", "dog", "cat", "runs", "on", "grass", "two", "men"]
    drawn = torch.randint(10, (pairs, 4), generator=rng).tolist()
    texts = [" ".join(words[i] for i in row) for row in drawn]
    rows = torch.randint(20, (len(texts),), generator=rng)
    said = Labelled([t.numpy().tobytes() for t in tokens], True, rows, texts, torch.zeros(1))

    def logits() -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            ids, mask = tokenize(tokenizer, texts, 12, first_token="cls")
            shown = torch.stack(tokens).float()[rows]
            embeds = model.known_image(shown), model.embed_text(ids, mask)
            pooled_texts = model.pool_text(ids, mask)
            return start(*embeds, ids, model.pool_image(shown), pooled_texts)

    before, weights = logits(), start.weights.detach().clone()
    truth = 1.5 * before + 2.0
    match = (torch.rand(len(texts), generator=rng) < truth.sigmoid()).long()
    fit_start(model, tokenizer, dataclasses.replace(said, match=match), 12, "cpu")
    after = logits()
    loss = partial(torch.nn.functional.binary_cross_entropy_with_logits, target=match.float())
    assert loss(after) < loss(before)
    if pairs == 1500:
        assert loss(after) < loss(truth) + 0.01
    # the parts weigh against each other what they did, and the order of pairs is the same
    torch.testing.assert_close(start.weights / start.weights[0], weights / weights[0])
    assert torch.equal(after.argsort(stable=True), before.argsort(stable=True))


@pytest.mark.parametrize("match", [0, 1])
def test_labels_of_one_kind_keep_the_order(match: int) -> None:
    torch.manual_seed(0)
    model = MED(LITE)
    tokens = torch.rand(4, 1280).half().numpy().tobytes()
    texts = ["a dog", "a cat on grass", "two men"]
    said = Labelled(
        [tokens], True, torch.zeros(3, dtype=torch.long), texts, torch.full((3,), match)
    )
    fit_start(model, load_tokenizer(), said, 12, "cpu")
    assert model.itm_start.weights[0].item() > 0
    assert (model.itm_start.bias.item() > 0) == bool(match)


def test_labels_of_another_run_are_refused(tmp_path: Path) -> None:
    run, _ = reviewed_run(tmp_path / "run")
    with pytest.raises(InputError, match="none of the 1 reviewed pairs is in"):
        read_labelled(run, {"gone": True}, use_features=False)


@pytest.fixture
def taught(tiny: Tiny, capfilt: Cli) -> Tiny:
    """The tiny run with a tiny matcher, finetuned without labels."""
    model_folder.save(tiny_med(), load_tokenizer(), tiny.folder / "init", vocabulary=None)
    tiny.values["model"] = {"preset": "base"}
    tiny.values["captioner"] = {"init": str(tiny.folder / "init")}
    tiny.values["matcher"] = {
        "init": str(tiny.folder / "init"), "epochs": 30, "batch_size": 4, "lr": 3e-3, "log_every": 1,
        "labels_per_step": 8,
    }  # fmt: skip
    tiny.values["device"] = "cpu"
    assert capfilt("ingest", tiny.config).code == 0
    assert capfilt("finetune", "matcher", tiny.config).code == 0
    return tiny


RIGHT, WRONG = ("web-00000-00000", "web-00001-00000"), ("web-00001-00002", "web-00002-00000")
"""Reviewed pictures; the texts of all of them fit, so that only labels can teach the difference."""


def pairs(tiny: Tiny) -> dict[str, dict]:
    return {
        row["key"]: row
        for name in tiny.run.shards("images", ("web",))
        for row in Shard(tiny.run, name).read("images").to_pylist()
    }


def label(tiny: Tiny, key: str, verdict: str, folder: str = "run/labels") -> str:
    row = pairs(tiny)[key]
    uid = pair_uid(row["sha256"], row["captions"][0])
    store = LabelStore(tiny.folder / folder)
    time = f"2025-01-31T12:00:{sum(1 for _ in store.lines()):02d}Z"
    store.append(Label(f"{key}/text0", uid, verdict, "ann", time))
    return str(store.folder)


def scores(tiny: Tiny) -> dict[str, float]:
    """ITM's probability of each reviewed pair, by the matcher that the run has."""
    model, tokenizer, _ = model_folder.load(tiny.run.local("models", "matcher"))
    rows = [pairs(tiny)[key] for key in RIGHT + WRONG]
    with torch.inference_mode():
        shown = pixels([open_rgb(row["image"]) for row in rows], 32, model.config.image_tower)
        texts = [row["captions"][0] for row in rows]
        features = model.encode_image(shown)
        itm, _ = score_pairs(model, tokenizer, features, texts, list(range(len(rows))), Score())
    return dict(zip(RIGHT + WRONG, itm, strict=True))


def record(tiny: Tiny) -> dict:
    found = manifest.read(tiny.run, tiny.run.at("models", "matcher", "manifest.json"))
    assert found is not None
    return found


def test_labels_move_the_scores_their_way_and_once(taught: Tiny, capfilt: Cli) -> None:
    before, first = scores(taught), record(taught)
    assert not {"labels", "labels_per_step"} & {*first["weights"], *first["config"]["matcher"]}
    for key in RIGHT:
        folder = label(taught, key, "right")
    for key in WRONG:
        folder = label(taught, key, "wrong")
    teach = ("finetune", "matcher", taught.config, "--labels", folder)

    said = capfilt(*teach)
    assert said.code == 0, said.err
    go_on = f"--set matcher.labels={folder} --redo score"
    assert said.out.endswith(f"go on with  capfilt run {taught.config} {go_on}\n")
    after = scores(taught)
    assert all(after[key] < 0.5 and after[key] < before[key] for key in WRONG), (before, after)
    assert all(after[key] > 0.5 for key in RIGHT)
    gap = [min(s[key] for key in RIGHT) - max(s[key] for key in WRONG) for s in (before, after)]
    assert gap[1] > gap[0] + 0.3
    assert record(taught)["training"]["labels"] == {"folder": folder, "right": 2, "wrong": 2}
    log = (Path(taught.run.path) / "models" / "matcher" / "log.jsonl").read_text().splitlines()
    assert len(log) == 30 and all("itm_labelled" in json.loads(line) for line in log)

    # the same labels, told in either way: nothing to do
    signed = record(taught)
    again = capfilt(*teach)
    assert again.code == 0 and again.out.startswith("nothing to do") and go_on in again.out
    assert (
        capfilt("finetune", "matcher", taught.config, "--set", f"matcher.labels={folder}").code == 0
    )
    assert record(taught) == signed

    # a config without labels does not go back unnoticed
    said = capfilt("finetune", "matcher", taught.config)
    assert said.code == 2 and f"--set matcher.labels={folder}" in said.err
    assert record(taught) == signed

    # another verdict is another training: asked for with --labels, refused otherwise
    label(taught, WRONG[0], "right")
    said = capfilt("finetune", "matcher", taught.config, "--set", f"matcher.labels={folder}")
    assert said.code == 2 and "weights.labels: '" in said.err and record(taught) == signed
    said = capfilt(*teach, "--set", "matcher.lr=0.001")
    assert said.code == 2 and "matcher.matcher.lr: 0.003 there, 0.001 now" in said.err
    assert record(taught) == signed
    said = capfilt(*teach, "--json", "--set", "matcher.labels_per_step=4")
    assert said.code == 0 and said.json["steps"][0]["done"] == 1
    assert record(taught)["training"]["labels"]["right"] == 3


def test_back_to_no_labels_is_told(
    taught: Tiny, capfilt: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    taught.values["matcher"]["epochs"] = 1
    without = capfilt("finetune", "matcher", taught.config, "--redo")
    assert without.code == 0 and "labels" not in caplog.text
    first = record(taught)["fingerprint"]
    folder = label(taught, RIGHT[0], "wrong")
    assert capfilt("finetune", "matcher", taught.config, "--labels", folder).code == 0
    assert capfilt("finetune", "matcher", taught.config, "--redo").code == 0
    assert f"learnt from the labels in {folder}" in caplog.text
    assert record(taught)["fingerprint"] == first


def test_labels_that_teach_nothing_leave_the_matcher_alone(taught: Tiny, capfilt: Cli) -> None:
    signed = record(taught)
    (taught.folder / "empty").mkdir()
    unsure = label(taught, RIGHT[0], "unsure", "unsure")
    LabelStore(taught.folder / "foreign").append(
        Label("web-00009-00000/text0", "0" * 64, "wrong", "ann", "2025-01-31T12:00:00Z")
    )
    for folder, expected in (
        (taught.folder / "gone", "gone' is not there; review pairs with `capfilt inspect RUN`"),
        (taught.folder / "empty", "empty' holds no labels"),
        (unsure, f"none of the 1 labels in '{unsure}' says that a pair is right or wrong"),
        (taught.folder / "foreign", "none of the 1 reviewed pairs is in"),
    ):
        said = capfilt("finetune", "matcher", taught.config, "--labels", folder)
        assert said.code == 2 and expected in said.err and said.out == "", said.err
        assert record(taught) == signed
    said = capfilt("check", taught.config, "--set", f"matcher.labels={unsure}")
    assert said.code == 2 and "matcher.labels: none of the 1 labels" in said.err
    label(taught, RIGHT[1], "right", "unsure")
    said = capfilt("check", taught.config, "--set", f"matcher.labels={unsure}")
    assert said.code == 0 and f"labels   {unsure}: 1 right, 0 wrong" in said.out
