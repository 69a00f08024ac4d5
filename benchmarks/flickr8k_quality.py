"""How good the models of pipelines/flickr8k-small.yaml are, on photos that they have not seen.

    python benchmarks/flickr8k_quality.py DATA [RUN] [--alt-text PARQUET]

DATA is the folder with val.jsonl, judged.jsonl and the pictures. Prints the matcher's AUC on noisy
texts of val's pictures (made here, seeded) and on people's judgements, retrieval among val's
pictures, and the captioner's CIDEr and BLEU-4.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from capfilt.config import Score
from capfilt.evaluation.captions import caption_scores
from capfilt.evaluation.filtering import auc_by_kind, roc_auc
from capfilt.evaluation.retrieval import recall_at
from capfilt.models import folder as model_folder
from capfilt.models import med
from capfilt.models.generation import generate, read_images
from capfilt.models.images import open_rgb, pixels
from capfilt.models.tokens import clean, decode, prompt_ids, tokenize
from capfilt.stages.score import score_pairs

SWAPS = [
    ["red", "blue", "green", "yellow", "black", "white", "brown", "orange", "pink", "purple"],
    ["man", "woman", "boy", "girl", "child", "dog"],
    ["men", "women", "boys", "girls", "children", "dogs"],
    ["one", "two", "three", "four", "five"],
    ["running", "sitting", "standing", "jumping", "walking", "swimming", "sleeping"],
    ["runs", "sits", "stands", "jumps", "walks", "swims"],
    ["water", "grass", "snow", "sand", "street", "beach"],
    ["large", "small"],
    ["left", "right"],
    ["ball", "frisbee", "stick", "bike", "rope"],
    ["shirt", "hat", "jacket", "dress", "shorts", "helmet"],
]
SHARES = {
    "clean": 0.46,
    "swapped": 0.20,
    "near_swap": 0.09,
    "alt_text": 0.15,
    "foil": 0.05,
    "boilerplate": 0.05,
}


def foil(text: str, rng: random.Random) -> str | None:
    words = text.split()
    places = [
        (i, group) for i, word in enumerate(words) for group in SWAPS if word.lower() in group
    ]
    if not places:
        return None
    place, group = rng.choice(places)
    words[place] = rng.choice([word for word in group if word != words[place].lower()])
    return " ".join(words)


def boilerplate(rng: random.Random) -> str:
    return rng.choice(
        [
            f"IMG_{rng.randrange(10**4):04d}.JPG",
            f"DSC{rng.randrange(10**5):05d}",
            f"photo-{rng.randrange(10**6)}-thumb.jpg",
            "Click to enlarge",
            "image not available",
            f"Page {rng.randrange(90)} of 120",
            "Free shipping on all orders",
            "Sign up for our newsletter",
        ]
    )


def noisy(
    captions: list[list[str]], alt_texts: list[str], rng: random.Random
) -> list[tuple[str, str]]:
    """One (text, kind) a picture, in the shares of a noisy web."""
    bags = [set(clean(" ".join(texts)).split()) for texts in captions]
    found = []
    for row, texts in enumerate(captions):
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        text = rng.choice(texts)
        other = rng.choice([i for i in range(len(captions)) if i != row])
        if kind == "alt_text" and not alt_texts:
            kind = "swapped"
        if kind == "swapped":
            text = rng.choice(captions[other])
        elif kind == "near_swap":
            words = set(clean(text).split())
            near = sorted(range(len(bags)), key=lambda i: -len(words & bags[i]))
            text = rng.choice(captions[rng.choice([i for i in near[:12] if i != row])])
        elif kind == "alt_text":
            text = rng.choice(alt_texts)
        elif kind == "foil":
            changed = foil(text, rng)
            kind, text = ("foil", changed) if changed else ("clean", text)
        elif kind == "boilerplate":
            text = boilerplate(rng)
        found.append((text, kind))
    return found


@torch.inference_mode()
def features_of(model: med.MED, folder: Path, names: list[str]) -> torch.Tensor:
    parts = []
    for start in range(0, len(names), 32):
        pictures = [open_rgb((folder / name).read_bytes()) for name in names[start : start + 32]]
        batch = pixels(pictures, model.config.image_size_px, model.config.image_tower)
        parts.append(model.encode_image(batch).half())
    return torch.cat(parts)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def scores_of(
    model: med.MED, tokenizer: object, features: torch.Tensor, texts: list[str], rows: list[int]
) -> np.ndarray:
    config, found = Score(max_tokens=35), np.zeros(len(texts))
    for start in range(0, len(features), 64):
        own = [i for i, row in enumerate(rows) if start <= row < start + 64]
        if own:
            part = features[start : start + 64].float()
            owners = [rows[i] - start for i in own]
            found[own] = score_pairs(
                model, tokenizer, part, [texts[i] for i in own], owners, config
            )[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", nargs="?", default="runs/flickr8k-small", type=Path)
    parser.add_argument("--alt-text", type=Path, help="Parquet file with a column TEXT")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--word-bonus", type=float, default=0.8, help="as in the YAML")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    matcher, tokenizer, _ = model_folder.load(arguments.run / "models" / "matcher")
    val = read(arguments.data / "val.jsonl")
    captions = [row["captions"] for row in val]
    features = features_of(matcher, arguments.data, [row["image"] for row in val])

    alt_texts = []
    if arguments.alt_text is not None:
        alt_texts = [t for t in pq.read_table(arguments.alt_text)["TEXT"].to_pylist() if t]
    pairs = noisy(captions, alt_texts, rng)
    kinds = [kind for _, kind in pairs]
    labels = [kind == "clean" for kind in kinds]
    found = scores_of(matcher, tokenizer, features, [t for t, _ in pairs], list(range(len(pairs))))
    print(f"matcher AUC on noisy texts   {roc_auc(labels, found):.3f}  (goal 0.965)")
    for kind, auc in auc_by_kind(labels, found, kinds).items():
        print(f"  against {kind:<18} {auc:.3f}")

    judged = read(arguments.data / "judged.jsonl")
    names = sorted({row["image"] for row in judged})
    places = {name: i for i, name in enumerate(names)}
    judged_features = features_of(matcher, arguments.data, names)
    texts = [row["caption"] for row in judged]
    found = scores_of(
        matcher, tokenizer, judged_features, texts, [places[r["image"]] for r in judged]
    )
    crowd = [
        (row["crowd_p_yes"] > 0.5, score)
        for row, score in zip(judged, found, strict=True)
        if row.get("crowd_p_yes") is not None
        and (row["crowd_p_yes"] > 0.5 or row["crowd_p_yes"] == 0)
    ]
    expert = [
        (statistics.median(row["expert_ratings"]) >= 3, score)
        for row, score in zip(judged, found, strict=True)
        if row.get("expert_ratings")
    ]
    print(f"matcher AUC, crowd           {roc_auc(*zip(*crowd, strict=True)):.3f}  (goal 0.92)")
    print(f"matcher AUC, experts         {roc_auc(*zip(*expert, strict=True)):.3f}  (goal 0.94)")

    with torch.inference_mode():
        images = torch.cat([matcher.embed_image(part.float()) for part in features.split(64)])
        listed = [(row, clean(text)) for row, own in enumerate(captions) for text in own]
        embeds = []
        for start in range(0, len(listed), 128):
            ids, mask = tokenize(tokenizer, [text for _, text in listed[start : start + 128]], 35)
            embeds.append(matcher.embed_text(ids, mask))
    sim = (images @ torch.cat(embeds).T).numpy()
    recall = recall_at(sim, np.array([row for row, _ in listed]))
    shown = "/".join(f"{recall[f'text_to_image_r{k}']:.3f}" for k in (1, 5, 10))
    print(f"text-to-image R@1/5/10       {shown}  (goal 0.18/0.43/0.57)")

    captioner, tokenizer, vocabulary = model_folder.load(arguments.run / "models" / "captioner")
    written = []
    with torch.inference_mode():
        for part in features.split(64):
            cross, bonus = read_images(captioner, part.float(), arguments.word_bonus, vocabulary)
            written += generate(
                captioner,
                cross,
                prompt_ids(tokenizer, ""),
                method="beam",
                repetition_penalty=1.1,
                min_length=5,
                max_length=24,
                vocab_ids=vocabulary,
                bonus=bonus,
            )
    result = caption_scores([decode(tokenizer, w.token_ids) for w in written], captions)
    shown = f"{result['cider']:.3f}, {result['bleu4']:.3f}"
    print(f"captioner CIDEr, BLEU-4      {shown}  (goal 0.50, 0.16)")
    print("  for instance:", "; ".join(decode(tokenizer, w.token_ids) for w in written[:3]))


if __name__ == "__main__":
    main()
