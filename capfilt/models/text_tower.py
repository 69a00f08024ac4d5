"""BERT's layers with cross-attention to an image: what both text towers of MED are made of.

Dimensions: B images, N texts, P image tokens, L text tokens, D text width, V vocabulary, v rows of
it in use, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from capfilt.errors import InputError
from capfilt.models.med_config import MEDConfig

CLS_ID, SEP_ID, PAD_ID, DEC_ID, ENC_ID = 101, 102, 0, 30522, 30523
SPECIAL_IDS = (CLS_ID, SEP_ID, PAD_ID, DEC_ID, ENC_ID)

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, each `[B, H, P, D / H]`."""
CrossKeysValues = list[KeysValues]
"""Keys and values of all layers' cross-attention: computed once an image, used by all its texts."""


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
