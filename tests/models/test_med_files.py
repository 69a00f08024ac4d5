from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LITE, tiny

from capfilt.errors import ConfigError, InputError
from capfilt.models import med_files
from capfilt.models.med_config import SHARINGS


@pytest.mark.parametrize("sharing", SHARINGS)
def test_save_and_load(sharing: str, tmp_path: Path) -> None:
    model = tiny(dataclasses.replace(LITE, sharing=sharing))
    med_files.save(model, tmp_path)
    again = med_files.load(tmp_path)
    assert again.config == model.config and not again.training
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    first = (tmp_path / "model.safetensors").read_bytes()
    med_files.save(again, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_bad_keys_are_listed(tmp_path: Path) -> None:
    med_files.save(tiny(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["stray"] = torch.zeros(1)
    state["itm_head.bias"] = torch.zeros(3)
    del state["temp"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        med_files.load(tmp_path)
    message = str(error.value)
    assert "1 unknown: stray" in message and "1 missing: temp" in message
    assert "itm_head.bias (file: (3,), model: (2,))" in message and "model.safetensors" in message


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        med_files.load(tmp_path)
    med_files.save(tiny(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_widht": 3}))
    with pytest.raises(ConfigError, match="unknown text_widht"):
        med_files.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "blip"}))
    with pytest.raises(InputError, match="BLIP checkpoints"):
        med_files.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        med_files.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match="not a readable safetensors"):
        med_files.load(tmp_path)


def test_weights_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no weights"):
        med_files.read_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(InputError, match="not readable as weights"):
        med_files.read_weights(tmp_path)
    torch.save({"code": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="not readable as weights"):
        med_files.read_weights(tmp_path)
