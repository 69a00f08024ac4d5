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

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.errors import ConfigError, InputError
from capfilt.models.efficientnet_lite import EfficientNetLite, EfficientNetLites
from capfilt.models.itm_start import ITMStart
from capfilt.models.med_config import MEDConfig
from capfilt.models.text_tower import (
    SPECIAL_IDS,
    CrossAttention,
    CrossKeysValues,
    Dropout,
    FeedForward,
    KeysValues,
    LMHead,
    SelfAttention,
    TextEmbeddings,
    TextLayer,
    TextTower,
)
from capfilt.models.vit import ViT

Functionality = Literal["encoder", "decoder"]


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

        Raises:
            InputError: EfficientNet-Lite's tokens are of another picture size.
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

    @torch.no_grad()
    def known_text(self, pooled: Tensor) -> Tensor:
        """`project_text` without dropout and gradient: what ITM reads of what ITC knows."""
        training = self.text_proj.training
        self.text_proj.eval()
        embeds = self.project_text(pooled)
        self.text_proj.train(training)
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

        Raises:
            InputError: a text is longer than the model has positions.
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

        Raises:
            InputError: a text is longer than the model has positions.
            ValueError: `start` is missing.
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

        Raises:
            InputError: a text is longer than the model has positions.
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
