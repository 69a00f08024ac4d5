"""MED, BLIP's multimodal mixture of encoder-decoder (paper, section 3.1), as one class.

Its three functionalities share parameters as `MEDConfig.sharing` says:

- the unimodal text encoder (`embed_text`) for the image-text contrastive loss, ITC;
- the image-grounded text encoder (`itm_logits`, first token `[ENC]`) for image-text matching, ITM;
- the image-grounded text decoder (`lm_logits`, first token `[DEC]`, causal) for language
  modelling, LM.

Dimensions: B images, N texts, P image tokens, L text tokens, D text width, Dv width of the image
tower's tokens, V vocabulary, v rows of it in use, E ITC embedding, H heads.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from capfilt.errors import ConfigError, InputError
from capfilt.models.efficientnet_lite import (
    VARIANTS,
    EfficientNetLite,
    EfficientNetLites,
    load_imagenet,
    map_channels,
)
from capfilt.models.itm_start import ITMStart
from capfilt.models.vit import ViT
from capfilt.models.weights import lite_weights, minilm_folder

CLS_ID, SEP_ID, PAD_ID, DEC_ID, ENC_ID = 101, 102, 0, 30522, 30523
SPECIAL_IDS = (CLS_ID, SEP_ID, PAD_ID, DEC_ID, ENC_ID)

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, each `[B, H, P, D / H]`."""
CrossKeysValues = list[KeysValues]
"""Keys and values of all layers' cross-attention: computed once an image, used by all its texts."""
Functionality = Literal["encoder", "decoder"]

SHARINGS = ("all_but_self_attention", "all_but_cross_attention", "all", "none")


@dataclass(frozen=True)
class MEDConfig:
    """Everything that decides the shapes and the function of a `MED`.

    Attributes:
        image_tower: `vit`, or `efficientnet_lite` (frozen).
        image_size_px: side of the square images.
        patch_size: side of a ViT patch, in pixels.
        vision_width: width of the ViT.
        vision_depth: blocks of the ViT.
        vision_heads: heads of the ViT.
        vision_mlp_width: hidden width of the ViT's MLPs.
        vision_layer_norm_eps: epsilon of the ViT's LayerNorms.
        drop_path: stochastic depth of the ViT's last block, 0..1.
        lite_variant: which EfficientNet-Lite; of several, joined by "+", the feature maps are
            stacked.
        lite_levels: `last` is EfficientNet-Lite's last feature map alone; `all` adds the outputs of
            its stages. Their channels differ by far in size, so they are standardised by what
            `set_channel_scale` was told of the training pictures.
        pooled_components: the pooled image tokens are reduced to so many principal components of
            the training pictures (`set_components`) before ITC's image head reads them; None
            leaves them as they are.
        vocab_size: rows of the word embeddings, `[DEC]` and `[ENC]` included.
        text_width: D.
        text_depth: layers of the text encoder and of the decoder.
        text_heads: H.
        text_ffn_width: hidden width of the feed-forward layers.
        max_positions: longest text in tokens.
        dropout: of hidden states in the text towers, 0..1.
        attention_dropout: of attention weights in the text towers, 0..1. The CPU has a fused
            kernel for attention without dropout only.
        layer_norm_eps: epsilon of the text towers' LayerNorms.
        embed_dim: E.
        itc_heads: each ITC head is so many two-layer heads side by side, each of them `embed_dim /
            itc_heads` wide and of length 1: the similarity is the mean of theirs.
        sharing: what the text encoder and the decoder share (paper, Table 3).
        text_pool: ITC takes the first token, the mean over the text, or BERT's pooler
            (transformers' `BlipModel`).
        image_pool: ITC takes the first token, the mean over the tokens, or the first token put
            through the tower's last LayerNorm once more (transformers' `BlipModel`).
        projection_hidden: None for linear ITC heads, as in BLIP; else the hidden width of two-layer
            heads.
        projection_dropout: of the image's two-layer head, 0..1.
        text_residual: the text's two-layer head is added to the pooled text, so that ITC starts in
            the space of a sentence encoder; needs `embed_dim` equal to `text_width`.
        text_residual_scale: length that the pooled text is brought to before the head is added: the
            longer, the less the head can change.
        grid_side: EfficientNet-Lite's feature map is averaged to so many cells a side before
            cross-attention reads it; None reads it as it is.
        grid_components: principal components that each cell is reduced to before cross-attention
            reads it; None reads all channels.
        itc_token: cross-attention also reads the image's own ITC embedding, as one more token
            before the grid: what ITC knows, ITM and LM needn't learn again (not in BLIP).
        itm_from_itc: add what ITC says of the pair to ITM's match logit (not in BLIP), see
            `ITMStart`.
        itm_bank: pictures and texts, as many of each, that `ITMStart` compares a pair with, and
            captions of similar pictures that it compares the text with; 0 leaves only the
            similarity.
        itm_words: words whose presence `ITMStart` foresees in a picture, and that it compares with
            those that may stand in their place; 0 for none.
    """

    image_tower: str = "vit"
    image_size_px: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    vision_mlp_width: int = 3072
    vision_layer_norm_eps: float = 1e-6
    drop_path: float = 0.0
    lite_variant: str = "lite0"
    lite_levels: str = "last"
    pooled_components: int | None = None
    vocab_size: int = 30524
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12
    text_ffn_width: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    embed_dim: int = 256
    itc_heads: int = 1
    sharing: str = "all_but_self_attention"
    text_pool: str = "first"
    image_pool: str = "first"
    projection_hidden: int | None = None
    projection_dropout: float = 0.1
    text_residual: bool = False
    text_residual_scale: float = 1.0
    grid_side: int | None = None
    grid_components: int | None = None
    itc_token: bool = False
    itm_from_itc: bool = False
    itm_bank: int = 0
    itm_words: int = 0

    def __post_init__(self) -> None:
        choices = {
            "image_tower": ("vit", "efficientnet_lite"),
            "lite_levels": ("last", "all"),
            "sharing": SHARINGS,
            "text_pool": ("first", "mean", "pooler"),
            "image_pool": ("first", "mean", "mean_max", "first_norm"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name}: {getattr(self, name)!r} is none of {', '.join(allowed)}"
                )
        if self.text_width % self.text_heads:
            raise ConfigError(
                f"text_width: {self.text_width} does not divide by text_heads ({self.text_heads})"
            )
        for variant in self.lite_variants:
            if variant not in VARIANTS:
                raise ConfigError(
                    f"lite_variant: {variant!r} is none of {', '.join(VARIANTS)} (several are "
                    "joined by +)"
                )
        if self.itc_heads > 1 and (
            self.projection_hidden is None or self.embed_dim % self.itc_heads
        ):
            raise ConfigError(
                f"itc_heads: {self.itc_heads} heads need projection_hidden, and an embed_dim "
                f"({self.embed_dim}) that divides by them"
            )
        if self.image_tower == "vit":
            if self.vision_width % self.vision_heads:
                raise ConfigError(
                    f"vision_width: {self.vision_width} does not divide by vision_heads "
                    f"({self.vision_heads})"
                )
            if self.image_size_px % self.patch_size:
                raise ConfigError(
                    f"image_size_px: {self.image_size_px} does not divide by patch_size "
                    f"({self.patch_size})"
                )
        elif self.image_pool not in ("mean", "mean_max"):
            raise ConfigError(
                "image_pool: efficientnet_lite has no [CLS] token; set image_pool: mean"
            )

        if self.text_residual and (
            self.projection_hidden is None or self.head_dim != self.text_width
        ):
            raise ConfigError(
                f"text_residual: needs projection_hidden, and embed_dim ({self.embed_dim}) equal "
                f"to itc_heads * text_width ({self.itc_heads} * {self.text_width})"
            )
        if self.image_tower == "vit" and (
            self.itc_token or self.grid_side is not None or self.grid_components is not None
        ):
            raise ConfigError(
                "itc_token, grid_side, grid_components: only for the tower efficientnet_lite"
            )

    @property
    def image_width(self) -> int:
        """Dv, the width of the tokens that `MED.encode_image` returns."""
        if self.image_tower == "vit":
            return self.vision_width
        all_levels = self.lite_levels == "all"
        return sum(map_channels(variant, all_levels) for variant in self.lite_variants)

    @property
    def pooled_width(self) -> int:
        """Width of what ITC's image head reads."""
        if self.pooled_components is not None:
            return self.pooled_components
        return self.raw_pooled_width

    @property
    def raw_pooled_width(self) -> int:
        """Width of the pooled image tokens, before they are reduced."""
        return self.image_width * (2 if self.image_pool == "mean_max" else 1)

    @property
    def lite_variants(self) -> list[str]:
        """The EfficientNet-Lites of the tower."""
        return self.lite_variant.split("+")

    @property
    def head_dim(self) -> int:
        """Width of one ITC head's embedding."""
        return self.embed_dim // self.itc_heads

    @property
    def image_tokens(self) -> int:
        """P, the number of tokens of an image of `image_size_px`."""
        if self.image_tower == "vit":
            return 1 + (self.image_size_px // self.patch_size) ** 2
        return (-(-self.image_size_px // 32)) ** 2

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "MEDConfig") -> MEDConfig:
        """Build from plain values.

        Args:
            values: a subset of the fields.
            where: the file or the YAML key that the values came from, for messages.

        Raises:
            ConfigError: a key is unknown or a value not allowed.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(
                f"{where}: unknown {', '.join(unknown)}; known keys: {', '.join(sorted(known))}"
            )
        return cls(**values)


def small() -> MEDConfig:
    """EfficientNet-Lite0 (frozen) and MiniLM's shape: trains on two CPU cores."""
    return MEDConfig(
        image_tower="efficientnet_lite",
        text_width=384,
        text_depth=6,
        text_heads=12,
        text_ffn_width=1536,
        attention_dropout=0.0,
        embed_dim=384,
        text_pool="mean",
        image_pool="mean_max",
        projection_hidden=384,
        projection_dropout=0.7,
        text_residual=True,
        itc_token=True,
        itm_from_itc=True,
    )


def base() -> MEDConfig:
    """BLIP with ViT-B/16."""
    return MEDConfig()


def large() -> MEDConfig:
    """BLIP with ViT-L/16."""
    return MEDConfig(
        vision_width=1024, vision_depth=24, vision_heads=16, vision_mlp_width=4096, drop_path=0.1
    )


class Dropout(nn.Module):
    """Dropout that is three times as fast as PyTorch's on the CPU.

    There one random byte an element decides, so the probability is rounded to 1/256; the outputs
    are scaled by what was really kept. Elsewhere it is PyTorch's own.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Zero elements while training, and scale up the others."""
        dropped = round(256 * self.probability)
        if not self.training or self.probability == 0.0:
            return x
        if x.device.type != "cpu" or not 0 < dropped < 256:
            return F.dropout(x, self.probability)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
        return x * kept.to(x.dtype).mul_(256 / (256 - dropped))


class TextEmbeddings(nn.Module):
    """Word and learned position embeddings, normalised."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.text_width, padding_idx=PAD_ID)
        self.position = nn.Embedding(config.max_positions, config.text_width)
        self.norm = nn.LayerNorm(config.text_width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """`[N, L]` ids, the first of them at position `start`, to `[N, L, D]`."""
        end = start + input_ids.shape[1]
        if end > self.position.num_embeddings:
            raise InputError(
                f"a text of {end} tokens is longer than max_positions "
                f"({self.position.num_embeddings}); cut it"
            )
        return self.dropout(self.norm(self.word(input_ids) + self.position.weight[start:end]))


class SelfAttention(nn.Module):
    """Self-attention with its residual and post-LayerNorm: the part that BLIP does not share."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.heads = config.text_heads
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.text_width, 3 * config.text_width)
        self.out = nn.Linear(config.text_width, config.text_width)
        self.norm = nn.LayerNorm(config.text_width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, causal: bool, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """Attend within the text.

        Args:
            x: `[N, L, D]`.
            mask: bool, True where attention is allowed, broadcastable to `[N, H, L, L]`; None for
                everywhere.
            causal: mask the future (then `mask` is None).
            past: keys and values of the tokens before `x`.

        Returns:
            `[N, L, D]`, and the keys and values of all tokens so far.
        """
        rows, length, width = x.shape
        q, k, v = (
            self.qkv(x)
            .view(rows, length, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        drop = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=drop, is_causal=causal
        )
        attended = attended.transpose(1, 2).reshape(rows, length, width)
        return self.norm(x + self.dropout(self.out(attended))), (k, v)


class CrossAttention(nn.Module):
    """Attention from the text to the image tokens, with its residual and post-LayerNorm."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.heads = config.text_heads
        self.attention_dropout = config.attention_dropout
        image_width = config.vision_width if config.image_tower == "vit" else config.text_width
        self.query = nn.Linear(config.text_width, config.text_width)
        self.key_value = nn.Linear(image_width, 2 * config.text_width)
        self.out = nn.Linear(config.text_width, config.text_width)
        self.norm = nn.LayerNorm(config.text_width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def keys_values(self, image: Tensor) -> KeysValues:
        """`[B, P, image width]` to keys and values, each `[B, H, P, D / H]`."""
        batch, tokens, _ = image.shape
        kv = self.key_value(image).view(batch, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return kv[0], kv[1]

    def forward(self, x: Tensor, keys_values: KeysValues, image_index: Tensor | None) -> Tensor:
        """Attend to the image.

        Args:
            x: `[N, L, D]`.
            keys_values: of B images.
            image_index: `[N]`, the image of each text; None when the texts come in image order,
                N / B of each.

        Returns:
            `[N, L, D]`.
        """
        rows, length, width = x.shape
        k, v = keys_values
        if image_index is not None:
            k, v = k.index_select(0, image_index), v.index_select(0, image_index)
        # all texts of one image ask its keys in one attention: the keys are neither copied nor
        # computed again
        group = rows // k.shape[0]
        q = (
            self.query(x)
            .view(k.shape[0], group * length, self.heads, width // self.heads)
            .transpose(1, 2)
        )
        drop = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        attended = attended.transpose(1, 2).reshape(rows, length, width)
        return self.norm(x + self.dropout(self.out(attended)))


class FeedForward(nn.Module):
    """Two linear layers with GELU, the residual and the post-LayerNorm."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.text_width, config.text_ffn_width)
        self.down = nn.Linear(config.text_ffn_width, config.text_width)
        self.norm = nn.LayerNorm(config.text_width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, L, D]` to `[N, L, D]`."""
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class TextLayer(nn.Module):
    """One layer of a text tower. Encoder and decoder layers may hold the same parts."""

    def __init__(
        self,
        self_attention: SelfAttention,
        cross_attention: CrossAttention,
        feed_forward: FeedForward,
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        causal: bool,
        past: KeysValues | None,
        cross: KeysValues | None,
        image_index: Tensor | None,
    ) -> tuple[Tensor, KeysValues]:
        """`[N, L, D]` to the same, and self-attention's keys and values; no `cross`, no image."""
        x, present = self.self_attention(x, mask, causal, past)
        if cross is not None:
            x = self.cross_attention(x, cross, image_index)
        return self.feed_forward(x), present


class TextTower(nn.Module):
    """Embeddings and layers: the text encoder, or the decoder."""

    def __init__(self, embeddings: TextEmbeddings, layers: list[TextLayer]) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.layers = nn.ModuleList(layers)
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        cross: CrossKeysValues | None = None,
        image_index: Tensor | None = None,
        past: list[KeysValues] | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Run the tower.

        Args:
            input_ids: `[N, L]`.
            mask: `[N, T]`, 1 for tokens and 0 for padding, T = past tokens + L; None when there is
                no padding.
            causal: mask the future.
            cross: keys and values of the images; None for the unimodal encoder.
            image_index: `[N]`, the image of each text.
            past: keys and values of the tokens before `input_ids`, one pair a layer.

        Returns:
            `[N, L, D]`, and the keys and values of all tokens so far, one pair a layer.
        """
        start = 0 if past is None else past[0][0].shape[2]
        length = input_ids.shape[1]
        allowed = None if mask is None else mask.bool()[:, None, None, :]
        is_causal = causal and length > 1
        if is_causal and (allowed is not None or start > 0):
            # SDPA's own causal flag takes no second mask, and counts from the wrong corner with a
            # cache
            future = torch.ones(
                length, start + length, dtype=torch.bool, device=input_ids.device
            ).tril(start)
            allowed = future if allowed is None else allowed & future
            is_causal = False
        x = self.embeddings(input_ids, start)
        presents: list[KeysValues] = []
        for number, layer in enumerate(self.layers):
            arguments = (
                x,
                allowed,
                is_causal,
                None if past is None else past[number],
                None if cross is None else cross[number],
                image_index,
            )
            if self.gradient_checkpointing and self.training:
                x, present = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x, present = layer(*arguments)
            presents.append(present)
        return x, presents


class LMHead(nn.Module):
    """BERT's prediction head; its output matrix, the decoder's word embeddings, is passed in."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.text_width, config.text_width)
        self.norm = nn.LayerNorm(config.text_width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, words: Tensor, vocab_ids: Tensor | None = None) -> Tensor:
        """Predict tokens.

        Args:
            hidden: `[..., D]`.
            words: the word embeddings `[V, D]`.
            vocab_ids: `[v]`, the rows of the vocabulary to predict; None for all.

        Returns:
            Logits `[..., V]` or `[..., v]`.
        """
        bias: Tensor = self.bias
        if vocab_ids is not None:
            words, bias = words.index_select(0, vocab_ids), bias.index_select(0, vocab_ids)
        return F.linear(self.norm(F.gelu(self.dense(hidden))), words, bias)


class GridAdapter(nn.Module):
    """Turns the feature map of a convolutional tower into tokens that cross-attention can read."""

    def __init__(self, inputs: int, config: MEDConfig) -> None:
        super().__init__()
        self.native_side = math.isqrt(config.image_tokens)
        self.side = config.grid_side or self.native_side
        self.reduces = config.grid_components is not None
        if config.grid_components is not None:
            components = torch.zeros(config.grid_components, inputs)
            self.components = nn.Buffer(components.fill_diagonal_(1.0))
            self.components_mean = nn.Buffer(torch.zeros(inputs))
            inputs = config.grid_components
        self.input_norm = nn.LayerNorm(inputs, eps=config.layer_norm_eps)
        self.linear = nn.Linear(inputs, config.text_width)
        self.position = nn.Parameter(torch.empty(self.side**2, config.text_width))
        self.norm = nn.LayerNorm(config.text_width, eps=config.layer_norm_eps)
        self.itc = nn.Linear(config.embed_dim, config.text_width) if config.itc_token else None
        nn.init.normal_(self.position, std=0.02)

    def cells(self, tokens: Tensor) -> Tensor:
        """The grid's cells, averaged to `grid_side`: `[B, P, Dv]` to `[B, P', Dv]`."""
        if tokens.shape[1] != self.native_side**2:
            raise InputError(
                f"{tokens.shape[1]} image tokens, but the model reads {self.native_side**2}: "
                "the features were made at another image_size_px; make them again"
            )
        if self.side != self.native_side:
            grid = tokens.transpose(1, 2).unflatten(2, (self.native_side, self.native_side))
            tokens = F.adaptive_avg_pool2d(grid, self.side).flatten(2).transpose(1, 2)
        return tokens

    @property
    def lacks_components(self) -> bool:
        """Whether the components that it reduces cells to are still to be found."""
        return self.reduces and not self.components_mean.any()

    def set_components(self, cells: Tensor) -> None:
        """Finds the principal components of cells.

        Args:
            cells: `[N, Dv]` of the training pictures, from `cells`.
        """
        mean = cells.float().mean(0)
        chosen = principal_components(cells.float() - mean, len(self.components))
        self.components.zero_()
        self.components[: len(chosen)] = chosen
        self.components_mean.copy_(mean)

    def forward(self, tokens: Tensor, embeds: Tensor | None) -> Tensor:
        """`[B, P, Dv]` and, with `itc_token`, `[B, E]` to `[B, P', D]`."""
        cells = self.cells(tokens)
        if self.reduces:
            cells = F.linear(cells - self.components_mean, self.components)
        adapted = self.linear(self.input_norm(cells)) + self.position
        if self.itc is not None:
            assert embeds is not None
            adapted = torch.cat([self.itc(embeds)[:, None], adapted], dim=1)
        return self.norm(adapted)


def principal_components(centred: Tensor, count: int) -> Tensor:
    """The first principal components of `[N, width]`: `[C, width]`, C at most `count`."""
    count = min(count, *centred.shape)
    # randomised: the whole decomposition of some thousand channels would take minutes
    size = min(count + 16, *centred.shape)
    chosen = torch.svd_lowrank(centred, q=size, niter=4)[2][:, :count].T
    # a component has no sign of its own: its largest element is made positive
    largest = chosen.gather(1, chosen.abs().argmax(1, keepdim=True))
    return chosen * largest.sign()


def _projection(width: int, config: MEDConfig, dropout: float) -> nn.Module:
    if config.projection_hidden is None:
        return nn.Linear(width, config.embed_dim)
    return nn.Sequential(
        nn.LayerNorm(width),
        Dropout(dropout / 2),
        nn.Linear(width, config.projection_hidden),
        nn.GELU(),
        Dropout(dropout),
        nn.Linear(config.projection_hidden, config.head_dim),
    )


class Heads(nn.Module):
    """Several two-layer ITC heads side by side, an ensemble; their embeddings stand in a row."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, pooled: Tensor) -> Tensor:
        """`[N, width]` to `[N, heads, E / heads]`."""
        return torch.stack([head(pooled) for head in self.heads], dim=1)


def _itc_head(width: int, config: MEDConfig, dropout: float) -> nn.Module:
    if config.itc_heads == 1:
        return _projection(width, config, dropout)
    return Heads([_projection(width, config, dropout) for _ in range(config.itc_heads)])


def zero_last_layer(head: nn.Module) -> None:
    """Sets the last matrix of a two-layer ITC head, or of each of several, to zero."""
    for name, parameter in head.named_parameters():
        if name.endswith("5.weight"):
            nn.init.zeros_(parameter)


class MED(nn.Module):
    """Multimodal mixture of encoder-decoder (paper, section 3.1).

    An image goes through `encode_image` once; what that returns may be cached. `embed_image` and
    `adapt` take it from there, and `cross_keys_values` turns the adapted tokens into what all texts
    of the image attend to.
    """

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.config = config
        self.vision: ViT | EfficientNetLite | EfficientNetLites
        self.adapter: GridAdapter | None = None
        if config.image_tower == "vit":
            self.vision = ViT(
                image_size_px=config.image_size_px,
                patch_size=config.patch_size,
                width=config.vision_width,
                depth=config.vision_depth,
                heads=config.vision_heads,
                mlp_width=config.vision_mlp_width,
                layer_norm_eps=config.vision_layer_norm_eps,
                drop_path=config.drop_path,
            )
        else:
            variants, all_levels = config.lite_variants, config.lite_levels == "all"
            self.vision = (
                EfficientNetLite(variants[0], all_levels)
                if len(variants) == 1
                else EfficientNetLites(variants, all_levels)
            ).requires_grad_(False)
            self.adapter = GridAdapter(config.image_width, config)

        depth, shared = range(config.text_depth), config.sharing
        embeddings = TextEmbeddings(config)
        layers = [
            TextLayer(SelfAttention(config), CrossAttention(config), FeedForward(config))
            for _ in depth
        ]
        self.encoder = TextTower(embeddings, layers)
        self.decoder = TextTower(
            TextEmbeddings(config) if shared == "none" else embeddings,
            [
                TextLayer(
                    SelfAttention(config)
                    if shared in ("none", "all_but_self_attention")
                    else layer.self_attention,
                    CrossAttention(config)
                    if shared in ("none", "all_but_cross_attention")
                    else layer.cross_attention,
                    FeedForward(config) if shared == "none" else layer.feed_forward,
                )
                for layer in layers
            ],
        )
        self.lm_head = LMHead(config)
        self.itm_head = nn.Linear(config.text_width, 2)
        if config.lite_levels == "all":
            self.channel_shift = nn.Buffer(torch.zeros(config.image_width))
            self.channel_scale = nn.Buffer(torch.ones(config.image_width))
        if config.pooled_components is not None:
            components = torch.zeros(config.pooled_components, config.raw_pooled_width)
            self.components = nn.Buffer(components.fill_diagonal_(1.0))
            self.components_mean = nn.Buffer(torch.zeros(config.raw_pooled_width))
        self.vision_proj = _itc_head(config.pooled_width, config, config.projection_dropout)
        self.text_proj = _itc_head(config.text_width, config, config.dropout)
        self.temp = nn.Parameter(torch.tensor(0.07))
        if config.text_pool == "pooler":
            self.text_pooler = nn.Linear(config.text_width, config.text_width)
        if config.itm_from_itc:
            self.itm_start = ITMStart(
                config.embed_dim,
                pooled_width=config.pooled_width,
                text_width=config.text_width,
                bank=config.itm_bank,
                words=config.itm_words,
                vocab_size=config.vocab_size,
                special_ids=[id_ for id_ in SPECIAL_IDS if id_ < config.vocab_size],
            )

        for name, module in self.named_modules():
            if name.startswith("vision."):
                continue  # the towers initialise themselves
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if config.text_residual:
            zero_last_layer(self.text_proj)
        if self.adapter is not None and self.adapter.itc is not None:
            # an embedding of length 1 must weigh as much as a cell of the grid
            nn.init.normal_(self.adapter.itc.weight, std=0.3)

    # image

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Run the image tower.

        Args:
            pixel_values: `[B, 3, S, S]`, normalised as `images.pixels` does.

        Returns:
            `[B, P, Dv]`: the ViT's tokens after its last LayerNorm, `[CLS]` first; or the cells of
            the last feature map of EfficientNet-Lite, row by row, raw.
        """
        tokens = self.vision(pixel_values)
        return tokens if self.config.image_tower == "vit" else tokens.flatten(2).transpose(1, 2)

    def adapt(self, tokens: Tensor, known: Tensor | None = None) -> Tensor:
        """Make the tower's tokens readable for cross-attention.

        Args:
            tokens: `[B, P, Dv]` from `encode_image`, or from a cache of it.
            known: `[B, E]`, `known_image` of these tokens, where it is worked out already.

        Returns:
            `[B, P', D]` for EfficientNet-Lite; the tokens themselves for a ViT.
        """
        if self.adapter is None:
            return tokens
        if known is None and self.config.itc_token:
            known = self.known_image(tokens)
        adapted: Tensor = self.adapter(self._standardised(tokens), known)
        return adapted

    def _standardised(self, tokens: Tensor) -> Tensor:
        if self.config.lite_levels == "last":
            return tokens
        return (tokens - self.channel_shift) * self.channel_scale

    def set_channel_scale(self, mean: Tensor, std: Tensor) -> None:
        """Tells the model how large the tower's channels are, for `lite_levels` = `all`.

        Args:
            mean: `[Dv]`, over the cells of the training pictures.
            std: `[Dv]`, the same.
        """
        self.channel_shift.copy_(mean)
        self.channel_scale.copy_(1 / std.clamp(min=1e-3))

    def set_grid_components(self, tokens: Tensor) -> None:
        """Finds the principal components of the grid's cells, where they weren't found before.

        What reads them learns what each means, so they must not change after that.

        Args:
            tokens: `[N, Dv]`, cells of the training pictures averaged to the grid's side (see
                `GridAdapter.cells`), not standardised.
        """
        assert self.adapter is not None
        if self.adapter.lacks_components:
            self.adapter.set_components(self._standardised(tokens))

    def set_components(self, pooled: Tensor) -> None:
        """Finds the principal components of pooled image tokens, each standardised.

        Args:
            pooled: `[N, width]` of the training pictures, from `pool_tokens`. With fewer of them
                than `pooled_components` the rest of the components are 0.
        """
        assert self.config.pooled_components is not None
        std, mean = torch.std_mean(pooled.float(), dim=0)
        scale = 1 / std.clamp(min=1e-3)
        standardised = (pooled.float() - mean) * scale
        chosen = principal_components(standardised, self.config.pooled_components)
        self.components.zero_()
        self.components[: len(chosen)] = chosen * scale
        self.components_mean.copy_(mean)

    def image(self, pixel_values: Tensor) -> Tensor:
        """`adapt(encode_image(pixel_values))`."""
        return self.adapt(self.encode_image(pixel_values))

    def embed_image(self, tokens: Tensor) -> Tensor:
        """The image's ITC embedding.

        Args:
            tokens: `[B, P, Dv]` from `encode_image`, not adapted.

        Returns:
            `[B, E]`, of length 1.
        """
        return self.project_image(self.pool_image(tokens))

    @torch.no_grad()
    def known_image(self, tokens: Tensor) -> Tensor:
        """`embed_image` without dropout and gradient: what ITM and LM read of what ITC knows."""
        training = self.vision_proj.training
        self.vision_proj.eval()
        embeds = self.embed_image(tokens)
        self.vision_proj.train(training)
        return embeds

    def pool_image(self, tokens: Tensor) -> Tensor:
        """What `project_image` reads: `[B, P, Dv]` to `[B, pooled_width]`."""
        return self.reduce(self.pool_tokens(tokens))

    def reduce(self, pooled: Tensor) -> Tensor:
        """Pooled tokens `[B, width]` to their principal components, if the model wants them."""
        if self.config.pooled_components is None:
            return pooled
        return F.linear(pooled.float() - self.components_mean, self.components)

    def pool_tokens(self, tokens: Tensor) -> Tensor:
        """`[B, P, Dv]` to `[B, Dv]`, or `[B, 2 Dv]` for `mean_max`."""
        pool = self.config.image_pool
        if pool == "mean":
            return tokens.mean(1)
        if pool == "mean_max":
            return torch.cat([tokens.mean(1), tokens.amax(1)], dim=1)
        if pool == "first_norm":
            assert isinstance(self.vision, ViT)
            return self.vision.norm(tokens[:, 0])
        return tokens[:, 0]

    def project_image(self, pooled: Tensor) -> Tensor:
        """ITC's image head: pooled tokens to `[B, E]`, of length 1."""
        return self._embedding(self.vision_proj(pooled))

    def _embedding(self, projected: Tensor) -> Tensor:
        """`[N, E]`, or `[N, heads, E / heads]` of which each is brought to one length: `[N, E]`."""
        embeds = F.normalize(projected.float(), dim=-1)
        if self.config.itc_heads == 1:
            return embeds
        return embeds.flatten(1) / math.sqrt(self.config.itc_heads)

    def cross_keys_values(
        self, adapted: Tensor, functionality: Functionality = "encoder"
    ) -> CrossKeysValues:
        """Keys and values of cross-attention, once an image for all its texts.

        Args:
            adapted: `[B, P, D or Dv]` from `adapt`.
            functionality: whose cross-attention; the same one unless `sharing` keeps them apart.

        Returns:
            One (keys, values) a layer, each `[B, H, P, D / H]`.
        """
        tower = self.encoder if functionality == "encoder" else self.decoder
        pairs: CrossKeysValues = []
        for layer in tower.layers:
            assert isinstance(layer, TextLayer)
            pairs.append(layer.cross_attention.keys_values(adapted))
        return pairs

    # unimodal text encoder (ITC)

    def text_hidden(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """The unimodal text encoder: `[N, L]` ids (first `[CLS]`) and mask to `[N, L, D]`."""
        hidden: Tensor = self.encoder(input_ids, mask)[0]
        return hidden

    def embed_text(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """The text's ITC embedding.

        Args:
            input_ids: `[N, L]`, first token `[CLS]`.
            mask: `[N, L]`, 1 for tokens and 0 for padding.

        Returns:
            `[N, E]`, of length 1.
        """
        return self.project_text(self.pool_text(input_ids, mask))

    def pool_text(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """What `project_text` reads, `[N, D]`; arguments as in `embed_text`."""
        hidden = self.text_hidden(input_ids, mask)
        if self.config.text_pool == "mean":
            if mask is None:
                return hidden.mean(1)
            weight = mask[..., None].to(hidden.dtype)
            return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        if self.config.text_pool == "pooler":
            return torch.tanh(self.text_pooler(hidden[:, 0]))
        return hidden[:, 0]

    def project_text(self, pooled: Tensor) -> Tensor:
        """ITC's text head: a pooled text `[N, D]` to `[N, E]`, of length 1."""
        if self.config.text_residual:
            pooled = F.normalize(pooled.float(), dim=-1)
            projected = self.text_proj(pooled).float()
            pooled = pooled * self.config.text_residual_scale
            if projected.ndim == 3:
                pooled = pooled[:, None]
            return self._embedding(pooled + projected)
        return self._embedding(self.text_proj(pooled))

    # image-grounded text encoder (ITM)

    def itm_start_of(
        self,
        images: Tensor,
        texts: Tensor,
        ids: Tensor,
        pooled_images: Tensor,
        pooled_texts: Tensor,
    ) -> Tensor | None:
        """What `itm_logits` starts from.

        Args:
            images: ITC embeddings `[N, E]`.
            texts: `[N, E]`, the texts of these pictures.
            ids: `[N, L]`, the tokens of these texts; which first token doesn't matter.
            pooled_images: `[N, pooled_width]`, from `pool_image`.
            pooled_texts: `[N, D]`, from `pool_text`.

        Returns:
            `[N]`, the log-odds of a match that ITC sees; None without `itm_from_itc`.
        """
        if not self.config.itm_from_itc:
            return None
        start: Tensor = self.itm_start(images, texts, ids, pooled_images, pooled_texts)
        return start

    def word_bonus(self, pooled: Tensor, vocab_ids: Tensor | None) -> Tensor:
        """How much more probable each token is in a caption of the picture than in any caption.

        Args:
            pooled: `[B, pooled_width]`, from `pool_image`.
            vocab_ids: `[v]` int64; None for the whole vocabulary.

        Returns:
            `[B, v]`, the difference of the log probabilities where it is above 0, else 0.

        Raises:
            ConfigError: the model has no word detectors.
        """
        words = self.itm_start.words if self.config.itm_from_itc else None
        if words is None:
            raise ConfigError(
                "word_bonus: this model has no word detectors; set model.itm_words (2000, say) and "
                "train it anew, or set word_bonus: 0"
            )
        if vocab_ids is None:
            vocab_ids = torch.arange(self.config.vocab_size, device=pooled.device)
        return words.bonus(pooled, vocab_ids)

    def itm_logits(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        cross_kv: CrossKeysValues,
        image_index: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Does the text match the image?

        Args:
            input_ids: `[N, L]`, first token `[ENC]` (`[CLS]` for parity with how public checkpoints
                are scored).
            mask: `[N, L]`, 1 for tokens and 0 for padding.
            cross_kv: from `cross_keys_values(..., "encoder")`, of B images.
            image_index: `[N]` int64, the row of `cross_kv` for each text; None when the texts come
                in image order.
            start: `[N]`, from `itm_start_of`; needed with `itm_from_itc`.

        Returns:
            Logits `[N, 2]`; class 1 is a match.
        """
        hidden, _ = self.encoder(input_ids, mask, cross=cross_kv, image_index=image_index)
        logits: Tensor = self.itm_head(hidden[:, 0])
        if self.config.itm_from_itc:
            if start is None:
                raise ValueError(
                    "a model with itm_from_itc needs start, which itm_start_of works out from the "
                    "ITC embeddings of each pair"
                )
            logits = torch.stack([logits[:, 0], logits[:, 1] + start.to(logits.dtype)], dim=1)
        return logits

    # image-grounded text decoder (LM)

    def lm_hidden(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        cross_kv: CrossKeysValues,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """The decoder's hidden states `[N, L, D]`; arguments as in `lm_logits`."""
        hidden: Tensor = self.decoder(
            input_ids, mask, causal=True, cross=cross_kv, image_index=image_index
        )[0]
        return hidden

    def lm_predict(self, hidden: Tensor, vocab_ids: Tensor | None = None) -> Tensor:
        """The LM head alone: `[..., D]` to logits `[..., V]`, or `[..., v]` with `vocab_ids`."""
        logits: Tensor = self.lm_head(hidden, self.decoder.embeddings.word.weight, vocab_ids)
        return logits

    def lm_logits(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        cross_kv: CrossKeysValues,
        image_index: Tensor | None = None,
        vocab_ids: Tensor | None = None,
    ) -> Tensor:
        """Predict the token after each position.

        Args:
            input_ids: `[N, L]`, first token `[DEC]`.
            mask: `[N, L]`, 1 for tokens and 0 for padding. With padding on the right only, None
                gives the same at every token and is faster.
            cross_kv: from `cross_keys_values(..., "decoder")`, of B images.
            image_index: `[N]` int64, the row of `cross_kv` for each text; None when the texts come
                in image order.
            vocab_ids: `[v]` int64, the rows of the vocabulary to predict; None for all.

        Returns:
            Logits `[N, L, V]`, or `[N, L, v]` with `vocab_ids`.
        """
        return self.lm_predict(self.lm_hidden(input_ids, mask, cross_kv, image_index), vocab_ids)

    def decode_step(
        self,
        input_ids: Tensor,
        past: list[KeysValues] | None,
        cross_kv: CrossKeysValues,
        image_index: Tensor | None = None,
        vocab_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Predict the next token, keeping what was computed for the tokens before.

        Args:
            input_ids: `[N, l]`, the tokens not in `past` yet, without padding.
            past: what the step before returned; None at the start.
            cross_kv: from `cross_keys_values(..., "decoder")`.
            image_index: as in `lm_logits`.
            vocab_ids: as in `lm_logits`.

        Returns:
            Logits `[N, V]` (or `[N, v]`) after the last token, and the new `past`.
        """
        hidden, presents = self.decoder(
            input_ids, causal=True, cross=cross_kv, image_index=image_index, past=past
        )
        return self.lm_predict(hidden[:, -1], vocab_ids), presents

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Trade time for memory in training: recompute activations in the backward pass."""
        for module in self.modules():
            if isinstance(module, ViT | TextTower):
                module.gradient_checkpointing = enabled


# saving and loading


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every shared tensor once, under the first of its names."""
    state: dict[str, Tensor] = dict(model.named_parameters())
    kept = model.state_dict()
    state.update({name: tensor for name, tensor in model.named_buffers() if name in kept})
    return {name: tensor.detach() for name, tensor in state.items()}


def load_unique_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Fill a model from `unique_state`'s output.

    Args:
        model: filled in place.
        state: one tensor for each of `unique_state(model)`.
        where: the file, for messages.

    Raises:
        InputError: keys are unknown, missing or of another shape; the message lists them.
    """
    wanted = unique_state(model)
    check_keys({name: tuple(tensor.shape) for name, tensor in wanted.items()}, state, where)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(state[name])


def check_keys(
    wanted: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], where: str
) -> None:
    """Compare a file's tensors with what the model needs.

    Args:
        wanted: name to shape.
        state: what the file holds.
        where: the file, for messages.

    Raises:
        InputError: keys are unknown, missing or of another shape; the message lists them.
    """
    unknown = sorted(set(state) - set(wanted))
    missing = sorted(set(wanted) - set(state))
    misshapen = [
        f"{name} (file: {tuple(state[name].shape)}, model: {shape})"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    parts = []
    for label, names in (
        ("unknown", unknown),
        ("missing", missing),
        ("of another shape", misshapen),
    ):
        if names:
            more = f", and {len(names) - 20} more" if len(names) > 20 else ""
            parts.append(f"{len(names)} {label}: {', '.join(names[:20])}{more}")
    if parts:
        raise InputError(
            f"{where}: the weights do not fit the model. Keys {'; '.join(parts)}. "
            "Check that config.json and the weights belong together."
        )


def save(model: MED, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`; each file is written beside and renamed.

    Args:
        model: shared tensors are written once.
        folder: created when absent.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors.tmp"
    save_file(
        {k: v.contiguous() for k, v in unique_state(model).items()},
        weights,
        metadata={"format": "pt"},
    )
    config = folder / "config.json.tmp"
    config.write_text(
        json.dumps({"model_type": "capfilt-med", **model.config.to_dict()}, indent=1) + "\n"
    )
    os.replace(weights, folder / "model.safetensors")
    os.replace(config, folder / "config.json")


def load_config(folder: str | Path) -> MEDConfig:
    """Read `config.json` of a folder that `save` wrote.

    Raises:
        InputError: there is no such file, or it is another kind of model's.
        ConfigError: a key is unknown or a value not allowed.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; expected a model folder written by capfilt"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    kind = values.pop("model_type", None)
    if kind != "capfilt-med":
        raise InputError(
            f"{path}: model_type is {kind!r}, not 'capfilt-med'; "
            "load BLIP checkpoints with capfilt.models.hub"
        )
    return MEDConfig.from_dict(values, str(path))


def load(folder: str | Path) -> MED:
    """Read a model that `save` wrote, in evaluation mode on the CPU.

    Raises:
        InputError: a file is missing, or keys are unknown, missing or of another shape.
    """
    model = MED(load_config(folder))
    path = Path(folder) / "model.safetensors"
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; expected a model folder written by capfilt"
        ) from None
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a readable safetensors file ({error}); write it again"
        ) from None
    load_unique_state(model, state, str(path))
    return model.eval()


# initialisation


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


def read_weights(name_or_folder: str | Path) -> tuple[Path, dict[str, Tensor]]:
    """Read a checkpoint's tensors, from safetensors where there are any.

    Args:
        name_or_folder: a folder, a file of weights, or a name on the Hugging Face hub.

    Returns:
        The file read, and its tensors.

    Raises:
        InputError: there is nothing to read, or it holds more than tensors.
    """
    folder = Path(name_or_folder)
    if not folder.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        name, others = str(name_or_folder), ["*.json", "*.txt"]
        try:
            folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", *others]))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(name, allow_patterns=["*.bin", *others]))
        except (HFValidationError, OSError) as error:  # what the hub raises are OSErrors
            raise InputError(
                f"{name_or_folder}: no such folder, and no such checkpoint on the hub ({error}). "
                "Give a folder with model.safetensors, or check the name and the network."
            ) from None
    if folder.is_file():
        files = [folder]
    else:
        patterns = ("model*.safetensors", "pytorch_model*.bin")
        files = next((found for p in patterns if (found := sorted(folder.glob(p)))), [])
    if not files:
        raise InputError(f"{folder}: no weights; expected model.safetensors or pytorch_model.bin")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                state.update(load_file(file))
            else:
                # weights_only: a pickle from elsewhere must not run code
                loaded = torch.load(file, map_location="cpu", weights_only=True)
                state.update(loaded["model"] if isinstance(loaded.get("model"), dict) else loaded)
        except Exception as error:
            raise InputError(
                f"{file}: not readable as weights ({type(error).__name__}: {error})"
            ) from None
    return files[0], state


def resized(config: MEDConfig, image_size_px: int) -> MEDConfig:
    """The same configuration for images of another size."""
    return replace(config, image_size_px=image_size_px)
