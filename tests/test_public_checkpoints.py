"""BLIP checkpoints in a whole run: what capfilt writes is what transformers says of the same files."""

import io
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import Said, Tiny
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BlipTextConfig,
    BlipVisionConfig,
)

from capfilt.config import Model
from capfilt.errors import InputError
from capfilt.models import folder as model_folder
from capfilt.models import hub
from capfilt.models.tokens import CLS_ID, DEC_ID, SEP_ID, clean, load_tokenizer
from capfilt.shards import Shard

PROMPT = "a picture of"
SIDE = 32
WORDS = ("a red square", "two dogs run on grass", "blue and gold", "the man jumps over a bicycle")


def write_blip(cls: type, folder: Path) -> None:
    """A small random BLIP with BERT's vocabulary, whose output depends on picture and text."""
    torch.manual_seed(len(cls.__name__))
    config = BlipConfig(
        text_config=BlipTextConfig(
            hidden_size=32, encoder_hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=40,
        ),
        vision_config=BlipVisionConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            image_size=SIDE, patch_size=16,
        ),
        image_text_hidden_size=24,
    )  # fmt: skip
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)


@pytest.fixture
def run(tiny: Tiny) -> Tiny:
    """Pictures with a texture of their own, four different web texts, two public checkpoints."""
    for source, count in (("human", 5), ("web", 7)):
        lines = []
        for number in range(count):
            noise = random.Random(f"{source}{number}").randbytes(3 * 6 * 6)
            Image.frombytes("RGB", (6, 6), noise).resize((40, 40)).save(
                tiny.folder / source / f"{number}.png"
            )
            lines.append({"image": f"{number}.png", "caption": WORDS[number % len(WORDS)]})
        listed = "".join(json.dumps(line) + "\n" for line in lines)
        (tiny.folder / f"{source}.jsonl").write_text(listed)
    for step, cls in (
        ("captioner", BlipForConditionalGeneration),
        ("matcher", BlipForImageTextRetrieval),
    ):
        write_blip(cls, tiny.folder / step)
        tiny.values[step] = {"checkpoint": str(tiny.folder / step)}
    tiny.values["captioner"]["prompt"] = PROMPT
    tiny.values["model"] = {"preset": "base", "image_size_px": SIDE}
    tiny.values["caption"] = {
        "method": "beam", "num_beams": 3, "repetition_penalty": 1.0, "min_tokens": 6, "max_tokens": 12,
    }  # fmt: skip
    tiny.values["score"] = {"first_token": "cls", "store_embeddings": True}
    return tiny


def tables(run: Tiny, table: str) -> list[dict]:
    return [
        row
        for name in run.run.shards(table)
        for row in Shard(run.run, name).read(table).to_pylist()
    ]


@pytest.mark.parametrize("side", [SIDE, 64])
def test_a_run_says_what_transformers_says(
    run: Tiny, capfilt: Callable[..., Said], side: int
) -> None:
    run.values["model"]["image_size_px"] = (
        side  # another than the checkpoint's: positions are interpolated
    )
    said = capfilt("run", run.config)
    assert said.code == 0, said.err
    processor = BlipImageProcessorPil(size={"height": side, "width": side})
    tokenizer = load_tokenizer()
    captioner = BlipForConditionalGeneration.from_pretrained(run.folder / "captioner").eval()
    matcher = BlipForImageTextRetrieval.from_pretrained(run.folder / "matcher").eval()
    pixels = {}
    for row in tables(run, "images"):
        picture = Image.open(io.BytesIO(row["image"])).convert("RGB")
        pixels[row["key"]] = processor(picture, return_tensors="pt")["pixel_values"]
    assert len(pixels) == 12

    prompt = [DEC_ID, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"], SEP_ID]
    captions = {row["key"]: row["caption"] for row in tables(run, "captions")}
    assert len(captions) == 7 and len(set(captions.values())) > 1
    for key, caption in captions.items():
        with torch.no_grad():
            (ids,) = captioner.generate(
                pixels[key], input_ids=torch.tensor([prompt]), num_beams=3, do_sample=False, min_length=6,
                max_length=12, interpolate_pos_encoding=True,
            )  # fmt: skip
        text = tokenizer.decode(ids[len(prompt) - 1 :], skip_special_tokens=True)
        assert caption == text

    scores = tables(run, "scores")
    assert len(scores) == 5 + 7 + 7 and all(row["error"] is None for row in scores)
    assert max(r["itm_prob"] for r in scores) - min(r["itm_prob"] for r in scores) > 0.05
    for row in scores:
        ids = tokenizer(clean(row["caption"]), return_tensors="pt", truncation=True, max_length=35)
        assert ids["input_ids"][0, 0] == CLS_ID
        shared = {**ids, "pixel_values": pixels[row["key"]], "interpolate_pos_encoding": True}
        shared.pop("token_type_ids", None)
        with torch.no_grad():
            itm = matcher(**shared).itm_score.softmax(-1)[0, 1]
            itc = matcher(**shared, use_itm_head=False).itm_score[0, 0]
        assert row["itm_prob"] == pytest.approx(float(itm), abs=1e-4)
        assert row["itc_sim"] == pytest.approx(float(itc), abs=1e-4)


def test_the_small_presets_features_are_not_given_to_a_vit(
    run: Tiny, capfilt: Callable[..., Said]
) -> None:
    run.values["model"] = {"preset": "small"}
    said = capfilt("run", run.config)
    assert said.code == 2
    assert "captioner.checkpoint: " in said.err and "image_tower vit, image_size_px 32" in said.err
    assert "set model.preset: base and model.image_size_px: 32" in said.err
    assert not (run.run.exists(run.run.at("models", "captioner", "manifest.json")))


def test_a_finetuned_checkpoint_goes_back_to_transformers(
    run: Tiny, capfilt: Callable[..., Said]
) -> None:
    for step in ("captioner", "matcher"):
        run.values[step] = {
            **run.values[step], "checkpoint": None, "init": run.values[step]["checkpoint"], "epochs": 4,
            "batch_size": 2, "lr": 1e-3, "warmup_steps": 1, "val_fraction": 0.2,
        }  # fmt: skip
    run.values["score"] = {"first_token": "enc"}
    said = capfilt("run", run.config)
    assert said.code == 0, said.err
    assert len(tables(run, "captions")) == 7 and len(tables(run, "export")) >= 5
    for step, cls in (
        ("captioner", BlipForConditionalGeneration),
        ("matcher", BlipForImageTextRetrieval),
    ):
        model, *_ = model_folder.load(run.run.local("models", step))
        hub.save_transformers(model, run.folder / "back", cls.__name__)
        again, info = cls.from_pretrained(run.folder / "back", output_loading_info=True)  # type: ignore[attr-defined]
        assert not info["missing_keys"] and not info["unexpected_keys"]
        before = cls.from_pretrained(run.folder / step)  # type: ignore[attr-defined]
        moved = [
            float((new - old).detach().abs().max())
            for new, old in zip(again.parameters(), before.parameters(), strict=True)
        ]
        assert max(moved) > 1e-4  # it learned


def test_a_checkpoint_without_the_head_is_not_taken_as_it_is(
    run: Tiny, capfilt: Callable[..., Said]
) -> None:
    run.values["matcher"] = {"checkpoint": str(run.folder / "captioner")}
    assert capfilt("ingest", run.config).code == 0
    said = capfilt("finetune", "matcher", run.config)
    assert said.code == 2
    assert "matcher.checkpoint: " in said.err and "this is a captioner, not a matcher" in said.err


def test_what_a_checkpoint_lacks_starts_the_same_each_time(run: Tiny) -> None:
    load = partial(model_folder.load_checkpoint, key="matcher.init", config=Model(preset="base"))
    first, second = (load(str(run.folder / "captioner"))[0].itm_head.weight for _ in range(2))
    assert torch.equal(first, second)


def test_a_damaged_model_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "capf')
    with pytest.raises(InputError, match=r"config\.json: not JSON"):
        model_folder.load(tmp_path)


def test_web_pairs_alone_are_enough_where_nothing_is_trained(
    run: Tiny, capfilt: Callable[..., Said]
) -> None:
    run.values["pretrain"] = None
    with_human = capfilt("run", run.config)
    assert with_human.code == 0, with_human.err
    expected = [row for row in tables(run, "scores") if row["source"] != "human"]
    del run.values["human"]
    run.values["run_dir"] = str(run.folder / "web-alone")
    assert "human" not in capfilt("check", run.config).out
    said = capfilt("run", run.config)
    assert said.code == 0, said.err
    assert sorted(run.run.shards("images")) == sorted(run.run.shards("scores"))
    assert {name[:3] for name in run.run.shards("images")} == {"web"}
    assert tables(run, "scores") == expected
    assert len(tables(run, "decisions")) == 14
    assert "nothing to do" in capfilt("run", run.config).out
    report = (run.folder / "web-alone" / "report.html").read_text(encoding="utf-8")
    assert "synthetic" in report
    said = capfilt("calibrate", run.config, "--target", "precision=0.9")
    assert said.code == 2 and "there are no review labels" in said.err


def test_a_checkpoint_is_the_same_work_whatever_the_pictures_and_the_training_settings(
    run: Tiny, capfilt: Callable[..., Said]
) -> None:
    assert capfilt("ingest", run.config).code == 0
    assert capfilt("finetune", "matcher", run.config).code == 0
    run.values["matcher"]["epochs"] = 3
    run.values["human"]["limit"] = 2
    assert capfilt("ingest", run.config, "--redo").code == 0
    assert "nothing to do" in capfilt("finetune", "matcher", run.config).out
    run.values["model"]["image_size_px"] = 64
    said = capfilt("finetune", "matcher", run.config)
    assert said.code == 2 and "image_size_px" in said.err
