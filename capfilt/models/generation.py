"""Caption generation with MED's decoder: greedy, nucleus, top-k and beam search.

The cross-attention's keys and values are computed once an image, and all rows of one image (its
captions, or its beams) ask them together, so they are neither repeated nor reordered. An image
leaves the batch when its captions have ended. Random draws are keyed by (seed, pair id, step), so a
caption depends neither on the batch nor on the order.

Dimensions: B images, n rows an image (captions, or beams), R = B * n rows in image order,
L tokens so far, v vocabulary in use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from capfilt.errors import ConfigError
from capfilt.models.med import MED
from capfilt.models.text_tower import DEC_ID, SEP_ID, CrossKeysValues, KeysValues

Method = Literal["nucleus", "top_k", "greedy", "beam"]


@dataclass(frozen=True)
class Generated:
    """One caption.

    Attributes:
        token_ids: what follows the prompt, without `[SEP]`.
        logprob: sum of the model's own log-probabilities of the generated tokens, `[SEP]` included:
            before temperature, penalty and truncation, over the vocabulary in use.
    """

    token_ids: list[int]
    logprob: float


def uniform(seed: int, pair_id: str, step: int) -> float:
    """A number in [0, 1) that depends on the three arguments only."""
    digest = hashlib.blake2b(f"{seed}|{pair_id}|{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


@torch.no_grad()
def read_images(
    model: MED, features: Tensor, word_bonus: float, vocab_ids: Tensor | None
) -> tuple[CrossKeysValues, Tensor | None]:
    """What `generate` needs of a batch of images: `cross_kv` and `bonus`.

    Args:
        model: the captioner.
        features: `[B, P, Dv]`, from `encode_image` or a cache of it.
        word_bonus: how much the words count that the model foresees (`caption.word_bonus`).
        vocab_ids: as in `generate`.

    Raises:
        ConfigError: a bonus, and the model has no word detectors.
    """
    cross_kv = model.cross_keys_values(model.adapt(features), "decoder")
    if not word_bonus:
        return cross_kv, None
    bonus = word_bonus * model.word_bonus(model.pool_image(features), vocab_ids)
    return cross_kv, bonus


@torch.inference_mode()
def generate(
    model: MED,
    cross_kv: CrossKeysValues,
    prompt_ids: Sequence[int],
    *,
    pair_ids: Sequence[str] | None = None,
    seed: int = 0,
    method: Method = "nucleus",
    top_p: float = 0.9,
    top_k: int | None = 50,
    temperature: float = 1.0,
    repetition_penalty: float = 1.1,
    min_length: int = 5,
    max_length: int = 20,
    num_beams: int = 3,
    length_penalty: float = 1.0,
    captions_per_image: int = 1,
    vocab_ids: Tensor | None = None,
    bonus: Tensor | None = None,
) -> list[Generated]:
    """Write captions for a batch of images.

    The settings mean what they mean in transformers: the penalty covers prompt and caption, top-k
    comes before top-p, and beam search is its beam search with `early_stopping=False`.

    Args:
        model: in evaluation mode.
        cross_kv: `model.cross_keys_values(adapted, "decoder")` of B images.
        prompt_ids: `[DEC]` and the prompt's tokens (`tokens.prompt_ids`).
        pair_ids: one name a caption, in image order; names the random draws of nucleus and top-k.
        seed: of the random draws.
        method: `nucleus` (top-k, then top-p), `top_k`, `greedy` or `beam`.
        top_p: probability mass that nucleus keeps, 0..1.
        top_k: tokens that nucleus and top-k keep; None for all. transformers' own default is 50.
        temperature: divides the logits of nucleus and top-k.
        repetition_penalty: 1 is off.
        min_length: `[SEP]` is held back while a text, prompt included, is shorter (tokens).
        max_length: a text, prompt included, ends here (tokens).
        num_beams: of beam search.
        length_penalty: beam search divides a text's score by its length to this power.
        captions_per_image: with nucleus and top-k only.
        vocab_ids: `[v]` int64, sorted: the tokens that may be written; None for all. Must hold
            `[SEP]`.
        bonus: `[B, v]`, added to the logits (beam search: log-probabilities) of tokens that the
            text doesn't hold yet (`read_images`).

    Returns:
        B * captions_per_image captions, in image order.

    Raises:
        ConfigError: the settings contradict each other.
        ValueError: the model is in training mode, names of the captions are missing, or the prompt
            does not start with `[DEC]`.
    """
    images = cross_kv[0][0].shape[0]
    rows = images * captions_per_image
    if model.training:
        raise ValueError("generate() needs a model in evaluation mode; call model.eval()")
    if method in ("greedy", "beam") and captions_per_image != 1:
        raise ConfigError(
            f"captions_per_image: {method} gives one caption an image; "
            "use nucleus or top_k for more"
        )
    if method in ("nucleus", "top_k"):
        if pair_ids is None or len(pair_ids) != rows:
            raise ValueError(f"{method} needs {rows} pair_ids, one a caption")
        if method == "nucleus" and not 0.0 < top_p <= 1.0:
            raise ConfigError(f"top_p: {top_p} is not in (0, 1]")
        if method == "top_k" and top_k is None:
            raise ConfigError("top_k: the method top_k needs a number of tokens")
        if temperature <= 0.0:
            raise ConfigError(
                f"temperature: {temperature} is not above 0; use the method greedy instead"
            )
    if len(prompt_ids) >= max_length:
        raise ConfigError(
            f"max_length: {max_length} tokens leave no room after a prompt of {len(prompt_ids)}; "
            "raise max_length"
        )
    if list(prompt_ids[:1]) != [DEC_ID] and model.config.vocab_size > DEC_ID:
        raise ValueError("the prompt must start with [DEC]")
    rules = _Rules(model, prompt_ids, vocab_ids, bonus, repetition_penalty, min_length, max_length)
    if method == "beam":
        return _beam_search(rules, cross_kv, num_beams, length_penalty)
    return _sample(
        rules,
        cross_kv,
        captions_per_image,
        None if method == "greedy" else list(pair_ids or ()),
        seed,
        top_p if method == "nucleus" else 1.0,
        top_k,
        temperature,
    )


class _Rules:
    """What all methods share: prompt, vocabulary in use, bonus, penalty and lengths."""

    def __init__(
        self,
        model: MED,
        prompt_ids: Sequence[int],
        vocab_ids: Tensor | None,
        bonus: Tensor | None,
        repetition_penalty: float,
        min_length: int,
        max_length: int,
    ) -> None:
        device = model.temp.device
        self.model = model
        self.device = device
        self.prompt = torch.tensor(list(prompt_ids), dtype=torch.long, device=device)
        self.bonus = bonus
        self.penalty = repetition_penalty
        self.min_length = min_length
        self.max_length = max_length
        self.vocab_ids = None if vocab_ids is None else vocab_ids.to(device)
        everything = torch.arange(model.config.vocab_size, device=device)
        self.ids = everything if self.vocab_ids is None else self.vocab_ids
        # where each token of the model's vocabulary sits among those in use; -1: it is not in use
        self.place = torch.full_like(everything, -1)
        self.place[self.ids] = torch.arange(len(self.ids), device=device)
        self.sep = int(self.place[SEP_ID])
        if self.sep < 0:
            raise ConfigError("vocab_ids: [SEP] (102) must be among them, else no caption can end")

    def start(
        self, cross_kv: CrossKeysValues, rows_per_image: int
    ) -> tuple[Tensor, list[KeysValues], Tensor]:
        """Run the prompt once an image.

        Returns:
            Logits `[B, v]`, the cache of R rows, and the tokens seen `[R, v]`.
        """
        images = cross_kv[0][0].shape[0]
        logits, past = self.model.decode_step(
            self.prompt.expand(images, -1), None, cross_kv, vocab_ids=self.vocab_ids
        )
        if rows_per_image > 1:
            past = [
                (k.repeat_interleave(rows_per_image, 0), v.repeat_interleave(rows_per_image, 0))
                for k, v in past
            ]
        seen = torch.zeros(
            images * rows_per_image, len(self.ids), dtype=torch.bool, device=self.device
        )
        known = self.place[self.prompt]
        seen[:, known[known >= 0]] = True
        return logits.float(), past, seen

    def step(
        self, tokens: Tensor, past: list[KeysValues], cross_kv: CrossKeysValues
    ) -> tuple[Tensor, list[KeysValues]]:
        """Read the newest token of each row `[R]` (its place in the vocabulary in use)."""
        logits, past = self.model.decode_step(
            self.ids[tokens][:, None], past, cross_kv, vocab_ids=self.vocab_ids
        )
        return logits.float(), past

    def apply(self, scores: Tensor, seen: Tensor, length: int, images: list[int]) -> Tensor:
        """Add the bonus, penalise repetition and hold `[SEP]` back.

        Args:
            scores: `[R, v]` logits or log-probabilities.
            seen: `[R, v]`, the tokens of each text.
            length: of the texts, prompt included.
            images: whose texts these are, as many rows each.
        """
        if self.bonus is not None:
            own = self.bonus[torch.tensor(images, device=self.device)]
            own = own.repeat_interleave(len(scores) // len(images), 0)
            scores = torch.where(seen, scores, scores + own)
        if self.penalty != 1.0:
            punished = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
            scores = torch.where(seen, punished, scores)
        if length < self.min_length:
            scores = scores.clone()
            scores[:, self.sep] = -torch.inf
        return scores


def _draw(
    scores: Tensor, numbers: Tensor, top_p: float, top_k: int | None, temperature: float
) -> Tensor:
    """Pick one token a row by inverting the cumulative distribution at a number in [0, 1).

    Args:
        scores: `[R, v]`.
        numbers: `[R]` float64.
        top_p: mass to keep.
        top_k: tokens to keep.
        temperature: divides the scores.

    Returns:
        `[R]`.
    """
    scores = scores.double() / temperature
    if top_k is not None and top_k < scores.shape[1]:
        ordered, index = scores.topk(top_k, dim=1)
    else:
        ordered, index = scores.sort(dim=1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=1)
    before = probabilities.cumsum(1) - probabilities
    # a token stays while those before it hold less than top_p: the one that crosses the line is in,
    # as in the paper on nucleus sampling
    kept = torch.where(before < top_p, probabilities, 0.0)
    cumulative = kept.cumsum(1)
    target = numbers[:, None] * cumulative[:, -1:]
    last = (kept > 0).sum(1, keepdim=True) - 1
    choice = torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
    return index.gather(1, choice)[:, 0]


def _sample(
    rules: _Rules,
    cross_kv: CrossKeysValues,
    rows_per_image: int,
    pair_ids: list[str] | None,
    seed: int,
    top_p: float,
    top_k: int | None,
    temperature: float,
) -> list[Generated]:
    """Greedy (no `pair_ids`), nucleus and top-k."""
    logits, past, seen = rules.start(cross_kv, rows_per_image)
    logits = logits.repeat_interleave(rows_per_image, 0)
    n = rows_per_image
    total = len(logits)
    texts: list[list[int]] = [[] for _ in range(total)]
    logprobs = [0.0] * total
    ended = [False] * total
    images = list(range(total // n))  # those still in the batch
    for length in range(len(rules.prompt), rules.max_length):
        rows = [image * n + i for image in images for i in range(n)]
        scores = rules.apply(logits, seen, length, images)
        if pair_ids is None:
            chosen = scores.argmax(1)
        else:
            step = length - len(rules.prompt)
            numbers = torch.tensor(
                [uniform(seed, pair_ids[row], step) for row in rows], dtype=torch.float64
            )
            # Apple's GPUs have no float64
            where = "cpu" if rules.device.type == "mps" else rules.device
            drawn = _draw(scores.to(where), numbers.to(where), top_p, top_k, temperature)
            chosen = drawn.to(rules.device)
        taken = logits.log_softmax(1).gather(1, chosen[:, None])[:, 0].tolist()
        for row, place, token, logprob in zip(
            rows, chosen.tolist(), rules.ids[chosen].tolist(), taken, strict=True
        ):
            if ended[row]:
                continue  # its image waits for another caption
            logprobs[row] += logprob
            ended[row] = place == rules.sep
            if not ended[row]:
                texts[row].append(token)
        if length + 1 == rules.max_length:
            break
        stay = [i for i, image in enumerate(images) if not all(ended[image * n : (image + 1) * n])]
        if not stay:
            break
        seen = seen.scatter(1, chosen[:, None], True)
        if len(stay) < len(images):
            images = [images[i] for i in stay]
            keep_images = torch.tensor(stay, device=rules.device)
            keep = torch.tensor([i * n + j for i in stay for j in range(n)], device=rules.device)
            cross_kv = [(k[keep_images], v[keep_images]) for k, v in cross_kv]
            past = [(k[keep], v[keep]) for k, v in past]
            seen, chosen = seen[keep], chosen[keep]
        logits, past = rules.step(chosen, past, cross_kv)
    return [Generated(text, logprob) for text, logprob in zip(texts, logprobs, strict=True)]


@dataclass(frozen=True)
class _Finished:
    """A complete hypothesis of one image: its score per length, and the caption."""

    score: float
    caption: Generated


def _beam_search(
    rules: _Rules, cross_kv: CrossKeysValues, num_beams: int, length_penalty: float
) -> list[Generated]:
    """Beam search, image by image over one batch of all their beams."""
    logits, past, seen = rules.start(cross_kv, num_beams)
    n = num_beams
    images = list(range(len(logits)))
    finished: list[list[_Finished]] = [[] for _ in images]
    # tokens (places) of every live beam, in the order of `images`; all start from one beam, the
    # prompt
    texts: list[list[list[int]]] = [[[] for _ in range(n)] for _ in images]
    model_logprobs = torch.zeros(len(images), n, device=rules.device)
    beam_scores = torch.full((len(images), n), -1e9, device=rules.device)
    beam_scores[:, 0] = 0.0
    logits = logits.repeat_interleave(n, 0)
    prompt_length = len(rules.prompt)
    vocabulary = len(rules.ids)
    for length in range(prompt_length, rules.max_length):
        plain = logits.log_softmax(1)
        scores = (
            rules.apply(plain, seen, length, images).view(len(images), n, vocabulary)
            + beam_scores[:, :, None]
        )
        # twice as many candidates as beams: at most one in a beam is [SEP], so enough of them can
        # go on
        best, index = scores.flatten(1).topk(min(2 * n, n * vocabulary), dim=1)
        beam, token = index // vocabulary, index % vocabulary
        flat = (torch.arange(len(images), device=rules.device) * n)[:, None] + beam
        taken = model_logprobs.flatten()[flat] + plain[flat, token]
        at_end = length + 1 == rules.max_length
        generated = length + 1 - prompt_length

        sources: list[int] = []
        stay: list[int] = []
        next_texts: list[list[list[int]]] = []
        next_positions: list[list[int]] = []
        rows = zip(best.tolist(), beam.tolist(), token.tolist(), taken.tolist(), strict=True)
        for i, (row_best, row_beam, row_token, row_taken) in enumerate(rows):
            image = images[i]
            going: list[int] = []
            for rank, score in enumerate(row_best):
                ends = row_token[rank] == rules.sep
                if ends or at_end:
                    # candidates after the first n only stand in for those that end
                    if rank < n and score > -1e8:
                        text = texts[i][row_beam[rank]] + ([] if ends else [row_token[rank]])
                        caption = Generated(text, row_taken[rank])
                        finished[image].append(
                            _Finished(score / generated**length_penalty, caption)
                        )
                elif len(going) < n:
                    going.append(rank)
            finished[image] = sorted(finished[image], key=lambda f: -f.score)[:n]
            if at_end:
                continue
            # transformers' rule: go on while the best live beam, at this length, beats the worst
            # finished text
            best_live = row_best[going[0]] / generated**length_penalty
            if len(finished[image]) < n or best_live > finished[image][-1].score:
                stay.append(i)
                sources += [i * n + row_beam[rank] for rank in going]
                next_texts.append([texts[i][row_beam[rank]] + [row_token[rank]] for rank in going])
                next_positions.append(going)
        if at_end or not stay:
            break
        kept = torch.tensor(stay, device=rules.device)
        positions = torch.tensor(next_positions, device=rules.device)
        chosen = token[kept].gather(1, positions).flatten()
        beam_scores = best[kept].gather(1, positions)
        model_logprobs = taken[kept].gather(1, positions)
        texts = next_texts
        source = torch.tensor(sources, device=rules.device)
        seen = seen[source].scatter(1, chosen[:, None], True)
        past = [(k[source], v[source]) for k, v in past]
        if len(stay) < len(images):
            cross_kv = [(k[kept], v[kept]) for k, v in cross_kv]
            images = [images[i] for i in stay]
        logits, past = rules.step(chosen, past, cross_kv)
    captions = []
    for hypotheses in finished:
        winner = hypotheses[0].caption
        ids = rules.ids[
            torch.tensor(winner.token_ids, dtype=torch.long, device=rules.device)
        ].tolist()
        captions.append(Generated(ids, winner.logprob))
    return captions
