"""BLIP's public checkpoints in and out: transformers' format, and the original release's names.

One table of names serves both directions. What a checkpoint does not hold (a captioner has no ITM
head) keeps its random start; the self-attention of the text tower that is absent starts as a copy
of the other's.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from capfilt.errors import ConfigError, InputError
from capfilt.models import med_files
from capfilt.models.med import MED
from capfilt.models.med_config import MEDConfig
from capfilt.models.med_files import check_keys, read_weights
from capfilt.models.vit import ViT, interpolate_positions

log = logging.getLogger(__name__)

Kind = Literal["captioner", "matcher", "blip_model", "pretrained"]
ARCHITECTURES: dict[str, Kind] = {
    "BlipForConditionalGeneration": "captioner",
    "BlipForImageTextRetrieval": "matcher",
    "BlipModel": "blip_model",
}
# Tables of position numbers, and output weights that are tied to ones that are read anyway.
_REDUNDANT = ("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
# The original release also stores the momentum encoders and the queues; a training resumes without
# them.
_MOMENTUM = (
    "visual_encoder_m.",
    "text_encoder_m.",
    "vision_proj_m.",
    "text_proj_m.",
    "image_queue",
    "text_queue",
    "idx_queue",
    "queue_ptr",
    "ptr_queue",
)


class Entry(NamedTuple):
    """One of MED's tensors, and the checkpoint's tensors that make it up (joined along dim 0)."""

    ours: str
    theirs: tuple[str, ...]


def _both(ours: str, *theirs: str) -> list[Entry]:
    return [
        Entry(f"{ours}.{part}", tuple(f"{t}.{part}" for t in theirs)) for part in ("weight", "bias")
    ]


def _vision_names(depth: int, original: bool) -> list[Entry]:
    if original:
        root, block = "visual_encoder", "visual_encoder.blocks.{}."
        top = ("cls_token", "pos_embed", "patch_embed.proj", "norm")
        inner = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    else:
        root, block = "vision_model", "vision_model.encoder.layers.{}."
        top = (
            "embeddings.class_embedding",
            "embeddings.position_embedding",
            "embeddings.patch_embedding",
            "post_layernorm",
        )
        inner = (
            "layer_norm1",
            "self_attn.qkv",
            "self_attn.projection",
            "layer_norm2",
            "mlp.fc1",
            "mlp.fc2",
        )
    entries = [
        Entry("vision.cls_token", (f"{root}.{top[0]}",)),
        Entry("vision.pos_embed", (f"{root}.{top[1]}",)),
        *_both("vision.patch_embed", f"{root}.{top[2]}"),
        *_both("vision.norm", f"{root}.{top[3]}"),
    ]
    for i in range(depth):
        for mine, name in zip(("norm1", "qkv", "proj", "norm2", "fc1", "fc2"), inner, strict=True):
            entries += _both(f"vision.blocks.{i}.{mine}", block.format(i) + name)
    return entries


def _text_names(tower: str, depth: int, root: str) -> list[Entry]:
    entries = [
        Entry(f"{tower}.embeddings.word.weight", (f"{root}embeddings.word_embeddings.weight",)),
        Entry(
            f"{tower}.embeddings.position.weight", (f"{root}embeddings.position_embeddings.weight",)
        ),
        *_both(f"{tower}.embeddings.norm", f"{root}embeddings.LayerNorm"),
    ]
    for i in range(depth):
        ours, theirs = f"{tower}.layers.{i}.", f"{root}encoder.layer.{i}."
        own, cross = theirs + "attention.", theirs + "crossattention."
        entries += [
            *_both(
                ours + "self_attention.qkv",
                own + "self.query",
                own + "self.key",
                own + "self.value",
            ),
            *_both(ours + "self_attention.out", own + "output.dense"),
            *_both(ours + "self_attention.norm", own + "output.LayerNorm"),
            *_both(ours + "cross_attention.query", cross + "self.query"),
            *_both(ours + "cross_attention.key_value", cross + "self.key", cross + "self.value"),
            *_both(ours + "cross_attention.out", cross + "output.dense"),
            *_both(ours + "cross_attention.norm", cross + "output.LayerNorm"),
            *_both(ours + "feed_forward.up", theirs + "intermediate.dense"),
            *_both(ours + "feed_forward.down", theirs + "output.dense"),
            *_both(ours + "feed_forward.norm", theirs + "output.LayerNorm"),
        ]
    return entries


def names(config: MEDConfig, kind: Kind, original: bool = False) -> list[Entry]:
    """The table of names of one kind of checkpoint.

    Args:
        config: for the depths.
        kind: `captioner` (vision, decoder), `matcher` (vision, encoder, ITC and ITM heads),
            `blip_model` (vision, encoder, ITC heads) or `pretrained` (everything; in the original
            release only).
        original: the key names of the original release instead of transformers'.
    """
    entries = _vision_names(config.vision_depth, original)
    if kind == "blip_model":
        return [
            *entries,
            *_text_names("encoder", config.text_depth, "text_model."),
            *_both("text_pooler", "text_model.pooler.dense"),
            Entry("vision_proj.weight", ("visual_projection.weight",)),
            Entry("text_proj.weight", ("text_projection.weight",)),
        ]
    if kind in ("captioner", "pretrained"):
        head = "text_decoder.cls.predictions."
        entries += _text_names("decoder", config.text_depth, "text_decoder.bert.")
        entries += _both("lm_head.dense", head + "transform.dense")
        entries += _both("lm_head.norm", head + "transform.LayerNorm")
        entries.append(Entry("lm_head.bias", (head + "bias",)))
    if kind in ("matcher", "pretrained"):
        entries += _text_names("encoder", config.text_depth, "text_encoder.")
        for head in ("vision_proj", "text_proj", "itm_head"):
            entries += _both(head, head)
        if original:
            entries.append(Entry("temp", ("temp",)))
    return entries


def _read_config(folder: Path) -> MEDConfig:
    from transformers import BlipConfig

    blip: Any = BlipConfig.from_pretrained(folder)
    text, vision = blip.text_config, blip.vision_config
    for where, act in (("text_config", text.hidden_act), ("vision_config", vision.hidden_act)):
        if act != "gelu":
            raise InputError(
                f"{folder / 'config.json'}: {where}.hidden_act is {act!r}; MED computes gelu"
            )
    return MEDConfig(
        image_size_px=int(vision.image_size),
        patch_size=int(vision.patch_size),
        vision_width=vision.hidden_size,
        vision_depth=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads,
        vision_mlp_width=vision.intermediate_size,
        vision_layer_norm_eps=vision.layer_norm_eps,
        vocab_size=text.vocab_size,
        text_width=text.hidden_size,
        text_depth=text.num_hidden_layers,
        text_heads=text.num_attention_heads,
        text_ffn_width=text.intermediate_size,
        max_positions=text.max_position_embeddings,
        dropout=float(text.hidden_dropout_prob),
        attention_dropout=float(text.attention_probs_dropout_prob),
        layer_norm_eps=text.layer_norm_eps,
        embed_dim=blip.image_text_hidden_size,
    )


def _infer_config(state: Mapping[str, Tensor], where: Path) -> MEDConfig:
    """The shapes of an original checkpoint, which has no config; heads are 64 wide, as released."""
    root = (
        "text_decoder.bert."
        if "text_decoder.bert.embeddings.LayerNorm.weight" in state
        else "text_encoder."
    )
    try:
        patch = state["visual_encoder.patch_embed.proj.weight"]
        positions = state["visual_encoder.pos_embed"]
        words = state[f"{root}embeddings.word_embeddings.weight"]
        mlp = state["visual_encoder.blocks.0.mlp.fc1.weight"]
        ffn = state[f"{root}encoder.layer.0.intermediate.dense.weight"]
        max_positions = len(state[f"{root}embeddings.position_embeddings.weight"])
    except KeyError as error:
        raise InputError(f"{where}: missing key {error}; not a checkpoint of BLIP") from None
    embed = state.get("vision_proj.weight")
    return MEDConfig(
        image_size_px=math.isqrt(positions.shape[1] - 1) * patch.shape[-1],
        patch_size=patch.shape[-1],
        vision_width=patch.shape[0],
        vision_depth=len(
            {k.split(".")[2] for k in state if k.startswith("visual_encoder.blocks.")}
        ),
        vision_heads=max(1, patch.shape[0] // 64),
        vision_mlp_width=len(mlp),
        vocab_size=len(words),
        text_width=words.shape[1],
        text_depth=len(
            {
                k.split("layer.")[1].split(".")[0]
                for k in state
                if k.startswith(f"{root}encoder.layer.")
            }
        ),
        text_heads=max(1, words.shape[1] // 64),
        text_ffn_width=len(ffn),
        max_positions=max_positions,
        embed_dim=256 if embed is None else len(embed),
    )


def _kind_of(state: Mapping[str, Tensor], where: Path) -> Kind:
    encoder = any(name.startswith("text_encoder.") for name in state)
    decoder = any(name.startswith("text_decoder.") for name in state)
    if any(name.startswith("text_model.") for name in state):
        return "blip_model"
    if encoder and decoder:
        return "pretrained"
    if encoder or decoder:
        return "captioner" if decoder else "matcher"
    some = ", ".join(sorted(state)[:5])
    raise InputError(f"{where}: not a checkpoint of BLIP; its keys begin: {some}")


def load(
    name_or_folder: str | Path,
    kinds: Kind | tuple[Kind, ...] | None = None,
    image_size_px: int | None = None,
    config: MEDConfig | None = None,
) -> MED:
    """Load a model, in evaluation mode on the CPU.

    Args:
        name_or_folder: a folder of capfilt's; a folder or a name on the Hugging Face hub of a
            `BlipForConditionalGeneration`, `BlipForImageTextRetrieval` or `BlipModel`; or a `.pth`
            of the original release.
        kinds: what the checkpoint must be, or may be; None: whatever its keys say.
        image_size_px: side of the images; positions are interpolated. None: the checkpoint's.
        config: overrides what is read from the checkpoint or inferred from its shapes.

    Returns:
        The model. BLIP's checkpoints give `sharing="all_but_self_attention"`.

    Raises:
        InputError: it is not found, or keys are unknown, missing or of another shape; the message
            lists them.
    """
    folder = Path(name_or_folder)
    if (folder / "config.json").is_file():
        try:
            own = (
                json.loads((folder / "config.json").read_text()).get("model_type") == "capfilt-med"
            )
        except json.JSONDecodeError as error:
            raise InputError(f"{folder / 'config.json'}: not JSON ({error})") from None
        if own:
            model = med_files.load(folder)
            side = model.config.image_size_px
            if image_size_px not in (None, side):
                raise InputError(
                    f"{folder}: image_size_px is {side}, not {image_size_px}: "
                    "a model of capfilt keeps the size that it was trained at"
                )
            return model
    path, state = read_weights(name_or_folder)
    original = any(name.startswith("visual_encoder.") for name in state)
    state = {
        name: tensor
        for name, tensor in state.items()
        if not name.endswith(_REDUNDANT) and not (original and name.startswith(_MOMENTUM))
    }
    found = _kind_of(state, path)
    wanted = (kinds,) if isinstance(kinds, str) else kinds
    if wanted is not None and found not in wanted:
        raise InputError(
            f"{path}: this is a {found}, not a {' or '.join(wanted)}: it lacks a part, which would "
            "be random"
        )
    if found == "pretrained" and not original:
        raise InputError(
            f"{path}: a BlipForQuestionAnswering has no place in MED; use a captioner or a matcher"
        )
    if config is None:
        config = _infer_config(state, path) if original else _read_config(path.parent)
    if found == "blip_model":
        scale = state.pop("logit_scale", None)
        embed_dim = len(state.get("visual_projection.weight", torch.empty(config.embed_dim)))
        config = replace(config, text_pool="pooler", image_pool="first_norm", embed_dim=embed_dim)
    if image_size_px is not None:
        config = replace(config, image_size_px=image_size_px)
    model = MED(config)
    _copy(names(config, found, original), state, model, str(path))
    if found in ("captioner", "matcher", "blip_model"):
        source, target_tower = (
            (model.decoder, model.encoder)
            if found == "captioner"
            else (model.encoder, model.decoder)
        )
        target_tower.load_state_dict(source.state_dict())
        log.info("%s: a %s; the other text tower's self-attention starts as a copy", path, found)
    if found == "blip_model":
        for projection in (model.vision_proj, model.text_proj):
            torch.nn.init.zeros_(projection.get_parameter("bias"))
        if scale is not None:
            with torch.no_grad():
                model.temp.copy_(torch.exp(-scale))
    return model.eval()


def init_vit(model: MED, name_or_folder: str | Path) -> None:
    """Start the ViT from weights trained elsewhere, of the same shape; positions are interpolated.

    Args:
        model: with a ViT; filled in place.
        name_or_folder: a folder, file or hub name that holds a ViT under transformers' `ViTModel`
            names, under timm's (DeiT's release), or inside a BLIP checkpoint.

    Raises:
        InputError: the weights are missing or don't fit; the message lists the keys.
    """
    if not isinstance(model.vision, ViT):
        raise ConfigError(f"image_tower: {model.config.image_tower} takes no ViT weights")
    path, state = read_weights(name_or_folder)
    depth = model.config.vision_depth
    state = {name.removeprefix("vit."): tensor for name, tensor in state.items()}
    if "embeddings.cls_token" in state:
        table = _vit_model_names(depth)
        dropped: tuple[str, ...] = ("pooler.", "classifier.", "embeddings.mask_token")
    elif "cls_token" in state:
        state = {f"visual_encoder.{name}": tensor for name, tensor in state.items()}
        table = _vision_names(depth, original=True)
        dropped = ("visual_encoder.head", "visual_encoder.pre_logits.")
    else:
        original = any(name.startswith("visual_encoder.") for name in state)
        root = "visual_encoder." if original else "vision_model."
        state = {name: tensor for name, tensor in state.items() if name.startswith(root)}
        table, dropped = _vision_names(depth, original), ()
    state = {name: tensor for name, tensor in state.items() if not name.startswith(dropped)}
    _copy(table, state, model, str(path))


def _vit_model_names(depth: int) -> list[Entry]:
    entries = [
        Entry("vision.cls_token", ("embeddings.cls_token",)),
        Entry("vision.pos_embed", ("embeddings.position_embeddings",)),
        *_both("vision.patch_embed", "embeddings.patch_embeddings.projection"),
        *_both("vision.norm", "layernorm"),
    ]
    for i in range(depth):
        ours, theirs = f"vision.blocks.{i}.", f"encoder.layer.{i}."
        own = theirs + "attention.attention."
        entries += [
            *_both(ours + "norm1", theirs + "layernorm_before"),
            *_both(ours + "qkv", own + "query", own + "key", own + "value"),
            *_both(ours + "proj", theirs + "attention.output.dense"),
            *_both(ours + "norm2", theirs + "layernorm_after"),
            *_both(ours + "fc1", theirs + "intermediate.dense"),
            *_both(ours + "fc2", theirs + "output.dense"),
        ]
    return entries


def _copy(table: list[Entry], state: dict[str, Tensor], model: MED, where: str) -> None:
    """Fill the model's tensors that the table names; positions are interpolated on the way."""
    config, own_state = model.config, model.state_dict()
    positions = next(entry.theirs[0] for entry in table if entry.ours == "vision.pos_embed")
    if positions in state and state[positions].dim() == 3:
        grid = config.image_size_px // config.patch_size
        state = {**state, positions: interpolate_positions(state[positions], grid)}
    wanted: dict[str, tuple[int, ...]] = {}
    for entry in table:
        shape = tuple(own_state[entry.ours].shape)
        for name in entry.theirs:
            many = len(entry.theirs)
            wanted[name] = (shape[0] // many, *shape[1:]) if many > 1 else shape
    check_keys(wanted, state, where)
    filled: dict[int, Entry] = {}
    for entry in table:
        parts = [state[name] for name in entry.theirs]
        target, value = own_state[entry.ours], parts[0] if len(parts) == 1 else torch.cat(parts)
        # encoder and decoder of a pretrained checkpoint name what they share twice
        if (twin := filled.setdefault(target.data_ptr(), entry)) is not entry:
            if not torch.equal(target, value.to(target.dtype)):
                raise InputError(
                    f"{where}: {twin.theirs[0]} and {entry.theirs[0]} differ, but sharing is "
                    f"{config.sharing!r}; pass a config with sharing='none'"
                )
            continue
        target.copy_(value)


def export_state(model: MED, kind: Kind, original: bool = False) -> dict[str, Tensor]:
    """The model's tensors under a checkpoint's names.

    Args:
        model: with a ViT and linear ITC heads, as BLIP has them.
        kind: as in `names`.
        original: the key names of the original release instead of transformers'.

    Raises:
        ConfigError: the format has no place for what this model computes; the message lists the
            fields.
    """
    config = model.config
    problems = []
    if config.image_tower != "vit":
        problems.append(f"image_tower is {config.image_tower}, not vit")
    if kind in ("matcher", "pretrained", "blip_model"):
        pools = ("pooler", "first_norm") if kind == "blip_model" else ("first", "first")
        for field, wanted in zip(("text_pool", "image_pool"), pools, strict=True):
            if getattr(config, field) != wanted:
                problems.append(f"{field} is {getattr(config, field)}, not {wanted}")
        if config.projection_hidden is not None:
            problems.append("projection_hidden is set")
        if config.itm_from_itc and kind != "blip_model":
            problems.append("itm_from_itc is set")
    if kind == "blip_model" and not problems:
        for name in ("vision_proj", "text_proj"):
            if model.get_parameter(f"{name}.bias").any():
                problems.append(f"{name} has a bias")
    if kind == "pretrained" and not original:
        problems.append("transformers has no class for the whole model")
    if problems:
        raise ConfigError(f"the model can't be written as a {kind} of BLIP: {'; '.join(problems)}")
    own = model.state_dict()
    state: dict[str, Tensor] = {}
    for entry in names(config, kind, original):
        value = own[entry.ours]
        parts = [value] if len(entry.theirs) == 1 else value.chunk(len(entry.theirs))
        for name, part in zip(entry.theirs, parts, strict=True):
            state[name] = part.detach().clone().contiguous()
    if kind == "blip_model":
        state["logit_scale"] = -model.temp.detach().log()
    return state


def save_transformers(model: MED, folder: str | Path, architecture: str) -> None:
    """Write a folder that transformers loads: config, weights, and the image processor's config.

    Args:
        model: with a ViT and, but for a captioner, linear ITC heads.
        folder: created when absent.
        architecture: `BlipForConditionalGeneration`, `BlipForImageTextRetrieval` or `BlipModel`.

    Raises:
        ConfigError: the format has no place for what this model computes.
    """
    from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

    if architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture: {architecture!r} is none of {', '.join(ARCHITECTURES)}")
    state = export_state(model, ARCHITECTURES[architecture])
    c = model.config
    blip = BlipConfig(
        text_config=BlipTextConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.text_width,
            encoder_hidden_size=c.vision_width,
            intermediate_size=c.text_ffn_width,
            num_hidden_layers=c.text_depth,
            num_attention_heads=c.text_heads,
            max_position_embeddings=c.max_positions,
            layer_norm_eps=c.layer_norm_eps,
            hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.attention_dropout,
            label_smoothing=0.1,
        ),
        vision_config=BlipVisionConfig(
            hidden_size=c.vision_width,
            intermediate_size=c.vision_mlp_width,
            num_hidden_layers=c.vision_depth,
            num_attention_heads=c.vision_heads,
            image_size=c.image_size_px,
            patch_size=c.patch_size,
            layer_norm_eps=c.vision_layer_norm_eps,
        ),
        projection_dim=c.embed_dim,
        image_text_hidden_size=c.embed_dim,
        label_smoothing=0.1,
        architectures=[architecture],
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    blip.save_pretrained(folder)
    processor: dict[str, Any] = {
        "image_processor_type": "BlipImageProcessor",
        "size": {"height": c.image_size_px, "width": c.image_size_px},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
