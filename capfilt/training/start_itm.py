"""How `ITMStart` is taught: its parts, and how much each of them counts (not in the paper).

Dimensions: N pictures, M distinct texts, L text tokens, W words, E ITC embedding.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.models.itm_start import Neighbours, WordDetectors
from capfilt.models.med import MED
from capfilt.models.tokens import tokenize
from capfilt.training.optim import cosine_batches
from capfilt.training.pooled import Pooled
from capfilt.training.swaps import WordSwaps

EVIDENCE_AT_A_TIME = 1024
COMMON_TEXT, COMMON_IMAGE = 0.85, 0.25
"""How much the commonness of a text, and of a picture, counts against their similarity. More of a
picture's finds more exchanged texts; people's judgements (Flickr8k) want less."""
STYLE = 0.05
"""How much one unit (log-odds) of style counts beside the similarity."""
NEIGHBOURS = 0.5
"""How much counts that a text is near to captions of similar pictures."""
WORDS = 0.012
"""How much one unit (log probability) that the words of a text lack counts."""
WRONG_WORD = 0.04
"""How much one unit (log-odds) of the most doubtful word counts."""
WORD_MIN_COUNT = 6
"""A word must stand in so many texts to get a detector."""
WORD_BATCH, WORD_LR = 256, 2e-3
SWAP_BELIEVED = 0.6
"""Words are exchanged in texts that weigh so much at least: others may be wrong as they are."""
SWAPS_A_TEXT = 2
SWAP_STEPS, SWAP_BATCH, SWAP_LR = 1000, 256, 5e-3


def start_itm_from_itc(
    model: MED,
    tokenizer: Any,
    pooled: Pooled,
    weights: dict[str, float],
    max_tokens: int,
    word_steps: int,
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
        unseen = _learn_words(start.words, tokenizer, ids, pooled, believed, word_steps, seed)
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
    steps: int,
    seed: int,
) -> Tensor:
    """Teaches the detectors which words stand in a picture's texts: logistic loss on each word.

    Args:
        words: trained in place; those it knows are the most frequent ones.
        tokenizer: of the text tower.
        ids: tokens of the distinct texts, `[M, L]`.
        pooled: the pictures, and which texts are whose.
        believed: `[N]`, how much the texts of a picture count; people's count twice.
        steps: that each net is taught.
        seed: of the draws.

    Returns:
        `[N, W]`, what the one net says of each picture that was not taught with it; float16 (see
        `WordDetectors.blind`).
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
    words.part(pooled.images, torch.Generator().manual_seed(seed))
    fold = words.fold(pooled.images).cpu().numpy()
    unseen = torch.zeros(len(weight), words.size, dtype=torch.float16)
    gained = torch.zeros(words.size)
    for number, net in enumerate(words.nets):
        rows = np.flatnonzero((weight > 0) & (fold != number))
        if not len(rows):  # a handful of pictures, all of them in one part
            rows = np.flatnonzero(weight)
        net.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05, fused=True)
        for batch in cosine_batches(rng, rows, WORD_BATCH, steps, optimizer, WORD_LR):
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
    optimizer = torch.optim.AdamW(wrong_word.net.parameters(), weight_decay=0.01, fused=True)
    every = np.arange(len(rows))
    for batch in cosine_batches(rng, every, SWAP_BATCH, SWAP_STEPS, optimizer, SWAP_LR):
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
