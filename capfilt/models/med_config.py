"""The shape of a MED: everything that decides its parts, and the three presets of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from capfilt.errors import ConfigError
from capfilt.models.efficientnet_lite import VARIANTS, map_channels

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


def resized(config: MEDConfig, image_size_px: int) -> MEDConfig:
    """The same configuration for images of another size."""
    return replace(config, image_size_px=image_size_px)
