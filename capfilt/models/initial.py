"""What a fresh MED takes from others: a BERT's layers, EfficientNet-Lite's ImageNet weights.

Dimensions as in `med`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from capfilt.errors import ConfigError
from capfilt.models.efficientnet_lite import EfficientNetLite, load_imagenet
from capfilt.models.med import MED
from capfilt.models.med_files import check_keys, read_weights
from capfilt.models.text_tower import CLS_ID, ENC_ID, TextLayer
from capfilt.models.weights import lite_weights, minilm_folder


def init_from_minilm(model: MED, folder: str | Path | None = None) -> None:
    """Start the text towers from all-MiniLM-L6-v2 (6 layers, width 384); see `init_from_bert`."""
    init_from_bert(model, minilm_folder() if folder is None else folder)


def init_lite(model: MED) -> None:
    """Fill the EfficientNet-Lite trunk with the ImageNet weights of its package (`lite_weights`).

    Raises:
        InputError: the package is not installed, or holds other weights.
        ConfigError: the model's image tower is not an EfficientNet-Lite.
    """
    trunks = [part for part in model.vision.modules() if isinstance(part, EfficientNetLite)]
    if not trunks:
        raise ConfigError(
            f"image_tower: {model.config.image_tower} takes no EfficientNet-Lite weights"
        )
    for trunk in trunks:
        path = lite_weights(trunk.variant)
        state = torch.load(path, map_location="cpu", weights_only=True)
        load_imagenet(trunk, state, str(path))


def init_from_bert(model: MED, name_or_folder: str | Path) -> None:
    """Start the text towers from a BERT: embeddings, both self-attentions, feed-forward layers.

    Cross-attention and the heads keep their random start. MED has no token types, so type 0 is
    folded into the position embeddings, which is the same function for a single text. The rows of
    `[DEC]` and `[ENC]` are added: `[ENC]` starts as a copy of `[CLS]`, whose place it takes, and
    `[DEC]` near the mean of all words.

    Args:
        model: filled in place.
        name_or_folder: a folder with `model.safetensors` or `pytorch_model.bin`, or a name on the
            Hugging Face hub.

    Raises:
        InputError: the weights are missing or don't fit the model; the message lists the keys.
    """
    path, state = read_weights(name_or_folder)
    state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    config, width = model.config, model.config.text_width
    words = state.get("embeddings.word_embeddings.weight", torch.empty(0, width))
    wanted: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (min(len(words), config.vocab_size), width),
        "embeddings.position_embeddings.weight": (config.max_positions, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    if (types := state.get("embeddings.token_type_embeddings.weight")) is not None:
        wanted["embeddings.token_type_embeddings.weight"] = (types.shape[0], width)
    for i in range(config.text_depth):
        prefix = f"encoder.layer.{i}."
        for name, shape in (
            ("attention.self.query", (width, width)),
            ("attention.self.key", (width, width)),
            ("attention.self.value", (width, width)),
            ("attention.output.dense", (width, width)),
            ("attention.output.LayerNorm", (width,)),
            ("intermediate.dense", (config.text_ffn_width, width)),
            ("output.dense", (width, config.text_ffn_width)),
            ("output.LayerNorm", (width,)),
        ):
            wanted[f"{prefix}{name}.weight"] = shape
            wanted[f"{prefix}{name}.bias"] = shape[:1]
    # the pooler, the pretraining heads and the table of position numbers have no place in MED
    dropped = ("pooler.", "cls.", "embeddings.position_ids")
    check_keys(wanted, {k: v for k, v in state.items() if not k.startswith(dropped)}, str(path))

    noise = torch.Generator().manual_seed(0)
    positions = state["embeddings.position_embeddings.weight"].clone()
    if types is not None:
        positions += types[0]
    with torch.no_grad():
        for tower in (model.encoder, model.decoder):
            table = tower.embeddings.word.weight
            table[: len(words)] = words
            new = torch.randn(len(table) - len(words), width, generator=noise) * 0.02
            table[len(words) :] = words.mean(0) + new
            if len(words) <= ENC_ID < len(table):
                table[ENC_ID] = words[CLS_ID]
            tower.embeddings.position.weight.copy_(positions)
            _fill(tower.embeddings.norm, state, "embeddings.LayerNorm")
            for i, layer in enumerate(tower.layers):
                assert isinstance(layer, TextLayer)
                prefix = f"encoder.layer.{i}."
                for part in ("weight", "bias"):
                    qkv = [
                        state[f"{prefix}attention.self.{x}.{part}"]
                        for x in ("query", "key", "value")
                    ]
                    getattr(layer.self_attention.qkv, part).copy_(torch.cat(qkv))
                _fill(layer.self_attention.out, state, prefix + "attention.output.dense")
                _fill(layer.self_attention.norm, state, prefix + "attention.output.LayerNorm")
                _fill(layer.feed_forward.up, state, prefix + "intermediate.dense")
                _fill(layer.feed_forward.down, state, prefix + "output.dense")
                _fill(layer.feed_forward.norm, state, prefix + "output.LayerNorm")


def _fill(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    module.get_parameter("weight").copy_(state[f"{name}.weight"])
    module.get_parameter("bias").copy_(state[f"{name}.bias"])
