"""The three objectives on a batch: ITC, ITM and LM (paper, section 3.2); shared work is done once.

An image goes through its tower once a step, and the cross-attention's keys and values are computed
once an image for all the texts that are matched with it or written for it.

Dimensions: B batch (images), N pairs of ITM, L tokens, E ITC embedding, V vocabulary in use.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from capfilt.config import Itc
from capfilt.models import losses
from capfilt.models.med import MED
from capfilt.models.momentum import momentum_copy, momentum_update
from capfilt.models.text_tower import CrossKeysValues
from capfilt.models.tokens import tokenize
from capfilt.training import ranks
from capfilt.training.data import Batch


@dataclass(frozen=True)
class Embedded:
    """A batch in ITC's space.

    Attributes:
        images: `[B, E]`, of length 1.
        texts: `[B, E]`, of length 1.
        known_images: the same without dropout and gradient: ITM chooses its negatives by these and
            reads their similarity.
        known_texts: the same for the texts.
        pooled_images: `[B, pooled_width]`, without gradient.
        pooled_texts: `[B, D]`, without gradient.
    """

    images: Tensor
    texts: Tensor
    known_images: Tensor
    known_texts: Tensor
    pooled_images: Tensor
    pooled_texts: Tensor


def embed(model: MED, features: Tensor, ids: Tensor, mask: Tensor) -> Embedded:
    """A batch in ITC's space: `[B, P, Dv]` features, `[B, L]` ids and mask."""
    pooled_texts = model.pool_text(ids, mask)
    pooled_images = model.pool_image(features)
    images, texts = model.project_image(pooled_images), model.project_text(pooled_texts)
    pooled = pooled_images.detach(), pooled_texts.detach()
    if model.config.projection_hidden is None:  # heads without dropout
        return Embedded(images, texts, images.detach(), texts.detach(), *pooled)
    known_images, known_texts = model.known_image(features), model.known_text(pooled_texts)
    return Embedded(images, texts, known_images, known_texts, *pooled)


def image_features(model: MED, batch: Batch, device: str) -> Tensor:
    """The image tower's output `[B, P, Dv]`: from the cache, or from the pictures."""
    if batch.features is not None:
        return batch.features.to(device)
    assert batch.pixels is not None
    return model.encode_image(batch.pixels.to(device))


def pair_weights(batch: Batch, weights: Mapping[str, float], device: str) -> Tensor | None:
    """How much each pair of a batch counts, `[B]`; None when no pair has a weight of its own."""
    if not weights:
        return None
    return torch.tensor([weights.get(key, 1.0) for key in batch.keys], device=device)


def augment_features(features: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Augments a cached feature map: flips half of them left to right, and blanks some cells.

    Args:
        features: `[B, P, Dv]`, a square grid.
        share: of the cells to blank, 0..1; 0 leaves everything as it is.
        generator: source of the draws (CPU).

    Returns:
        `[B, P, Dv]`.
    """
    if share == 0:
        return features
    rows, cells, _ = features.shape
    side = round(cells**0.5)
    flip = (torch.rand(rows, 1, 1, 1, generator=generator) < 0.5).to(features.device)
    grid = features.unflatten(1, (side, side))
    features = torch.where(flip, grid.flip(2), grid).flatten(1, 2)
    blank = torch.rand(rows, cells, 1, generator=generator) < share
    return features.masked_fill(blank.to(features.device), 0.0)


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
        self.moved_at: int | None = None
        self.image_learns = any(p.requires_grad for p in model.vision.parameters())
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
        pixels: Tensor | None,
        ids: Tensor,
        mask: Tensor,
        image_ids: Tensor,
        step: int,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The ITC loss of a step: momentum update, momentum features, loss, then the queue.

        Args:
            model: the online model.
            embedded: the batch in its ITC space.
            features: `[B, P, Dv]`, what its image tower made of the pictures.
            pixels: `[B, 3, S, S]`, the pictures, or None where features are cached. Where the image
                tower learns, the momentum encoders have a slow one of their own, which reads them.
            ids: `[B, L]`, texts that start with `[CLS]`.
            mask: `[B, L]`.
            image_ids: `[B]`.
            step: of the training; the momentum encoders move once in each, however many slices
                its batch is cut into.
            sample_weight: `[B]`, how much each pair counts.

        Returns:
            A scalar.

        Raises:
            ConfigError: the batch of all processes is larger than the queue.
        """
        images = losses.gather_with_gradient(embedded.images)
        texts = losses.gather_with_gradient(embedded.texts)
        with torch.no_grad():
            everyone = losses.gather_with_gradient(image_ids)
        slow_images = slow_texts = None
        if self.slow is not None:
            assert self.config.momentum is not None
            with torch.no_grad():
                if self.moved_at != step:
                    momentum_update(self.slow, model, self.config.momentum)
                    self.moved_at = step
                if self.image_learns and pixels is not None:
                    features = self.slow.encode_image(pixels.to(features.device))
                slow_images = losses.gather_with_gradient(self.slow.embed_image(features))
                slow_texts = losses.gather_with_gradient(self.slow.embed_text(ids, mask))
        if sample_weight is not None:
            sample_weight = losses.gather_with_gradient(sample_weight)
        alpha = losses.ramped_alpha(self.config.alpha, step, self.ramp_steps)
        loss = losses.itc_loss(
            images,
            texts,
            model.temp,
            image_ids=everyone,
            momentum_image=slow_images,
            momentum_text=slow_texts,
            queue=self.queue,
            alpha=alpha,
            sample_weight=sample_weight,
        )
        if self.queue is not None:
            assert slow_images is not None and slow_texts is not None  # as `Itc` asks for
            self.queue.enqueue(slow_images, slow_texts, everyone)
        return loss


def itm_objective(
    model: MED,
    tokenizer: PreTrainedTokenizerBase,
    captions: list[str],
    embedded: Embedded,
    adapted: Tensor,
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

    With several processes the hard ones are drawn from the batch of all of them.

    Args:
        model: the MED.
        tokenizer: of its text tower.
        captions: B texts.
        embedded: their and the images' ITC embeddings.
        adapted: the B images' tokens, from `MED.adapt`.
        cross: keys and values of the B images.
        image_ids: `[B]`.
        hardness: 0 draws negatives at random, 1 as the paper does (at a temperature of 0.02 at
            least).
        max_tokens: longest text.
        generator: source of the draws; in the same state on all ranks.
        further: more negatives: the image's row and a text that does not match it.
        weight: `[B]`, how much each positive counts.

    Returns:
        The loss, and the share of pairs that it calls right.
    """
    count = len(captions)
    device = embedded.images.device
    images = losses.gather_with_gradient(embedded.known_images)
    texts = losses.gather_with_gradient(embedded.known_texts)
    everyone = [caption for part in ranks.gather(captions) for caption in part]
    with torch.no_grad():
        sim = images @ texts.T
        image_ids = losses.gather_with_gradient(image_ids)
        hard_text, hard_image = losses.hard_negatives(
            sim.cpu(),
            image_ids.cpu(),
            temp=model.temp.detach().cpu().clamp(min=0.02),
            generator=generator,
            hardness=hardness,
        )
    start = ranks.rank() * count  # place of this process's rows among all
    rows = torch.arange(start, start + count)
    hard_text, hard_image = hard_text[rows], hard_image[rows]
    keep_text, keep_image = hard_text >= 0, hard_image >= 0
    image_rows = torch.cat(
        [
            rows,
            rows[keep_text],
            hard_image[keep_image],
            torch.tensor([start + row for row, _ in further], dtype=torch.long),
        ]
    )
    text_rows = torch.cat([rows, hard_text[keep_text], rows[keep_image]])
    negatives = [everyone[row] for row in text_rows[count:].tolist()]
    pairs = [*captions, *negatives, *(text for _, text in further)]
    labels = torch.zeros(len(pairs), dtype=torch.long)
    labels[:count] = 1
    ids, mask = tokenize(tokenizer, pairs, max_tokens, first_token="enc")
    ids, mask, image_rows = ids.to(device), mask.to(device), image_rows.to(device)
    pooled_images = losses.gather_with_gradient(embedded.pooled_images)
    pooled_texts = losses.gather_with_gradient(embedded.pooled_texts)
    text_rows = text_rows.to(device)
    text_embeds, pooled_texts = texts[text_rows], pooled_texts[text_rows]
    if further:
        first, first_mask = tokenize(
            tokenizer, [text for _, text in further], max_tokens, first_token="cls"
        )
        first, first_mask = first.to(device), first_mask.to(device)
        with torch.no_grad():
            more = model.pool_text(first, first_mask)
            text_embeds = torch.cat([text_embeds, model.known_text(more)])
            pooled_texts = torch.cat([pooled_texts, more])
    itm_start = model.itm_start_of(
        images[image_rows], text_embeds, ids, pooled_images[image_rows], pooled_texts
    )
    image_index = image_rows
    if ranks.world_size() > 1:
        # hard images of other processes: their keys and values are computed from their tokens
        # (the tokens travel, with their gradient), and stand behind those of this process's images
        tokens = losses.gather_with_gradient(adapted)
        far = model.cross_keys_values(tokens[hard_image[keep_image].to(device)], "encoder")
        cross = [
            (torch.cat([key, far_key]), torch.cat([value, far_value]))
            for (key, value), (far_key, far_value) in zip(cross, far, strict=True)
        ]
        image_index = image_rows - start
        begin = count + int(keep_text.sum())
        hard = slice(begin, begin + int(keep_image.sum()))
        image_index[hard] = torch.arange(count, count + hard.stop - hard.start, device=device)
    logits = model.itm_logits(ids, mask, cross, image_index=image_index, start=itm_start)
    weights = None
    counted = torch.tensor(float(len(pairs)), device=device)
    if weight is not None:
        weights = torch.ones(len(pairs), device=device)
        weights[:count] = weight
        counted = weights.sum()
    labels = labels.to(device)
    loss = losses.itm_loss(logits, labels, weights, denominator=losses.mean_across_ranks(counted))
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
    whole: list[str] | None = None,
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
        whole: texts of the whole batch, when these are a slice of it: the mean is then taken over
            its tokens, so that the slices together give its loss. Not with `weight`.

    Returns:
        The loss.
    """
    texts = [f"{prompt} {caption}".strip() for caption in captions]
    ids, mask = tokenize(tokenizer, texts, max_tokens, first_token="dec")
    prompt_length = 1
    if prompt:
        prompt_length = (
            int(tokenize(tokenizer, [prompt], max_tokens, first_token="dec")[1].sum()) - 1
        )
    # the first label is [DEC] itself, which the shift leaves out; so an empty prompt masks one
    labels = losses.lm_labels(ids, mask, prompt_length)
    device = cross[0][0].device
    ids, labels = ids.to(device), labels.to(device)
    if vocabulary is not None:
        known = labels != losses.IGNORED
        labels = torch.where(known, torch.searchsorted(vocabulary, labels.clamp(min=0)), labels)
    logits = model.lm_logits(ids, None, cross, vocab_ids=vocabulary)
    tokens = losses.lm_token_count(labels, weight)
    if whole is not None:
        together = [f"{prompt} {caption}".strip() for caption in whole]
        lengths = tokenize(tokenizer, together, max_tokens, first_token="dec")[1].sum(1)
        tokens = (lengths - prompt_length).clamp(min=0).sum().to(device) * (
            len(captions) / len(whole)
        )
    return losses.lm_loss(
        logits, labels, label_smoothing, weight, denominator=losses.mean_across_ranks(tokens)
    )


def vocabulary_in_use(
    tokenizer: PreTrainedTokenizerBase, captions: Iterable[str], prompt: str
) -> Tensor:
    """The sorted ids of the tokens that these texts are made of, with the ending `[SEP]`.

    The LM head over them alone costs a tenth of the whole; on a set that is small against the
    tokenizer's vocabulary nothing else can be learned anyway.
    """
    used = {int(tokenizer.sep_token_id)}
    captions = iter(captions)
    while part := list(islice(captions, 1000)):
        encoded = tokenizer(part, add_special_tokens=False)["input_ids"]
        used.update(token for ids in encoded for token in ids)
    used.update(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return torch.tensor(sorted(used))
