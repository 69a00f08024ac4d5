"""A model on disk: weights, config, tokenizer and the vocabulary that its LM head was trained on.

Also where a training starts: a preset's pretrained parts, the run's own pretraining, or a
checkpoint.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from capfilt.config import Captioner, Config, Matcher, Model
from capfilt.errors import ConfigError, InputError
from capfilt.models import hub, initial, med_files
from capfilt.models.efficientnet_lite import VARIANTS
from capfilt.models.med import MED
from capfilt.models.med_config import MEDConfig, base, large, resized, small
from capfilt.models.tokens import load_tokenizer
from capfilt.shards import RunDir

VOCABULARY = "lm_vocabulary.json"
_TOWER = ("image_tower", "image_size_px", "lite_variant", "lite_levels")
"""What of a `MEDConfig` decides the image tower's output: the contents of `features/`."""


def preset_config(config: Model) -> MEDConfig:
    """The shape of the MED that a preset names."""
    shape = {"small": small, "base": base, "large": large}[config.preset]()
    if config.preset == "small":
        first = config.lite.split("+")[0]
        return replace(
            shape,
            lite_variant=config.lite,
            lite_levels=config.lite_levels,
            pooled_components=config.pooled_components,
            itm_bank=config.itm_bank,
            itm_words=config.itm_words,
            image_size_px=config.image_size_px or VARIANTS[first].image_size_px,
            grid_side=config.grid_side,
            grid_components=config.grid_components,
            itc_heads=config.itc_heads,
            embed_dim=shape.embed_dim * config.itc_heads,
        )
    return resized(shape, config.image_size_px) if config.image_size_px else shape


def fresh_model(config: Model, freeze_image: bool) -> MED:
    """A MED with the preset's pretrained parts and fresh cross-attention, projections and heads.

    Raises:
        InputError: weights are missing or don't fit.
    """
    torch.manual_seed(0)
    model = MED(preset_config(config))
    if config.preset == "small":
        initial.init_lite(model)
    elif config.image_weights is not None:
        hub.init_vit(model, config.image_weights)
    if config.preset == "small" and config.text_weights is None:
        initial.init_from_minilm(model)
    elif config.text_weights is not None:
        initial.init_from_bert(model, config.text_weights)
    if freeze_image:
        model.vision.requires_grad_(False)
    return model


def preset_tokenizer(config: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a fresh model: bert-base-uncased's, which MiniLM's package brings."""
    folder = config.text_weights
    return load_tokenizer(folder if folder is not None and Path(folder).is_dir() else None)


def save(
    model: MED, tokenizer: PreTrainedTokenizerBase, folder: Path, *, vocabulary: Tensor | None
) -> None:
    """Writes a model folder."""
    med_files.save(model, folder)
    tokenizer.save_pretrained(str(folder))
    listed = None if vocabulary is None else vocabulary.tolist()
    temporary = folder / f"{VOCABULARY}.tmp"
    temporary.write_text(json.dumps(listed), encoding="utf-8")
    os.replace(temporary, folder / VOCABULARY)


def load(
    folder: str | Path,
    kinds: tuple[hub.Kind, ...] | None = None,
    image_size_px: int | None = None,
) -> tuple[MED, PreTrainedTokenizerBase, Tensor | None]:
    """Reads a model folder, or a BLIP checkpoint by folder or hub name.

    Args:
        folder: which.
        kinds: what a BLIP checkpoint may be; None for any. Capfilt's own models are all of them.
        image_size_px: side of the pictures that a BLIP checkpoint shall read, its positions
            interpolated; None for its own.

    Returns:
        The model in evaluation mode, its tokenizer, and the vocabulary that its LM head knows (None
        for all of it).

    Raises:
        InputError: it is missing, of another kind, its keys don't fit, or it is capfilt's own and
            of another size.
    """
    path = Path(folder)
    model = hub.load(folder, kinds, image_size_px)
    if (path / VOCABULARY).exists():
        listed = json.loads((path / VOCABULARY).read_text(encoding="utf-8"))
        vocabulary = None if listed is None else torch.tensor(listed)
        return model, load_tokenizer(path), vocabulary
    has_tokenizer = (path / "vocab.txt").exists() or (path / "tokenizer.json").exists()
    return model, load_tokenizer(path if has_tokenizer else None), None


def load_checkpoint(
    name_or_folder: str, key: str, config: Model
) -> tuple[MED, PreTrainedTokenizerBase, Tensor | None]:
    """As `load`: a checkpoint that the config names under `key`, as its section `model` asks for.

    With `init` a training may start from any checkpoint, and what it lacks starts at random, the
    same each time; with `checkpoint` it must have the head that the step needs.

    Raises:
        InputError: it is missing, lacks the head, its keys don't fit, or it can't read pictures of
            that size.
        ConfigError: the run caches image features, and the checkpoint doesn't read such ones.
    """
    small = config.caches_features
    kinds: dict[str, tuple[hub.Kind, ...]] = {
        "captioner.checkpoint": ("captioner", "pretrained"),
        "matcher.checkpoint": ("matcher", "pretrained"),
    }
    torch.manual_seed(0)
    try:
        found = load(name_or_folder, kinds.get(key), None if small else config.image_size_px)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    own, cached = found[0].config, preset_config(config)
    if small and any(getattr(own, name) != getattr(cached, name) for name in _TOWER):
        advice = (
            f"set model.preset: base and model.image_size_px: {own.image_size_px}"
            if own.image_tower == "vit"
            else "set model.lite, model.lite_levels and model.image_size_px as it has them"
        )
        raise ConfigError(
            f"{key}: {name_or_folder} reads pictures by {_tower_text(own)}, and the features that "
            f"this run caches are by {_tower_text(cached)}; {advice}"
        )
    return found


def _tower_text(shape: MEDConfig) -> str:
    names = _TOWER[:2] if shape.image_tower == "vit" else _TOWER
    return ", ".join(f"{name} {getattr(shape, name)}" for name in names)


def start(
    run: RunDir, config: Config, settings: Matcher | Captioner
) -> tuple[MED, PreTrainedTokenizerBase, Tensor | None]:
    """Where a finetuning starts: `init` if given, else the run's pretraining, else the preset."""
    if settings.init is not None:
        step = "matcher" if isinstance(settings, Matcher) else "captioner"
        found = load_checkpoint(settings.init, f"{step}.init", config.model)
    elif config.pretrain is not None:
        found = load(run.local("models", "pretrain"))
    else:
        found = (
            fresh_model(config.model, settings.freeze_image),
            preset_tokenizer(config.model),
            None,
        )
    found[0].vision.requires_grad_(not settings.freeze_image)
    return found
