"""The three losses of MED: contrastive (ITC), matching (ITM) and language modelling (LM).

Dimensions: B batch, Q queue, E embedding, L tokens, V vocabulary, C candidates (B, plus Q when a
queue is given).

All functions work on plain tensors and compute in float32 (float64 stays float64), whatever
autocast says: a similarity rounded to bfloat16 and divided by a temperature of 0.07 is off by
several hundredths of a logit.

Across ranks: gather the embeddings with `gather_with_gradient` and compute the loss of the global
batch on every rank; the average of gradients that DDP takes is then the gradient of the
single-process loss. Where a loss is a mean over a count that differs between ranks (tokens,
surviving negatives), give `denominator=mean_across_ranks(count)`.

Source: Li et al., BLIP, 2022 (arXiv 2201.12086), section 3.2; the soft targets and the queue are
those of ALBEF (arXiv 2107.07651), sections 3.2 and 3.3, equations 1 and 6.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.errors import ConfigError

IGNORED = -100
"""Label that takes no part in the LM loss (the convention of transformers and of torch)."""

NO_NEGATIVE = -1
"""Index that `hard_negatives` gives to a row without a candidate; the caller drops the row."""


class Queue(nn.Module):
    """The last Q momentum features of images and texts, as further negatives of ITC.

    Entries never written are left out of the loss (the released code fills them with random
    directions instead, which are negatives that teach nothing). The buffers are part of the state,
    so that a resumed run sees the same queue.
    """

    image_queue: Tensor
    text_queue: Tensor
    id_queue: Tensor
    written: Tensor

    def __init__(self, embed_dim: int, queue_size: int) -> None:
        """Make an empty queue.

        Args:
            embed_dim: E, width of the projected features.
            queue_size: Q, number of pairs kept (57,600 in the paper).

        Raises:
            ConfigError: `queue_size` is not positive.
        """
        super().__init__()
        if queue_size < 1:
            raise ConfigError(
                f"queue_size: {queue_size} is not a positive number of pairs; "
                "leave the queue off with queue_size: 0"
            )
        self.queue_size = queue_size
        self.register_buffer("image_queue", torch.zeros(embed_dim, queue_size))
        self.register_buffer("text_queue", torch.zeros(embed_dim, queue_size))
        self.register_buffer("id_queue", torch.full((queue_size,), IGNORED, dtype=torch.long))
        self.register_buffer("written", torch.zeros((), dtype=torch.long))
        # Mirrored on the host: reading it off the device would wait for the device each step.
        self._written = 0
        self.register_load_state_dict_post_hook(_read_count)

    @property
    def pointer(self) -> int:
        """Column that the next pair is written to."""
        return self._written % self.queue_size

    @property
    def filled(self) -> int:
        """Number of columns that hold a pair."""
        return min(self._written, self.queue_size)

    def features(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give what is in the queue.

        Returns:
            Image features [E, filled], text features [E, filled], image ids [filled].
        """
        n = self.filled
        return self.image_queue[:, :n], self.text_queue[:, :n], self.id_queue[:n]

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, image_ids: Tensor | None = None) -> None:
        """Write a batch over the oldest entries, wrapping round at the end.

        Called after the loss, with the features of all ranks. The batch need not divide Q.

        Args:
            image: momentum image features [B, E].
            text: momentum text features [B, E].
            image_ids: ids of the images [B]; None writes -100, which equals no id of a batch.

        Raises:
            ConfigError: the batch is larger than the queue.
        """
        batch = image.shape[0]
        if batch > self.queue_size:
            raise ConfigError(
                f"queue_size: {self.queue_size} is smaller than the global batch of {batch} pairs; "
                f"set it to a multiple of {batch}, or leave the queue off with queue_size: 0"
            )
        columns = (torch.arange(batch, device=image.device) + self.pointer) % self.queue_size
        self.image_queue[:, columns] = image.detach().T.to(self.image_queue.dtype)
        self.text_queue[:, columns] = text.detach().T.to(self.text_queue.dtype)
        if image_ids is None:
            self.id_queue[columns] = IGNORED
        else:
            self.id_queue[columns] = image_ids.to(self.id_queue.dtype)
        self._written += batch
        self.written.fill_(self._written)


def _read_count(queue: Queue, _: object) -> None:
    queue._written = int(queue.written)


def itc_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    temp: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    momentum_image: Tensor | None = None,
    momentum_text: Tensor | None = None,
    queue: Queue | None = None,
    alpha: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Image-text contrastive loss, the mean of image-to-text and text-to-image.

    With momentum features, each online feature is compared with the momentum features of the batch
    and of the queue; without, with the online features of the batch. The targets are `alpha` of the
    softmax of the momentum similarities and `1 - alpha` of the hard ones: the pair itself, or all
    candidates of the same image in equal parts when `image_ids` is given. Gradients flow to the
    online features and to `temp` (not through the targets). The queue is read, not written.

    Args:
        image_embeds: image features of length 1 [B, E].
        text_embeds: text features of length 1 [B, E]; row i belongs to row i of `image_embeds`.
        temp: temperature, a scalar (also as [1]), above 0.
        image_ids: integer ids [B], not negative, by which positives are told; None takes the
            diagonal.
        momentum_image: features of the momentum image tower [B, E].
        momentum_text: features of the momentum text encoder [B, E].
        queue: earlier momentum features; needs the momentum features.
        alpha: weight of the soft targets, 0 to 1; above 0 needs the momentum features.
        sample_weight: weights of the pairs [B], not negative; the loss is the weighted mean over
            pairs.

    Returns:
        The loss, a scalar.

    Raises:
        ConfigError: one momentum feature is given without the other, a queue or alpha without them,
            or alpha is outside 0 to 1.

    Source: BLIP section 3.2; ALBEF equations 1 and 6.
    """
    if (momentum_image is None) != (momentum_text is None):
        raise ConfigError("itc_loss: give both momentum_image and momentum_text, or neither")
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"alpha: {alpha} is outside 0 to 1")
    with torch.autocast(image_embeds.device.type, enabled=False):
        image, text = _full(image_embeds), _full(text_embeds)
        if momentum_image is None or momentum_text is None:
            if queue is not None or alpha > 0:
                raise ConfigError(
                    f"alpha: {alpha}, queue: {'off' if queue is None else queue.queue_size}: soft "
                    "targets and the queue need the momentum encoders; set alpha to 0 and the "
                    "queue off, or switch momentum on"
                )
            logits = image @ text.T / temp
            targets = _hard_targets(image.shape[0], 0, image_ids, None, image)
            image_to_text = _soft_cross_entropy(logits, targets)
            text_to_image = _soft_cross_entropy(logits.T, targets)
        else:
            image_m, text_m = _full(momentum_image).detach(), _full(momentum_text).detach()
            images, texts, queue_ids = image_m.T, text_m.T, None
            if queue is not None:
                image_queue, text_queue, queue_ids = queue.features()
                images = torch.cat([images, image_queue.to(images.dtype)], dim=1)
                texts = torch.cat([texts, text_queue.to(texts.dtype)], dim=1)
            hard = _hard_targets(
                image.shape[0], images.shape[1] - image.shape[0], image_ids, queue_ids, image
            )
            targets_i2t = targets_t2i = hard
            if alpha > 0:
                with torch.no_grad():
                    soft_i2t = F.softmax(image_m @ texts / temp, dim=1)
                    soft_t2i = F.softmax(text_m @ images / temp, dim=1)
                    targets_i2t = torch.lerp(hard, soft_i2t, alpha)
                    targets_t2i = torch.lerp(hard, soft_t2i, alpha)
            image_to_text = _soft_cross_entropy(image @ texts / temp, targets_i2t)
            text_to_image = _soft_cross_entropy(text @ images / temp, targets_t2i)
        return _mean((image_to_text + text_to_image) / 2, sample_weight, None)


def hard_negatives(
    sim: Tensor,
    image_ids: Tensor | None = None,
    *,
    temp: Tensor | float,
    generator: torch.Generator | None = None,
    hardness: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Draw for each image a text, and for each text an image, that does not belong to it.

    The draw is multinomial over the softmax of `hardness * sim / temp` among the candidates. The
    softmax is taken after the pairs of the same image are masked: that is the distribution which
    zeroing their weights gives, without the underflow when the true pair takes all of the mass (the
    released pretraining code adds 1e-4 for that).

    Args:
        sim: similarities, images by texts [B, B]; for negatives across ranks, those of the global
            batch with a generator in the same state on each rank, of which a rank then takes its
            own rows.
        image_ids: ids [B]; pairs of the same id are no candidates. None masks the diagonal alone.
        temp: temperature, above 0.
        generator: source of the draws, on the device of `sim`.
        hardness: 0 draws uniformly (easy negatives), 1 as the paper does, between a tempered
            softmax.

    Returns:
        Index of the text for each image [B] and of the image for each text [B]; -1 where a row has
        no candidate (a batch of one image), which the caller drops.

    Source: BLIP section 3.2 (ITM); ALBEF section 3.2, "hard negatives".
    """
    with torch.no_grad():
        batch = sim.shape[0]
        if image_ids is None:
            same = torch.eye(batch, dtype=torch.bool, device=sim.device)
        else:
            same = image_ids[:, None] == image_ids[None, :]
        # hardness 0 drops the similarities altogether: 0 * inf would not be 0.
        logits = _full(sim) * (hardness / temp) if hardness > 0 else torch.zeros_like(_full(sim))
        return (
            _draw_candidates(logits, same, generator),
            _draw_candidates(logits.T, same, generator),
        )


def _draw_candidates(logits: Tensor, same: Tensor, generator: torch.Generator | None) -> Tensor:
    weights = F.softmax(logits.masked_fill(same, -torch.inf), dim=1)
    # A NaN (diverged similarity, or a row without a candidate) would be a device-side assert in
    # multinomial, and the divergence check that names step and keys would never run. Such rows
    # draw uniformly instead.
    broken = ~torch.isfinite(weights).all(dim=1, keepdim=True)
    candidates = ~same
    alone = ~candidates.any(dim=1, keepdim=True)
    uniform = (candidates | alone).to(weights.dtype)
    index = torch.multinomial(
        torch.where(broken, uniform, weights), num_samples=1, generator=generator
    )
    return index.masked_fill(alone, NO_NEGATIVE).squeeze(1)


def itm_loss(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Image-text matching loss: cross-entropy of two classes.

    Args:
        logits: scores of no match and match [N, 2], from the positives and the negatives together.
        labels: 1 for a match, 0 for none [N].
        weight: weights of the rows [N], not negative; the loss is the weighted mean.
        label_smoothing: share of the target spread over both classes (0 in the paper).
        denominator: what the sum is divided by; None takes N, or the sum of the weights.

    Returns:
        The loss, a scalar; 0 (with a gradient of 0) when there is no row or no weight.

    Source: BLIP section 3.2 (ITM).
    """
    losses = F.cross_entropy(
        _full(logits), labels.long(), reduction="none", label_smoothing=label_smoothing
    )
    return _mean(losses, weight, denominator)


def lm_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.1,
    weight: Tensor | None = None,
    *,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Language modelling loss: cross-entropy of each token given those before it, mean per token.

    Labels are aligned with the input (see `lm_labels`); the shift by one is done here. The mean is
    over all tokens of the batch that are not masked, as transformers' BLIP takes it, so a long
    caption weighs more than a short one.

    Args:
        logits: scores of the next token [B, L, V].
        labels: token ids, -100 where masked [B, L].
        label_smoothing: share of the target spread over the vocabulary (0.1 in the paper's code).
        weight: weights of the captions [B], not negative; the loss is the weighted mean per token.
        denominator: what the sum is divided by; None takes the (weighted) number of tokens. Across
            ranks or accumulated micro-batches, give the mean of `lm_token_count` so that the whole
            is one mean per token.

    Returns:
        The loss, a scalar; 0 (with a gradient of 0) when every label is masked.

    Source: BLIP section 3.2 (LM).
    """
    shifted = labels[:, 1:]
    losses = F.cross_entropy(
        _full(logits[:, :-1].flatten(0, 1)),
        shifted.flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    tokens = (shifted != IGNORED).to(losses.dtype)
    if weight is not None:
        tokens = tokens * weight[:, None].to(losses.dtype)
    return _mean(losses, tokens.flatten(), denominator)


def lm_token_count(labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Count the tokens that `lm_loss` averages over, each times its caption's weight.

    Args:
        labels: token ids, -100 where masked [B, L].
        weight: weights of the captions [B].

    Returns:
        The count, a float32 scalar.
    """
    tokens = (labels[:, 1:] != IGNORED).sum(dim=1).float()
    return tokens.sum() if weight is None else (tokens * weight).sum()


def lm_labels(input_ids: Tensor, attention_mask: Tensor, prompt_length: int) -> Tensor:
    """Make the labels of the captioner: the input with prompt and pads masked.

    Args:
        input_ids: token ids, the first of which is `[DEC]` [B, L].
        attention_mask: 1 for a token, 0 for a pad [B, L].
        prompt_length: number of first ids that are not predicted, `[DEC]` included (4 for "a
            picture of ").

    Returns:
        Labels, -100 where masked [B, L].
    """
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    labels[:, :prompt_length] = IGNORED
    return labels


def ramped_alpha(alpha: float, step: int, ramp_steps: int) -> float:
    """Give the weight of the soft targets: from 0 to `alpha` over `ramp_steps`, then `alpha`.

    Early on the momentum encoder knows nothing worth imitating. The ramp is one epoch in
    fine-tuning, two in pretraining.
    """
    return alpha if step >= ramp_steps else alpha * step / ramp_steps


def clamp_temp(temp: Tensor, low: float = 0.001, high: float = 0.5) -> None:
    """Clamp the learned temperature in place, at the start of each step."""
    with torch.no_grad():
        temp.clamp_(low, high)


def gather_with_gradient(x: Tensor) -> Tensor:
    """Concatenate a tensor of all ranks along the first dimension, with gradients.

    Every rank must give the same shape. The gradient is summed over the ranks, so a loss of the
    global batch that each rank computes in full gets, after DDP's average, the gradient of a single
    process. Without a process group, or with one rank, `x` comes back unchanged.

    Args:
        x: [B, ...], also integers or bool (ids), which carry no gradient.

    Returns:
        [B * ranks, ...], in the order of the ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def mean_across_ranks(x: Tensor) -> Tensor:
    """Average a tensor over the ranks, without a gradient; unchanged when there is one rank.

    As the denominator of a loss: DDP averages the ranks' losses, so each sum has to be divided by
    the mean count.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _hard_targets(
    batch: int, queued: int, image_ids: Tensor | None, queue_ids: Tensor | None, like: Tensor
) -> Tensor:
    """Targets [B, C], 1 in sum: the diagonal, or the row's image's candidates in equal parts."""
    if image_ids is None:
        return torch.eye(batch, batch + queued, dtype=like.dtype, device=like.device)
    ids = image_ids if queue_ids is None else torch.cat([image_ids, queue_ids])
    positive = (image_ids[:, None] == ids[None, :]).to(like.dtype)
    return positive / positive.sum(dim=1, keepdim=True)


def _soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(F.log_softmax(logits, dim=1) * targets).sum(dim=1)


def _mean(losses: Tensor, weight: Tensor | None, denominator: Tensor | float | None) -> Tensor:
    """Weighted mean [N] -> scalar; 0 instead of NaN when nothing has weight."""
    if weight is not None:
        losses = losses * weight.to(losses.dtype)
    if denominator is None:
        denominator = losses.numel() if weight is None else weight.sum().to(losses.dtype)
    if isinstance(denominator, Tensor):
        return losses.sum() / torch.where(denominator > 0, denominator, 1.0)
    return losses.sum() / (denominator or 1.0)
