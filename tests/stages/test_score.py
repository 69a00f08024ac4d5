"""Embeddings for search: of every usable picture and text, and the same space for queries."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from capfilt import manifest
from capfilt.config import Score
from capfilt.errors import InputError
from capfilt.inspect.embedder import open_embedder
from capfilt.inspect.search import open_embeddings
from capfilt.manifest import Identity
from capfilt.models import folder as model_folder
from capfilt.models.images import pixels
from capfilt.models.med import MED
from capfilt.models.med_config import MEDConfig
from capfilt.models.tokens import CLS_ID, ENC_ID, SEP_ID, load_tokenizer
from capfilt.schema import CAPTIONS, IMAGES
from capfilt.shards import RunDir, Shard
from capfilt.stage import identify, identify_shared, run_shard
from capfilt.stages.batches import image_batches, pixel_batches
from capfilt.stages.embed import Embedding, EmbedStage
from capfilt.stages.score import ScoreStage, score_pairs

KEYS = [f"web-00000-{row:05d}" for row in range(4)]


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Three pictures and one that failed; an empty text; a synthetic text each."""
    found = RunDir(str(tmp_path_factory.mktemp("run")))
    images, captions = [], []
    for key, colour, text in zip(
        KEYS, ("red", "blue", "green", None), ("a dog", "", "a cat runs", "lost"), strict=True
    ):
        data = png(colour) if colour else None
        images.append({**dict.fromkeys(IMAGES.names), "key": key, "source": "web", "status": "success", "captions": [text],
                       "image": data, "sha256": hashlib.sha256(data).hexdigest() if data else None,
                       "reason": None if data else "download_failed"})  # fmt: skip
        if data:
            captions.append({"pair_id": f"{key}/synthetic0", "key": key, "source": "synthetic", "caption": f"some {colour}",
                             "logprob": -1.0})  # fmt: skip
    for table, schema, rows in (("images", IMAGES, images), ("captions", CAPTIONS, captions)):
        found.write_table(found.table(table, "web-00000"), pa.Table.from_pylist(rows, schema))
        manifest.sign(
            found,
            found.manifest(table, "web-00000"),
            Identity(table, 1, {}),
            rows=4,
            counts={},
            seconds=0.0,
        )
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    model = MED(
        MEDConfig(
            image_size_px=32, vision_width=32, vision_depth=1, vision_heads=2, vision_mlp_width=48,
            vocab_size=len(tokenizer), text_width=32, text_depth=2, text_heads=4, text_ffn_width=48,
            max_positions=40, embed_dim=16,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():  # apart enough that each text has a direction of its own
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.startswith("vision"):
                parameter.normal_(std=0.2)
    model_folder.save(model, tokenizer, Path(found.local("models", "matcher")), vocabulary=None)
    return found


def do(run: RunDir, stage: EmbedStage | ScoreStage) -> pa.Table:
    shared = identify_shared(stage, run)
    run_shard(
        stage.open("cpu"), stage, Shard(run, "web-00000"), identify(stage, run, "web-00000", shared)
    )
    return Shard(run, "web-00000").read(stage.table)


def test_embeddings_agree_with_the_scores_and_with_queries(run: RunDir) -> None:
    folder = Path(run.local("models", "matcher"))
    assert open_embedder(run) is None and open_embeddings(run) is None
    table = do(run, EmbedStage(Embedding(max_tokens=35, batch_size=2), folder, False, "web"))
    texts = [f"{KEYS[0]}/text0", f"{KEYS[2]}/text0", *(f"{key}/synthetic0" for key in KEYS[:3])]
    assert table["id"].to_pylist() == sorted([*KEYS[:3], *texts])
    vectors = {
        name: np.frombuffer(vector, np.float16).astype(np.float32)
        for name, vector in zip(table["id"].to_pylist(), table["vector"].to_pylist(), strict=True)
    }
    scores = do(run, ScoreStage(Score(), folder, False, "web")).to_pylist()
    for row in scores:
        if row["error"] is None:
            assert row["itc_sim"] == pytest.approx(
                float(vectors[row["key"]] @ vectors[row["pair_id"]]), abs=5e-3
            )

    embeddings, embedder = open_embeddings(run), open_embedder(run)
    assert embeddings is not None and embedder is not None
    assert embeddings.top(embedder.text("A cat runs!"), "text", 1)[0][0] == f"{KEYS[2]}/text0"
    assert embeddings.top(embedder.picture(png("blue")), "image", 1)[0] == (
        KEYS[1],
        pytest.approx(1, abs=2e-3),
    )
    with pytest.raises(InputError, match="no word"):
        embedder.text(" ")
    with pytest.raises(InputError):
        embedder.picture(b"no picture")


def test_an_embedder_of_another_matcher_is_refused(run: RunDir) -> None:
    folder = Path(run.local("models", "matcher"))
    do(run, EmbedStage(Embedding(max_tokens=35, batch_size=2), folder, False, "web"))
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before + b" ")
    try:
        embedder = open_embedder(run)
        assert embedder is not None
        with pytest.raises(InputError, match="another matcher"):
            embedder.text("a dog")
    finally:
        weights.write_bytes(before)


@pytest.mark.parametrize("first_token", ["enc", "cls"])
def test_itm_starts_its_text_with_the_token_that_is_asked_for(
    run: RunDir, first_token: str
) -> None:
    model, tokenizer, _ = model_folder.load(run.local("models", "matcher"))
    shown = pixels([Image.new("RGB", (32, 32), c) for c in ("red", "blue")], 32, "vit")
    texts, owners = ["a dog", "a cat runs", "some red"], [0, 1, 0]
    with torch.no_grad():
        features = model.encode_image(shown)
        itm, _ = score_pairs(
            model, tokenizer, features, texts, owners, Score(first_token=first_token)
        )
        for text, owner, probability in zip(texts, owners, itm, strict=True):
            words = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[{"enc": ENC_ID, "cls": CLS_ID}[first_token], *words, SEP_ID]])
            cross = model.cross_keys_values(model.adapt(features[owner : owner + 1]))
            logits = model.itm_logits(ids, torch.ones_like(ids), cross)
            assert probability == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-5)


def test_bf16_scores_nearly_the_same_and_is_other_work(run: RunDir) -> None:
    folder = Path(run.local("models", "matcher"))
    stages = [ScoreStage(Score(precision=p), folder, False, "web") for p in ("fp32", "bf16")]
    shared = [identify_shared(stage, run) for stage in stages]
    first, second = (
        identify(stage, run, "web-00000", part) for stage, part in zip(stages, shared, strict=True)
    )
    assert first.fingerprint != second.fingerprint
    full, half = (stage.open("cpu")(Shard(run, "web-00000")).to_pydict() for stage in stages)
    scored = [row for row, error in enumerate(full["error"]) if error is None]
    for name in ("itm_prob", "itc_sim"):
        pairs = [(full[name][row], half[name][row]) for row in scored]
        assert all(abs(a - b) < 0.03 for a, b in pairs) and any(a != b for a, b in pairs)


def test_a_picture_that_was_damaged_since_is_named(run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(str(tmp_path))
    table = Shard(run, "web-00000").read("images").to_pylist()
    table[1]["image"] = table[1]["image"][:40]
    copy.write_table(copy.table("images", "web-00000"), pa.Table.from_pylist(table, IMAGES))
    model, *_ = model_folder.load(run.local("models", "matcher"))
    with pytest.raises(InputError, match=r"web-00000.* the picture web-00000-00001 could be read"):
        list(image_batches(Shard(copy, "web-00000"), model, False, 2, "cpu", "fp32"))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batches_come_in_order_whatever_their_size(run: RunDir, size: int) -> None:
    model, *_ = model_folder.load(run.local("models", "matcher"))
    found = list(pixel_batches(Shard(run, "web-00000"), model.config, size))
    assert [key for keys, _ in found for key in keys] == KEYS[:3]
    expected = pixels([Image.new("RGB", (32, 32), c) for c in ("red", "blue", "green")], 32, "vit")
    assert torch.equal(torch.cat([values for _, values in found]), expected)
