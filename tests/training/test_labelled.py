"""Reviewed pairs in ITM: found by content or position, balanced, and learnt from."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from small_run import picture, tiny_med, write_shard

from capfilt.errors import InputError
from capfilt.models.tokens import load_tokenizer
from capfilt.schema import SCORES
from capfilt.shards import RunDir
from capfilt.training.labelled import labelled_itm, read_labelled


def reviewed_run(folder: Path) -> RunDir:
    run = RunDir(str(folder))
    number = 0
    for name in ("web-00000", "web-00001"):
        rows, scores = [], []
        for row in range(4):
            data, text = picture(number)
            rows.append({"image": data, "captions": [text]})
            key = f"{name}-{row:05d}"
            scores.append({"pair_id": f"{key}/text0", "key": key, "source": "web", "caption": text,
                           "uid": f"u{number}", "itm_prob": 0.5, "itc_sim": 0.0,
                           "error": "image_unreadable" if number == 3 else None})  # fmt: skip
            number += 1
        write_shard(run, name, rows)
        run.write_table(run.table("scores", name), pa.Table.from_pylist(scores, SCORES))
        run.write_text(run.manifest("scores", name), "{}")
    return run


def test_reviewed_pairs_are_found_and_learnt(tmp_path: Path) -> None:
    run, model = reviewed_run(tmp_path / "run"), tiny_med()
    verdicts = {"u6": True, "web-00000-00001/text0": False, "u0": True, "u3": True, "gone": False}
    found = read_labelled(run, verdicts, model, use_features=False, device="cpu")
    assert found.texts == [picture(0)[1], picture(1)[1], picture(6)[1]]
    assert found.match.tolist() == [1, 0, 1] and found.rows.tolist() == [0, 1, 2]
    assert found.features.shape[0] == 3 and found.features.dtype == torch.float16

    tokenizer = load_tokenizer()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(25):
        generator = torch.Generator().manual_seed(step)
        loss = labelled_itm(
            model, tokenizer, found, count=6, max_tokens=20, generator=generator, device="cpu"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

    only_wrong = read_labelled(run, {"u1": False}, model, use_features=False, device="cpu")
    labelled_itm(
        model, tokenizer, only_wrong, count=3, max_tokens=20, generator=generator, device="cpu"
    ).backward()


def test_labels_of_another_run_are_refused(tmp_path: Path) -> None:
    run = reviewed_run(tmp_path / "run")
    with pytest.raises(InputError, match="none of the 1 reviewed pairs"):
        read_labelled(run, {"gone": True}, tiny_med(), use_features=False, device="cpu")
