"""The three objectives on a batch: ITC, ITM and LM (paper, section 3.2), sharing what can be shared.

An image goes through its tower once a step, and the cross-attention's keys and values are computed
once an image for all the texts that are matched with it or written for it.

Dimensions: B batch (images), N pairs of ITM, L tokens, E ITC embedding, V vocabulary in use.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from capfilt.config import Itc
from capfilt.models import losses
from capfilt.models.med import MED, CrossKeysValues
from capfilt.models.momentum import momentum_copy, momentum_update
from capfilt.models.tokens import tokenize
from capfilt.training.data import Batch


@dataclass(frozen=True)
class Embedded:
    """A batch in ITC's space.

    Attributes:
        images: `[B, E]`, of length 1.
        texts: `[B, E]`, of length 1.
    """

    images: Tensor
    texts: Tensor


def image_features(model: MED, batch: Batch, device: str) -> Tensor:
    """The image tower's output `[B, P, Dv]`: from the cache, or from the pictures."""
    if batch.features is not None:
        return batch.features.to(device)
    assert batch.pixels is not None
    return model.encode_image(batch.pixels.to(device))


def drop_cells(features: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Random erasing on cached features: leaves out a share of the grid's cells, and flips half of
    the batches left to right.

    Args:
        features: `[B, P, Dv]`, a square grid.
        share: of the cells, 0..1; 0 leaves everything as it is.
        generator: source of the draws (CPU).

    Returns:
        The features left `[B, P', Dv]` and the cell that each stands for `[B, P']`, or None.
    """
    if share == 0:
        return features, None
    rows, cells, _ = features.shape
    side = round(cells**0.5)
    left = max(1, round(cells * (1 - share)))
    order = torch.rand(rows, cells, generator=generator).argsort(1)[:, :left].to(features.device)
    kept = features.gather(1, order[..., None].expand(-1, -1, features.shape[-1]))
    flip = (torch.rand(rows, 1, generator=generator) < 0.5).to(features.device)
    mirrored = order - order % side + (side - 1 - order % side)
    return kept, torch.where(flip, mirrored, order)


class Contrast:
    """ITC with what it remembers: the momentum encoders and the queue."""

    def __init__(self, model: MED, config: Itc, device: str, ramp_steps: int) -> None:
        """Starts the momentum encoders at the model's weights, with an empty queue.

        Args:
            model: the online model.
            config: of ITC.
            device: where the model runs.
            ramp_steps: steps over which alpha rises.
        """
        self.config = config
        self.ramp_steps = ramp_steps
        self.slow = momentum_copy(model) if config.momentum is not None else None
        self.queue = None
        if config.queue_size:
            self.queue = losses.Queue(model.config.embed_dim, config.queue_size).to(device)

    def state(self) -> dict[str, torch.nn.Module]:
        """What a checkpoint must hold."""
        parts = {"momentum": self.slow, "queue": self.queue}
        return {name: part for name, part in parts.items() if part is not None}

    def loss(
        self,
        model: MED,
        embedded: Embedded,
        features: Tensor,
        ids: Tensor,
        mask: Tensor,
        image_ids: Tensor,
        step: int,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The ITC loss of a step; the order is the released code's: momentum update, features, loss, queue."""
        images = losses.gather_with_gradient(embedded.images)
        texts = losses.gather_with_gradient(embedded.texts)
        with torch.no_grad():
            everyone = losses.gather_with_gradient(image_ids)
        slow_images = slow_texts = None
        if self.slow is not None:
            assert self.config.momentum is not None
            with torch.no_grad():
                momentum_update(self.slow, model, self.config.momentum)
                slow_images = losses.gather_with_gradient(self.slow.embed_image(features))
                slow_texts = losses.gather_with_gradient(self.slow.embed_text(ids, mask))
        alpha = losses.ramped_alpha(self.config.alpha, step, self.ramp_steps)
        loss = losses.itc_loss(
            images,
            texts,
            model.temp,
            image_ids=everyone,
            momentum_image=slow_images,
            momentum_text=slow_texts,
            queue=self.queue,
            alpha=alpha if self.slow is not None else 0.0,
            sample_weight=sample_weight,
        )
        if self.queue is not None:
            self.queue.enqueue(
                (images if slow_images is None else slow_images).detach(),
                (texts if slow_texts is None else slow_texts).detach(),
                everyone,
            )
        return loss


def itm_objective(
    model: MED,
    tokenizer: PreTrainedTokenizerBase,
    captions: list[str],
    embedded: Embedded,
    cross: CrossKeysValues,
    image_ids: Tensor,
    *,
    hardness: float,
    max_tokens: int,
    generator: torch.Generator,
    further: list[tuple[int, str]],
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ITM on the positives, one hard text an image, one hard image a text, and further negatives.

    Args:
        model: the MED.
        tokenizer: of its text tower.
        captions: B texts.
        embedded: their and the images' ITC embeddings.
        cross: keys and values of the B images.
        image_ids: `[B]`.
        hardness: 0 draws negatives at random, 1 as the paper does.
        max_tokens: longest text.
        generator: source of the draws.
        further: more negatives: the image's row and a text that does not match it.
        weight: `[B]`, how much each positive counts.

    Returns:
        The loss, and the share of pairs that it calls right.
    """
    count = len(captions)
    device = embedded.images.device
    with torch.no_grad():
        sim = embedded.images @ embedded.texts.T
        hard_text, hard_image = losses.hard_negatives(
            sim.cpu(),
            image_ids.cpu(),
            temp=model.temp.detach().cpu().clamp(min=0.02),
            generator=generator,
            hardness=hardness,
        )
    rows = torch.arange(count)
    keep_text, keep_image = hard_text >= 0, hard_image >= 0
    image_rows = torch.cat([rows, rows[keep_text], hard_image[keep_image]])
    text_rows = torch.cat([rows, hard_text[keep_text], rows[keep_image]])
    texts = [captions[row] for row in text_rows.tolist()] + [text for _, text in further]
    image_rows = torch.cat([image_rows, torch.tensor([row for row, _ in further], dtype=torch.long)])
    labels = torch.zeros(len(texts), dtype=torch.long)
    labels[:count] = 1
    ids, mask = tokenize(tokenizer, texts, max_tokens, first_token="enc")
    ids, mask, image_rows = ids.to(device), mask.to(device), image_rows.to(device)
    text_embeds = embedded.texts[text_rows.to(device)]
    if further:
        first, first_mask = tokenize(
            tokenizer, [text for _, text in further], max_tokens, first_token="cls"
        )
        text_embeds = torch.cat([text_embeds, model.embed_text(first.to(device), first_mask.to(device))])
    itc_sim = (embedded.images[image_rows] * text_embeds).sum(-1)
    logits = model.itm_logits(ids, mask, cross, image_index=image_rows, itc_sim=itc_sim)
    weights = None
    if weight is not None:
        weights = torch.ones(len(texts), device=device)
        weights[:count] = weight
    labels = labels.to(device)
    loss = losses.itm_loss(logits, labels, weights)
    return loss, (logits.detach().argmax(1) == labels).float().mean()


def lm_objective(
    model: MED,
    tokenizer: PreTrainedTokenizerBase,
    captions: list[str],
    cross: CrossKeysValues,
    *,
    prompt: str,
    max_tokens: int,
    label_smoothing: float,
    vocabulary: Tensor | None,
    weight: Tensor | None = None,
) -> Tensor:
    """LM: cross-entropy of each token of the text given the image and the tokens before.

    Args:
        model: the MED.
        tokenizer: of its text tower.
        captions: B texts, in image order.
        cross: keys and values of the B images.
        prompt: stands before the text and isn't predicted; may be empty.
        max_tokens: longest text with the prompt.
        label_smoothing: of the cross-entropy.
        vocabulary: sorted token ids `[V]` that the head predicts; None for all.
        weight: `[B]`, how much each text counts.

    Returns:
        The loss.
    """
    texts = [f"{prompt} {caption}".strip() for caption in captions]
    ids, mask = tokenize(tokenizer, texts, max_tokens, first_token="dec")
    prompt_length = 1
    if prompt:
        prompt_length = int(tokenize(tokenizer, [prompt], max_tokens, first_token="dec")[1].sum()) - 1
    # the first label is [DEC] itself, which the shift leaves out; so an empty prompt masks one
    labels = losses.lm_labels(ids, mask, prompt_length)
    device = cross[0][0].device
    ids, labels = ids.to(device), labels.to(device)
    if vocabulary is not None:
        known = labels != losses.IGNORED
        labels = torch.where(known, torch.searchsorted(vocabulary, labels.clamp(min=0)), labels)
    logits = model.lm_logits(ids, None, cross, vocab_ids=vocabulary)
    return losses.lm_loss(logits, labels, label_smoothing, weight)


def vocabulary_in_use(tokenizer: PreTrainedTokenizerBase, captions: list[str], prompt: str) -> Tensor:
    """The sorted ids of the tokens that these texts are made of, with the ending `[SEP]`.

    The LM head over them alone costs a tenth of the whole; on a set that is small against the
    tokenizer's vocabulary nothing else can be learned anyway.
    """
    used = {int(tokenizer.sep_token_id)}
    for start in range(0, len(captions), 1000):
        encoded = tokenizer(captions[start : start + 1000], add_special_tokens=False)["input_ids"]
        used.update(token for ids in encoded for token in ids)
    used.update(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return torch.tensor(sorted(used))
