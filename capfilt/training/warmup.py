"""A cheap start of ITC: the two projection heads on frozen towers, before anything else is trained.

The pooled output of both towers is worked out once; a step is then two small MLPs and takes
milliseconds. It happens at least twice: on the human pairs alone, which tells how much each web
pair deserves to be believed, and on all pairs weighted by that; each further round weighs anew. Not
in the paper, which had 14 million pairs and needed no head start.

Dimensions: N pictures, M distinct texts, B batch, E ITC embedding.
"""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.config import HeadWarmup
from capfilt.models import losses
from capfilt.models.itm_start import Neighbours, WordDetectors
from capfilt.models.med import MED, zero_last_layer
from capfilt.models.text_tower import Dropout
from capfilt.models.tokens import tokenize
from capfilt.training import ranks
from capfilt.training.data import Stream
from capfilt.training.swaps import WordSwaps

TEXTS_AT_A_TIME = 128
EVIDENCE_AT_A_TIME = 1024
COMMON_TEXT, COMMON_IMAGE = 0.85, 0.25
"""How much the commonness of a text, and of a picture, counts against their similarity. More of a
picture's finds more exchanged texts; people's judgements (Flickr8k) want less."""
STYLE = 0.05
"""How much one unit (log-odds) of style counts beside the similarity."""
NEIGHBOURS = 0.5
"""How much counts that a text is near to captions of similar pictures."""
WORDS = 0.006
"""How much one unit (log probability) that the words of a text lack counts."""
WRONG_WORD = 0.035
"""How much one unit (log-odds) of the most doubtful word counts."""
CELLS, CELL_PICTURES = 4, 6000
"""So many cells of so many pictures, at most, are what the grid's components are found from."""
WORD_MIN_COUNT = 6
"""A word must stand in so many texts to get a detector."""
WORD_STEPS, WORD_BATCH, WORD_LR = 600, 256, 2e-3
SWAP_BELIEVED = 0.6
"""Words are exchanged in texts that weigh so much at least: others may be wrong as they are."""
SWAPS_A_TEXT = 2
SWAP_STEPS, SWAP_BATCH, SWAP_LR = 1000, 256, 5e-3


@dataclass(frozen=True)
class Pooled:
    """All pairs, as the heads see them.

    Attributes:
        keys: of the pictures, N.
        human: bool `[N]`.
        images: `[N, pooled_width]`, what ITC's image head reads.
        captions: M distinct texts, cleaned.
        texts: `[M, D]`, their pooled encoder output.
        owned: for each picture the rows of `texts` that are its own.
    """

    keys: list[str]
    human: np.ndarray
    images: Tensor
    captions: list[str]
    texts: Tensor
    owned: list[list[int]]


@torch.inference_mode()
def pool_pairs(model: MED, tokenizer: Any, stream: Stream, max_tokens: int, device: str) -> Pooled:
    """Runs both towers once over everything.

    Args:
        model: the MED; the scale of its channels and its principal components are set, if it has
            any.
        tokenizer: of its text tower.
        stream: all pairs, not augmented.
        max_tokens: longest text.
        device: where the model runs.
    """
    model.eval()
    keys: list[str] = []
    human: list[bool] = []
    images, cells = [], []
    scale = _ChannelScale(model.config.image_width)
    drawn = _drawn_cells(model, len(stream.inventory))
    for batch in stream.in_order():
        first = len(keys)
        keys += batch.keys
        human += batch.human.tolist()
        features = batch.features
        if features is None:
            assert batch.pixels is not None
            features = model.encode_image(batch.pixels.to(device))
        images.append(model.pool_tokens(features.to(device)))
        if model.config.lite_levels == "all":
            scale.add(features)
        rows = [row for row in range(len(batch.keys)) if first + row in drawn]
        if rows:
            assert model.adapter is not None
            grid = model.adapter.cells(features[rows].float())
            places = torch.tensor([drawn[first + row] for row in rows])
            cells.append(grid[torch.arange(len(rows))[:, None], places].flatten(0, 1))
    if model.config.lite_levels == "all":
        model.set_channel_scale(*scale.mean_and_std())
    if cells:
        model.set_grid_components(torch.cat(cells).to(device))
    pooled = torch.cat(images)
    if model.config.pooled_components is not None:
        model.set_components(pooled)
    owned = [texts for shard in stream.inventory.captions.values() for texts in shard]
    captions = sorted({text for own in owned for text in own}, key=len)
    place = {text: row for row, text in enumerate(captions)}
    return Pooled(
        keys,
        np.array(human),
        model.reduce(pooled).clone(),
        captions,
        pool_texts(model, tokenizer, captions, max_tokens, device).clone(),
        [[place[text] for text in own] for own in owned],
    )


def _drawn_cells(model: MED, pictures: int) -> dict[int, list[int]]:
    """The cells that the grid's components are found from: picture to `CELLS` places in its grid.

    Of more than `CELL_PICTURES` pictures, a draw of so many; none once the components are found.
    """
    if model.adapter is None or not model.adapter.lacks_components:
        return {}
    rng = np.random.default_rng(17)
    count = model.adapter.side**2
    chosen = rng.permutation(pictures)[:CELL_PICTURES]
    return {int(row): rng.permutation(count)[:CELLS].tolist() for row in chosen}


class _ChannelScale:
    """Mean and standard deviation of each channel over the cells of all pictures."""

    def __init__(self, channels: int) -> None:
        self.cells = 0
        self.sums = torch.zeros(2, channels, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """Counts some pictures' tokens, `[B, P, Dv]`."""
        cells = tokens.flatten(0, 1).float().cpu()
        self.cells += len(cells)
        self.sums += torch.stack([cells.sum(0), cells.square().sum(0)])

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """`[Dv]` each."""
        mean, square = self.sums / max(1, self.cells)
        return mean.float(), (square - mean.square()).clamp(min=0).sqrt().float()


@torch.inference_mode()
def pool_texts(
    model: MED, tokenizer: Any, texts: list[str], max_tokens: int, device: str
) -> Tensor:
    """Pooled encoder output `[M, D]` of M texts; sorted by length they cost least."""
    found = []
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        part = texts[start : start + TEXTS_AT_A_TIME]
        ids, mask = (x.to(device) for x in tokenize(tokenizer, part, max_tokens))
        found.append(model.pool_text(ids, mask))
    return torch.cat(found)


def warm_up_heads(
    model: MED,
    tokenizer: Any,
    stream: Stream,
    config: HeadWarmup,
    *,
    max_tokens: int,
    seed: int,
    device: str,
    folder: Path,
    progress: Callable[[int, int], None],
    reviewed: Mapping[str, bool] | None = None,
) -> dict[str, float]:
    """Trains the ITC heads in place and weighs the web pairs.

    Args:
        model: the MED.
        tokenizer: of its text tower.
        stream: all pairs, not augmented.
        config: how long and how fast.
        max_tokens: longest text.
        seed: of the draws.
        device: where the model runs.
        folder: `web_weights.json` goes there.
        progress: told after each step.
        reviewed: web pictures whose text people found right or wrong: they weigh 1 or 0.

    Returns:
        Key to weight (0..1) of the web pictures, see `weigh`. A human pair weighs 1 and isn't
        listed.
    """
    torch.manual_seed(seed)
    reset_heads(model, config.dropout)
    model.config = replace(model.config, text_residual_scale=config.text_residual_scale)
    pooled = pool_pairs(model, tokenizer, stream, max_tokens, device)
    web = np.flatnonzero(~pooled.human)
    everything = np.arange(len(pooled.keys))
    fresh = [p.detach().clone() for p in _head_parameters(model)]
    weights: dict[str, float] = {}
    verdicts = {key: float(right) for key, right in (reviewed or {}).items()}
    if len(web):
        total = config.steps + config.rounds * config.weighted_steps
        fit = _Fit(model, pooled, config, seed)
        fit.run(np.flatnonzero(pooled.human), None, config.steps, lambda n: progress(n, total))
        for number in range(config.rounds):
            weights = weigh(model, pooled, web)
            weights |= {key: verdicts[key] for key in weights.keys() & verdicts.keys()}
            # a new start: what the round before learned is in the weights
            with torch.no_grad():
                for parameter, value in zip(_head_parameters(model), fresh, strict=True):
                    parameter.copy_(value)
            given = np.array([weights.get(key, 1.0) for key in pooled.keys], np.float32)
            fit = _Fit(model, pooled, config, seed + 1 + number)
            done = config.steps + number * config.weighted_steps
            fit.run(
                everything, given, config.weighted_steps, partial(_later, progress, done, total)
            )
    else:
        _Fit(model, pooled, config, seed).run(
            everything, None, config.steps, lambda n: progress(n, config.steps)
        )
    if model.config.itm_from_itc:
        start_itm_from_itc(model, tokenizer, pooled, weights, max_tokens, seed)
    if not ranks.is_first():
        return weights
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "web_weights.json.tmp"
    temporary.write_text(json.dumps(weights), encoding="utf-8")
    os.replace(temporary, folder / "web_weights.json")
    return weights


@torch.inference_mode()
def weigh(model: MED, pooled: Pooled, web: np.ndarray) -> dict[str, float]:
    """Weighs web pictures by the rank of the similarity with their best text.

    The least similar quarter weighs 0, the most similar quarter 1, between them it rises evenly.
    """
    model.eval()
    images = model.project_image(pooled.images[torch.from_numpy(web)])
    texts = model.project_text(pooled.texts)
    sims = np.array(
        [
            float((texts[pooled.owned[row]] @ image).max())
            for row, image in zip(web, images, strict=True)
        ]
    )
    ranks = np.argsort(np.argsort(sims, kind="stable"), kind="stable")
    return {
        pooled.keys[row]: round(min(1.0, max(0.0, 2 * float(rank) / max(1, len(web) - 1) - 0.5)), 4)
        for row, rank in zip(web, ranks, strict=True)
    }


def reset_heads(model: MED, dropout: float) -> None:
    """Gives both heads and the temperature a fresh start; `dropout` is then the image head's."""
    with torch.no_grad():
        for head in (model.vision_proj, model.text_proj):
            for part in head.modules():
                if isinstance(part, nn.LayerNorm):
                    part.reset_parameters()
                if isinstance(part, nn.Linear):
                    nn.init.normal_(part.weight, std=0.02)
                    nn.init.zeros_(part.bias)
            if head is model.text_proj and model.config.text_residual:
                zero_last_layer(head)
        model.temp.fill_(0.07)
    dropouts = [part for part in model.vision_proj.modules() if isinstance(part, Dropout)]
    for before, between in zip(dropouts[::2], dropouts[1::2], strict=True):
        before.probability, between.probability = dropout / 2, dropout


def start_itm_from_itc(
    model: MED,
    tokenizer: Any,
    pooled: Pooled,
    weights: dict[str, float],
    max_tokens: int,
    seed: int,
) -> None:
    """Sets `ITMStart`: scale and bias by logistic regression on what the ITC embeddings say.

    Positives are the web pairs, by their weight (all pairs where there is no web); negatives are
    their pictures with another one's text, in all as heavy as what the weights don't believe: the
    scores that come of it are probabilities on the web's own mixture.
    """
    from sklearn.linear_model import LogisticRegression

    model.eval()
    rng = np.random.default_rng([seed, 11])
    start = model.itm_start
    with torch.no_grad():
        images = model.project_image(pooled.images)
        texts = model.project_text(pooled.texts)
    ids = tokenize(tokenizer, pooled.captions, max_tokens)[0].to(images.device)
    own = torch.tensor([texts[0] for texts in pooled.owned])
    other = own[torch.from_numpy(rng.permutation(len(own)))]
    believed = np.array([weights.get(key, 1.0) for key in pooled.keys])
    # not fitted: pairs that were trained on make similarity look better than it is
    shares = [1.0]
    if start.has_bank:
        _fill_bank(start.bank_images, images, rng)
        _fill_bank(start.bank_texts, texts[own], rng)
        _learn_style(start.style, texts, pooled)
        _fill_neighbours(start.neighbours, images, pooled, rng)
        shares += [-COMMON_TEXT, -COMMON_IMAGE, STYLE, NEIGHBOURS]
    if start.words is not None:
        unseen = _learn_words(start.words, tokenizer, ids, pooled, believed, seed)
        _learn_wrong_word(model, tokenizer, pooled, believed, unseen, max_tokens, seed)
        shares += [WORDS, WRONG_WORD]
    # where there are web pairs they decide: a human pair that was trained on looks too good
    chosen = ~pooled.human if weights else np.ones(len(believed), bool)
    believed = believed[chosen]
    direction = torch.tensor(shares, device=images.device)
    with torch.no_grad():
        right, wrong = (
            torch.cat(
                [
                    start.evidence(
                        images[at], texts[text], ids[text], pooled.images[at], pooled.texts[text]
                    )
                    for at, text in _parts(of)
                ]
            )
            for of in (own, other)
        )
        right, wrong = ((x @ direction).cpu().numpy()[chosen] for x in (right, wrong))
    fit = LogisticRegression(C=1e6).fit(
        np.concatenate([right, wrong])[:, None],
        np.repeat([1, 0], [len(right), len(wrong)]),
        np.concatenate([believed, np.full(len(wrong), max(0.1, 1 - float(believed.mean())))]),
    )
    with torch.no_grad():
        start.weights.copy_(float(fit.coef_[0, 0]) * direction)
        start.bias.fill_(float(fit.intercept_[0]))
    # and nothing else yet: its own logits start at the same value for both classes
    nn.init.zeros_(model.itm_head.weight)
    nn.init.zeros_(model.itm_head.bias)


def _parts(texts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some pictures at a time, with the text of each: rows of both; `texts` is `[N]`."""
    for rows in torch.arange(len(texts)).split(EVIDENCE_AT_A_TIME):
        yield rows, texts[rows]


def _draw(rng: np.random.Generator, rows: int, count: int) -> Tensor:
    """`count` of so many rows at random; all come once before any comes again."""
    rounds = [rng.permutation(rows) for _ in range(-(-count // rows))]
    return torch.from_numpy(np.concatenate(rounds)[:count])


@torch.no_grad()
def _fill_bank(bank: Tensor, embeds: Tensor, rng: np.random.Generator) -> None:
    """Draws the bank's rows from `[N, E]`; where there are fewer, some of them stand twice."""
    bank.copy_(embeds[_draw(rng, len(embeds), len(bank))])


@torch.no_grad()
def _fill_neighbours(
    neighbours: Neighbours, images: Tensor, pooled: Pooled, rng: np.random.Generator
) -> None:
    """Draws from the pairs that people wrote; where there are none, from all.

    The web's texts are what is to be judged: in the bank, a wrong one would vouch for itself.
    """
    described = pooled.human if pooled.human.any() else np.ones(len(images), bool)
    rows = [(row, text) for row in np.flatnonzero(described) for text in pooled.owned[row]]
    chosen = torch.tensor(rows)[_draw(rng, len(rows), len(neighbours.images))]
    neighbours.images.copy_(images[chosen[:, 0]])
    neighbours.texts.copy_(F.normalize(pooled.texts[chosen[:, 1]].float(), dim=-1))


@torch.no_grad()
def _learn_style(style: nn.Linear, texts: Tensor, pooled: Pooled) -> None:
    """Teaches `style` to tell what people wrote (above 0) from what stands on the web (below).

    Much of the web's texts are as good as people's; `ITMStart` cuts the style off at 0 for that.
    """
    from sklearn.linear_model import LogisticRegression

    rows = [text for own in pooled.owned for text in own]
    human = np.repeat(pooled.human, [len(own) for own in pooled.owned])
    if human.all() or not human.any():
        nn.init.zeros_(style.weight)
        nn.init.zeros_(style.bias)
        return
    fit = LogisticRegression(C=10.0, max_iter=500, class_weight="balanced").fit(
        texts[rows].cpu().numpy(), human
    )
    style.weight.copy_(torch.from_numpy(fit.coef_))
    style.bias.copy_(torch.from_numpy(fit.intercept_))


def _learn_words(
    words: WordDetectors,
    tokenizer: Any,
    ids: Tensor,
    pooled: Pooled,
    believed: np.ndarray,
    seed: int,
) -> Tensor:
    """Teaches the detectors which words stand in a picture's texts: logistic loss on each word.

    Args:
        words: trained in place; those it knows are the most frequent ones.
        tokenizer: of the text tower.
        ids: tokens of the distinct texts, `[M, L]`.
        pooled: the pictures, and which texts are whose.
        believed: `[N]`, how much the texts of a picture count; people's count twice.
        seed: of the draws.

    Returns:
        `[N, W]`, what the one net says of each picture that was not taught with it; float16.
    """
    weight = believed * np.where(pooled.human, 2.0, 1.0)
    known, target = _word_targets(words, ids, pooled, weight)
    counted = torch.from_numpy(weight).float()
    times = (target * counted[:, None]).sum(0)
    torch.manual_seed(seed)
    with torch.no_grad():
        # WordPiece marks a piece within a word by ##
        whole = [token.isalpha() for token in tokenizer.convert_ids_to_tokens(known)]
        words.know(known, times / counted.sum(), whole)
    rng = np.random.default_rng([seed, 13])
    fold = rng.integers(len(words.nets), size=len(weight))
    unseen = torch.zeros(len(weight), words.size, dtype=torch.float16)
    gained = torch.zeros(words.size)
    for number, net in enumerate(words.nets):
        rows = np.flatnonzero((weight > 0) & (fold != number))
        if not len(rows):  # a handful of pictures, all of them in one part
            rows = np.flatnonzero(weight)
        net.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
        for batch in _batches(rng, rows, WORD_BATCH, WORD_STEPS, optimizer, WORD_LR):
            logits, wanted = net(pooled.images[batch]), target[batch].to(pooled.images.device)
            loss = _bce(logits, wanted).sum(1)
            heavy = counted[batch].to(pooled.images.device)
            (loss @ heavy / heavy.sum()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        net.requires_grad_(False).eval()
        left_out = torch.from_numpy(np.flatnonzero(fold == number))
        for part in left_out.split(EVIDENCE_AT_A_TIME):
            said = net(pooled.images[part]).float().cpu()
            unseen[part] = said.half()
            worse = _bce(words.prior.cpu().expand_as(said), target[part])
            gained += ((worse - _bce(said, target[part])) * counted[part, None]).sum(0)
    with torch.no_grad():
        words.told.copy_(gained / times.clamp(min=1e-6))
    return unseen


def _bce(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def _learn_wrong_word(
    model: MED,
    tokenizer: Any,
    pooled: Pooled,
    believed: np.ndarray,
    unseen: Tensor,
    max_tokens: int,
    seed: int,
) -> None:
    """Teaches `WrongWord` with captions of which one word is exchanged for a related one.

    Args:
        model: its `itm_start.wrong_word` is trained in place.
        tokenizer: of its text tower.
        pooled: the pictures and their texts.
        believed: `[N]`, how much the texts of a picture count.
        unseen: `[N, W]`, from `_learn_words`: what detectors say of a picture that they were taught
            with looks better than what they say of a new one.
        max_tokens: longest text.
        seed: of the draws.
    """
    words, wrong_word = model.itm_start.words, model.itm_start.wrong_word
    assert words is not None and wrong_word is not None
    swaps = WordSwaps.learn(model, tokenizer, pooled.captions)
    columns = words.columns.tolist()
    tokens = tokenizer.get_vocab()
    wrong_word.relate(
        {
            columns[tokens[word]]: [columns[tokens[other]] for other in near]
            for word, near in swaps.neighbours.items()
        }
    )
    rng = np.random.default_rng([seed, 19])
    rows: list[int] = []
    right: list[str] = []
    changed: list[str] = []
    for row in np.flatnonzero(believed >= SWAP_BELIEVED).tolist():
        for text in pooled.owned[row]:
            caption = pooled.captions[text]
            swapped = [swaps.swap(caption, rng) for _ in range(SWAPS_A_TEXT)]
            found = [caption, *(other for other in swapped if other is not None)]
            changed += found
            right += [caption] * len(found)
            rows += [row] * len(found)
    last = wrong_word.net[-1]
    assert isinstance(last, nn.Linear)
    if changed == right:
        # no word could be exchanged: it says the same of every text
        nn.init.zeros_(last.weight)
        return
    ids, other_ids = (tokenize(tokenizer, part, max_tokens)[0] for part in (changed, right))
    device = wrong_word.related.device
    torch.manual_seed(seed)
    with torch.no_grad():
        for part in wrong_word.net:
            if isinstance(part, nn.Linear):
                part.reset_parameters()
    wrong_word.net.requires_grad_(True)
    optimizer = torch.optim.AdamW(wrong_word.net.parameters(), weight_decay=0.01)
    every = np.arange(len(rows))
    for batch in _batches(rng, every, SWAP_BATCH, SWAP_STEPS, optimizer, SWAP_LR):
        # a word is exchanged for one that is a single token too, so the tokens stay in line
        exchanged = (ids[batch] != other_ids[batch]).float().to(device)
        pictures, shown = [rows[i] for i in batch], ids[batch].to(device)
        logits = wrong_word.word_logits(unseen[pictures].float().to(device), shown, words)
        is_word = words.columns[shown] != words.size
        heavy = is_word * torch.from_numpy(believed[pictures]).to(logits)[:, None]
        ((_bce(logits, exchanged) * heavy).sum() / heavy.sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wrong_word.net.requires_grad_(False)


def _word_targets(
    words: WordDetectors, ids: Tensor, pooled: Pooled, weight: np.ndarray
) -> tuple[list[int], Tensor]:
    """The W most frequent words, and the share of each picture's texts that hold them, `[N, W]`."""
    special = set(words.special_ids())
    words_of = [set(row.tolist()) - special for row in ids.cpu()]
    counts: defaultdict[int, float] = defaultdict(float)
    shares: list[dict[int, float]] = []
    for own, heavy in zip(pooled.owned, weight, strict=True):
        found = Counter(word for text in own for word in words_of[text])
        shares.append({word: count / len(own) for word, count in found.items()})
        for word, count in found.items():
            counts[word] += count * float(heavy)
    frequent = sorted(counts, key=lambda word: -counts[word])[: words.size]
    known = [word for word in frequent if counts[word] >= WORD_MIN_COUNT]
    place = {word: column for column, word in enumerate(known)}
    target = torch.zeros(len(shares), words.size)
    for row, share in enumerate(shares):
        for word in share.keys() & place.keys():
            target[row, place[word]] = share[word]
    return known, target


def _later(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _head_parameters(model: MED) -> list[torch.nn.Parameter]:
    return [*model.vision_proj.parameters(), *model.text_proj.parameters(), model.temp]


def _batches(
    rng: np.random.Generator,
    rows: np.ndarray,
    size: int,
    steps: int,
    optimizer: torch.optim.Optimizer,
    lr: float,
) -> Iterator[list[int]]:
    """The rows of each step: all come once before any comes again.

    Before each step the learning rate is set: from `lr` it falls to 0 along a cosine.
    """
    size = min(size, len(rows))
    order: list[int] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        if len(order) < size:
            order = rng.permutation(rows).tolist()
        batch, order = order[:size], order[size:]
        yield batch


class _Fit:
    """ITC on pooled features: AdamW on the heads, cosine to 0."""

    def __init__(self, model: MED, pooled: Pooled, config: HeadWarmup, seed: int) -> None:
        self.model, self.pooled, self.config = model, pooled, config
        self.rng = np.random.default_rng([seed, 7])
        torch.manual_seed(seed)

    def _by_head(self, embeds: Tensor) -> Iterable[Tensor]:
        """`[N, E]` to one `[N, E / heads]` a head, of length 1."""
        count = self.model.config.itc_heads
        return (math.sqrt(count) * part for part in embeds.chunk(count, dim=1))

    def run(
        self,
        rows: np.ndarray,
        weights: np.ndarray | None,
        steps: int,
        progress: Callable[[int], None],
    ) -> None:
        """Trains on some of the pictures."""
        model, pooled, config = self.model, self.pooled, self.config
        model.train()
        parameters = _head_parameters(model)
        optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
        batches = _batches(self.rng, rows, config.batch_size, steps, optimizer, config.lr)
        for step, batch in enumerate(batches):
            own = [pooled.owned[row] for row in batch]
            texts = [texts[int(self.rng.integers(len(texts)))] for texts in own]
            device = pooled.images.device
            weight = None if weights is None else torch.from_numpy(weights[batch]).to(device)
            image_ids = torch.tensor(batch, device=device)
            # each head learns by itself: together they are better only as far as they differ
            heads = zip(
                self._by_head(model.project_image(pooled.images[batch])),
                self._by_head(model.project_text(pooled.texts[texts])),
                strict=True,
            )
            parts = [
                losses.itc_loss(image, text, model.temp, image_ids=image_ids, sample_weight=weight)
                for image, text in heads
            ]
            loss = torch.stack(parts).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.clamp_temp(model.temp, 0.01)
            progress(step + 1)
