"""What an exported corpus teaches: small heads trained on it, then retrieval among unseen photos.

    python benchmarks/corpus_judge.py DATA [RUN] [--seeds 3]

DATA is the folder with val.jsonl and the pictures. Two small MLPs learn ITC over the pairs of
RUN/export, on frozen features (EfficientNet-Lite0, pooled; MiniLM, pooled); the figure is
text-to-image R@1 among 700 of val's pictures. Beside it stand the human pairs alone and all that
came in, judged in the same way.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import torch
from flickr8k_quality import read
from torch import Tensor, nn
from torch.nn import functional as F

from capfilt.config import Model
from capfilt.evaluation.retrieval import recall_at
from capfilt.models import losses
from capfilt.models.folder import fresh_model, preset_tokenizer
from capfilt.models.images import open_rgb, pixels
from capfilt.models.tokens import clean
from capfilt.training.pooled import pool_texts

PICTURES = 700
WIDTH = 384


def mlp(inputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(inputs),
        nn.Dropout(dropout / 2),
        nn.Linear(inputs, WIDTH),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(WIDTH, WIDTH),
    )


def teach(
    images: Tensor, texts: Tensor, pairs: list[tuple[int, int]], seed: int, steps: int = 600
) -> tuple[nn.Module, nn.Module]:
    """ITC over (picture, text) rows; of a picture with several texts a batch holds one."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    image_head, text_head = mlp(images.shape[1], 0.5), mlp(texts.shape[1], 0.1)
    temp = nn.Parameter(torch.tensor(0.07))
    owned: dict[int, list[int]] = {}
    for image, text in pairs:
        owned.setdefault(image, []).append(text)
    parameters = [*image_head.parameters(), *text_head.parameters(), temp]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    order: list[int] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        if len(order) < 256:
            order = rng.permutation(list(owned)).tolist()
        rows, order = order[:256], order[256:]
        chosen = [owned[row][int(rng.integers(len(owned[row])))] for row in rows]
        loss = losses.itc_loss(
            F.normalize(image_head(images[rows]), dim=-1),
            F.normalize(text_head(texts[chosen]), dim=-1),
            temp,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.clamp_temp(temp, 0.01)
    return image_head.eval(), text_head.eval()


@torch.inference_mode()
def examine(
    heads: tuple[nn.Module, nn.Module], images: Tensor, texts: Tensor, owners: np.ndarray
) -> float:
    """Text-to-image R@1."""
    image_embeds = F.normalize(heads[0](images), dim=-1)
    text_embeds = F.normalize(heads[1](texts), dim=-1)
    return recall_at((image_embeds @ text_embeds.T).numpy(), owners)["text_to_image_r1"]


class Frozen:
    """The features that the judge reads, each picture and each text encoded once."""

    def __init__(self) -> None:
        self.model = fresh_model(Model(), True).eval()
        self.tokenizer = preset_tokenizer(Model())

    @torch.inference_mode()
    def images(self, pictures: list[bytes]) -> Tensor:
        """`[N, 1280]`, the mean over the feature map."""
        found = []
        for start in range(0, len(pictures), 32):
            batch = [open_rgb(data) for data in pictures[start : start + 32]]
            found.append(self.model.encode_image(pixels(batch, 224, "efficientnet_lite")).mean(1))
        return torch.cat(found).clone()

    def texts(self, texts: list[str]) -> Tensor:
        """`[M, 384]`."""
        return pool_texts(self.model, self.tokenizer, texts, 35, "cpu").clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", nargs="?", default="runs/flickr8k-small", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()

    files = sorted((arguments.run / "export").glob("*.parquet"))
    export = ds.dataset(files).to_table(columns=["caption", "source", "sha256"])
    exported = list(zip(*(export[name].to_pylist() for name in export.column_names), strict=True))
    pictures: dict[str, bytes] = {}
    came = []
    for file in sorted((arguments.run / "images").glob("*.parquet")):
        columns = ["sha256", "image", "captions"]
        for row in ds.dataset(file).to_table(columns=columns).to_pylist():
            if row["image"] is not None:
                pictures.setdefault(row["sha256"], row["image"])
                came += [(row["sha256"], clean(text)) for text in row["captions"]]
    corpora = {
        "the exported corpus": [(sha, text) for text, _, sha in exported],
        "human pairs alone": [(sha, text) for text, source, sha in exported if source == "human"],
        "all as it came": came,
    }
    val = read(arguments.data / "val.jsonl")[:PICTURES]

    frozen = Frozen()
    image_row = {sha: row for row, sha in enumerate(pictures)}
    images = frozen.images(list(pictures.values()))
    listed = sorted({text for pairs in corpora.values() for _, text in pairs}, key=len)
    text_row = {text: row for row, text in enumerate(listed)}
    texts = frozen.texts(listed)
    val_images = frozen.images([(arguments.data / row["image"]).read_bytes() for row in val])
    val_texts = frozen.texts([clean(text) for row in val for text in row["captions"]])
    owners = np.array([row for row, own in enumerate(val) for _ in own["captions"]])

    print(f"text-to-image R@1 among {len(val)} photos, {arguments.seeds} seeds")
    for name, pairs in corpora.items():
        rows = [(image_row[sha], text_row[text]) for sha, text in pairs]
        found = [
            examine(teach(images, texts, rows, seed), val_images, val_texts, owners)
            for seed in range(arguments.seeds)
        ]
        shown = " ".join(f"{value:.3f}" for value in found)
        print(f"  {name:<20} {np.mean(found):.3f}  ({shown}; {len(pairs):,} pairs)")


if __name__ == "__main__":
    main()
