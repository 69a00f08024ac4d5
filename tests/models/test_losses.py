"""Each loss against a naive loop written from its equation, and the cases at the edges."""

from __future__ import annotations

import gc
import math
import socket
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.errors import ConfigError
from capfilt.models.losses import (
    IGNORED,
    NO_NEGATIVE,
    Queue,
    clamp_temp,
    gather_with_gradient,
    hard_negatives,
    itc_loss,
    itm_loss,
    lm_labels,
    lm_loss,
    lm_token_count,
    mean_across_ranks,
    ramped_alpha,
)

quick = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 7)
seeds = st.integers(0, 10_000)


def unit(generator: torch.Generator, *shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    exps = [math.exp(x - top) for x in row]
    return [e / sum(exps) for e in exps]


def naive_direction(
    queries: torch.Tensor,
    queries_m: torch.Tensor | None,
    candidates: torch.Tensor,
    temp: float,
    ids: list[int] | None,
    candidate_ids: list[int],
    alpha: float,
) -> list[float]:
    """Loss of each query: -sum_j y_ij log p_ij, with y = alpha q + (1 - alpha) hard."""
    losses = []
    for i in range(len(queries)):
        p = softmax([float(queries[i] @ c) / temp for c in candidates])
        if ids is None:
            hard = [1.0 if j == i else 0.0 for j in range(len(candidates))]
        else:
            same = [1.0 if c == ids[i] else 0.0 for c in candidate_ids]
            hard = [s / sum(same) for s in same]
        soft = [0.0] * len(candidates)
        if queries_m is not None:
            soft = softmax([float(queries_m[i] @ c) / temp for c in candidates])
        target = [alpha * s + (1 - alpha) * h for s, h in zip(soft, hard, strict=True)]
        losses.append(-sum(y * math.log(q) for y, q in zip(target, p, strict=True)))
    return losses


def weighted(losses: list[float], weight: list[float] | None) -> float:
    w = weight or [1.0] * len(losses)
    return sum(x * y for x, y in zip(losses, w, strict=True)) / sum(w)


class TestItc:
    @quick
    @given(sizes, st.integers(1, 5), seeds, st.booleans(), st.booleans())
    def test_in_batch(self, batch: int, embed: int, seed: int, by_id: bool, weigh: bool) -> None:
        g = torch.Generator().manual_seed(seed)
        image, text = unit(g, batch, embed), unit(g, batch, embed)
        ids = torch.randint(0, 3, (batch,), generator=g) if by_id else None
        weight = torch.rand(batch, generator=g) + 0.1 if weigh else None
        listed = ids.tolist() if ids is not None else None
        i2t = naive_direction(image, None, text, 0.2, listed, listed or [], 0.0)
        t2i = naive_direction(text, None, image, 0.2, listed, listed or [], 0.0)
        want = (
            weighted(i2t, weight.tolist() if weigh and weight is not None else None)
            + weighted(t2i, weight.tolist() if weigh and weight is not None else None)
        ) / 2
        got = itc_loss(image, text, 0.2, image_ids=ids, sample_weight=weight)
        assert got.item() == pytest.approx(want, rel=1e-6, abs=1e-9)

    @quick
    @given(sizes, st.integers(0, 13), seeds, st.booleans(), st.sampled_from([0.0, 0.4, 1.0]))
    def test_momentum_and_queue(
        self, batch: int, queued: int, seed: int, by_id: bool, alpha: float
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        image, text, image_m, text_m = (unit(g, batch, 4) for _ in range(4))
        old_image, old_text = unit(g, queued, 4), unit(g, queued, 4)
        old_ids = torch.randint(0, 3, (queued,), generator=g)
        ids = torch.randint(0, 3, (batch,), generator=g) if by_id else None
        queue = Queue(4, 20).double()
        queue.enqueue(old_image, old_text, old_ids)
        got = itc_loss(
            image,
            text,
            0.3,
            image_ids=ids,
            momentum_image=image_m,
            momentum_text=text_m,
            queue=queue,
            alpha=alpha,
        )
        listed = ids.tolist() if ids is not None else None
        every = (listed or []) + old_ids.tolist()
        i2t = naive_direction(
            image, image_m, torch.cat([text_m, old_text]), 0.3, listed, every, alpha
        )
        t2i = naive_direction(
            text, text_m, torch.cat([image_m, old_image]), 0.3, listed, every, alpha
        )
        assert got.item() == pytest.approx((weighted(i2t, None) + weighted(t2i, None)) / 2)

    def test_gradients_flow_to_features_and_temperature(self) -> None:
        g = torch.Generator().manual_seed(0)
        image, text = unit(g, 4, 3).requires_grad_(), unit(g, 4, 3).requires_grad_()
        slow_image, slow_text = unit(g, 4, 3).requires_grad_(), unit(g, 4, 3).requires_grad_()
        temp = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda i, t, s: itc_loss(i, t, s), (image, text, temp))
        loss = itc_loss(
            image, text, temp, momentum_image=slow_image, momentum_text=slow_text, alpha=0.4
        )
        loss.backward()
        for x in (image, text, temp):
            assert x.grad is not None and x.grad.abs().sum() > 0
        assert slow_image.grad is None and slow_text.grad is None

    def test_one_pair_alone_costs_nothing(self) -> None:
        x = unit(torch.Generator().manual_seed(1), 1, 4)
        assert itc_loss(x, x, 0.07).item() == 0.0

    def test_temperature_of_one_element(self) -> None:
        x = unit(torch.Generator().manual_seed(1), 3, 4)
        assert itc_loss(x, x, torch.tensor([0.07])).shape == ()

    def test_bf16_autocast_does_not_round(self) -> None:
        g = torch.Generator().manual_seed(2)
        image, text = unit(g, 6, 8).float(), unit(g, 6, 8).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = itc_loss(image, text, 0.07)
        assert got.item() == itc_loss(image, text, 0.07).item()

    def test_refuses_half_of_what_it_needs(self) -> None:
        x = unit(torch.Generator().manual_seed(1), 2, 4)
        with pytest.raises(ConfigError, match="alpha"):
            itc_loss(x, x, 0.07, alpha=0.4)
        with pytest.raises(ConfigError, match="queue"):
            itc_loss(x, x, 0.07, queue=Queue(4, 4))
        with pytest.raises(ConfigError, match="or neither"):
            itc_loss(x, x, 0.07, momentum_image=x)
        with pytest.raises(ConfigError, match="outside"):
            itc_loss(x, x, 0.07, momentum_image=x, momentum_text=x, alpha=1.5)


class TestQueue:
    @quick
    @given(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=8))
    def test_keeps_the_last_pairs(self, size: int, batches: list[int]) -> None:
        queue, seen, ids = Queue(2, size), [], 0
        for batch in (min(b, size) for b in batches):
            numbers = torch.arange(ids, ids + batch)
            features = torch.stack([numbers.float(), -numbers.float()], dim=1)
            queue.enqueue(features, features * 10, numbers)
            seen += numbers.tolist()
            ids += batch
        image, text, kept = queue.features()
        assert sorted(kept.tolist()) == seen[-size:]
        assert torch.equal(image[0], kept.float()) and torch.equal(text[1], -10 * kept.float())
        assert queue.filled == min(size, len(seen))

    def test_order_of_wrap_around(self) -> None:
        queue = Queue(1, 4)
        for start in (0, 3):
            numbers = torch.arange(start, start + 3)
            queue.enqueue(numbers[:, None].float(), numbers[:, None].float(), numbers)
        assert queue.features()[2].tolist() == [4, 5, 2, 3]
        assert queue.pointer == 2

    def test_state_goes_round(self) -> None:
        queue = Queue(2, 5)
        queue.enqueue(torch.ones(3, 2), torch.ones(3, 2))
        other = torch.nn.ModuleDict({"queue": Queue(2, 5)})
        other.load_state_dict({f"queue.{k}": v for k, v in queue.state_dict().items()})
        assert other["queue"].filled == 3 and other["queue"].pointer == 3
        assert other["queue"].features()[2].tolist() == [IGNORED] * 3

    def test_refuses_sizes(self) -> None:
        with pytest.raises(ConfigError, match="queue_size: 0"):
            Queue(2, 0)
        with pytest.raises(ConfigError, match="queue_size: 2 is smaller"):
            Queue(2, 2).enqueue(torch.ones(3, 2), torch.ones(3, 2))


class TestHardNegatives:
    @quick
    @given(sizes, seeds, st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
    def test_never_the_same_image(
        self, batch: int, seed: int, by_id: bool, hardness: float
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        sim = torch.rand(batch, batch, generator=g) * 2 - 1
        ids = torch.randint(0, 3, (batch,), generator=g) if by_id else None
        names = ids.tolist() if ids is not None else list(range(batch))
        for drawn in hard_negatives(sim, ids, temp=0.07, generator=g, hardness=hardness):
            for i, j in enumerate(drawn.tolist()):
                if len([n for n in names if n != names[i]]) == 0:
                    assert j == NO_NEGATIVE
                else:
                    assert names[j] != names[i]

    @pytest.mark.parametrize("hardness", [0.0, 0.5, 1.0])
    def test_frequencies(self, hardness: float) -> None:
        g = torch.Generator().manual_seed(3)
        sim = torch.rand(4, 4, generator=g)
        sim[0, 0] = 9.0  # the true pair takes nearly all of the softmax
        text_counts, image_counts = torch.zeros(4, 4), torch.zeros(4, 4)
        draws = 4000
        for _ in range(draws):
            text, image = hard_negatives(sim, temp=0.3, generator=g, hardness=hardness)
            text_counts[torch.arange(4), text] += 1
            image_counts[torch.arange(4), image] += 1
        for counts, scores in ((text_counts, sim), (image_counts, sim.T)):
            for i in range(4):
                weights = [
                    0.0 if j == i else math.exp(hardness * float(scores[i, j]) / 0.3)
                    for j in range(4)
                ]
                for j in range(4):
                    assert counts[i, j] / draws == pytest.approx(
                        weights[j] / sum(weights), abs=0.04
                    )

    def test_true_pair_that_takes_all_mass_does_not_underflow(self) -> None:
        sim = torch.full((3, 3), -1.0).fill_diagonal_(1.0)
        text, image = hard_negatives(sim, temp=0.001)
        assert all(j != i for i, j in enumerate(text.tolist()))
        assert all(j != i for i, j in enumerate(image.tolist()))

    def test_batch_of_one_image(self) -> None:
        text, image = hard_negatives(torch.zeros(3, 3), torch.tensor([5, 5, 5]), temp=0.07)
        assert text.tolist() == image.tolist() == [NO_NEGATIVE] * 3

    def test_nan_similarity_leaves_the_alarm_to_the_loss(self) -> None:
        text, _ = hard_negatives(torch.full((3, 3), torch.nan), temp=0.07)
        assert all(j not in (i, NO_NEGATIVE) for i, j in enumerate(text.tolist()))

    def test_generator_decides(self) -> None:
        sim = torch.zeros(16, 16)
        first, second = (
            hard_negatives(sim, temp=0.07, generator=torch.Generator().manual_seed(1))[0]
            for _ in range(2)
        )
        assert torch.equal(first, second)


class TestItm:
    @quick
    @given(st.integers(1, 9), seeds, st.booleans(), st.sampled_from([0.0, 0.1]))
    def test_naive(self, n: int, seed: int, weigh: bool, smoothing: float) -> None:
        g = torch.Generator().manual_seed(seed)
        logits = torch.randn(n, 2, generator=g, dtype=torch.float64)
        labels = torch.randint(0, 2, (n,), generator=g)
        weight = torch.rand(n, generator=g) + 0.1 if weigh else None
        losses = []
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            log_p = [math.log(p) for p in softmax(row)]
            losses.append(-(1 - smoothing) * log_p[label] - smoothing * sum(log_p) / 2)
        got = itm_loss(logits, labels, weight, label_smoothing=smoothing)
        want = weighted(losses, weight.tolist() if weight is not None else None)
        assert got.item() == pytest.approx(want)

    def test_no_rows_no_weight(self) -> None:
        logits = torch.zeros(0, 2, requires_grad=True)
        loss = itm_loss(logits, torch.zeros(0, dtype=torch.long))
        loss.backward()
        assert loss.item() == 0.0
        some = torch.randn(3, 2)
        assert itm_loss(some, torch.ones(3), torch.zeros(3)).item() == 0.0

    def test_chance(self) -> None:
        got = itm_loss(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]))
        assert got.item() == pytest.approx(math.log(2))


class TestLm:
    @quick
    @given(sizes, st.integers(2, 6), st.integers(2, 8), seeds, st.booleans())
    def test_naive(self, batch: int, length: int, vocab: int, seed: int, weigh: bool) -> None:
        g = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, length, vocab, generator=g, dtype=torch.float64)
        labels = torch.randint(0, vocab, (batch, length), generator=g)
        labels[torch.rand(batch, length, generator=g) < 0.3] = IGNORED
        weight = torch.rand(batch, generator=g) + 0.1 if weigh else None
        total, count = 0.0, 0.0
        for b in range(batch):
            w = float(weight[b]) if weight is not None else 1.0
            for t in range(length - 1):
                target = int(labels[b, t + 1])
                if target == IGNORED:
                    continue
                log_p = [math.log(p) for p in softmax(logits[b, t].tolist())]
                total -= w * (0.9 * log_p[target] + 0.1 * sum(log_p) / vocab)
                count += w
        got = lm_loss(logits, labels, weight=weight)
        assert got.item() == pytest.approx(total / count if count else 0.0, rel=1e-6)
        assert lm_token_count(labels, weight).item() == pytest.approx(count, rel=1e-5)

    def test_transformers(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.BlipTextConfig(
            vocab_size=60,
            hidden_size=32,
            encoder_hidden_size=32,
            intermediate_size=32,
            projection_dim=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            label_smoothing=0.1,
        )
        from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

        torch.manual_seed(0)
        model = BlipTextLMHeadModel(config).eval()
        ids = torch.randint(5, 60, (3, 7))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        labels = lm_labels(ids, mask, 2)
        with torch.no_grad():
            out = model(
                ids,
                attention_mask=mask,
                encoder_hidden_states=torch.randn(3, 4, 32),
                labels=labels,
                is_decoder=True,
            )
        assert lm_loss(out.logits, labels).item() == pytest.approx(out.loss.item(), rel=1e-5)

    def test_micro_batches_add_up(self) -> None:
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(4, 5, 6, generator=g)
        labels = torch.randint(0, 6, (4, 5), generator=g)
        labels[0, 2:] = IGNORED
        count = lm_token_count(labels)
        parts = [lm_loss(logits[s], labels[s], denominator=count) for s in (slice(1), slice(1, 4))]
        assert sum(p.item() for p in parts) == pytest.approx(lm_loss(logits, labels).item())

    def test_all_masked(self) -> None:
        logits = torch.randn(2, 3, 5, requires_grad=True)
        loss = lm_loss(logits, torch.full((2, 3), IGNORED))
        loss.backward()
        assert loss.item() == 0.0
        assert logits.grad is not None and not logits.grad.any()

    def test_labels(self) -> None:
        ids = torch.tensor([[9, 1, 2, 3], [9, 1, 2, 0]])
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
        assert lm_labels(ids, mask, 2).tolist() == [
            [IGNORED, IGNORED, 2, 3],
            [IGNORED, IGNORED, 2, IGNORED],
        ]
        assert ids[0].tolist() == [9, 1, 2, 3]


def test_ramp() -> None:
    assert [ramped_alpha(0.4, s, 4) for s in (0, 1, 2, 4, 9)] == pytest.approx(
        [0.0, 0.1, 0.2, 0.4, 0.4]
    )
    assert ramped_alpha(0.4, 0, 0) == 0.4


def test_clamp() -> None:
    temp = torch.nn.Parameter(torch.tensor(0.9))
    clamp_temp(temp)
    assert temp.item() == 0.5
    with torch.no_grad():
        temp.fill_(-1.0)
    clamp_temp(temp)
    assert temp.item() == pytest.approx(0.001)


def test_gather_alone_is_the_tensor_itself() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert gather_with_gradient(x) is x
    assert mean_across_ranks(x) is x


class Towers(torch.nn.Module):
    """Two linear towers, a temperature and a vocabulary head: enough for the three losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = torch.nn.Linear(5, 4)
        self.text = torch.nn.Linear(6, 4)
        self.head = torch.nn.Linear(4, 7)
        self.temp = torch.nn.Parameter(torch.tensor(0.2))

    def forward(self, data: dict[str, torch.Tensor]) -> torch.Tensor:
        norm = torch.nn.functional.normalize
        image, text = norm(self.image(data["image"]), dim=1), norm(self.text(data["text"]), dim=1)
        ids, weight = gather_with_gradient(data["ids"]), gather_with_gradient(data["weight"])
        contrastive = itc_loss(
            gather_with_gradient(image),
            gather_with_gradient(text),
            self.temp,
            image_ids=ids,
            sample_weight=weight,
        )
        logits = self.head(image[:, None] * self.text(data["text"])[:, None]).expand(-1, 4, -1)
        count = mean_across_ranks(lm_token_count(data["labels"], data["weight"]))
        language = lm_loss(logits, data["labels"], weight=data["weight"], denominator=count)
        return contrastive + language


def towers_data() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    labels = torch.randint(0, 7, (6, 4), generator=g)
    labels[0, 2:] = IGNORED
    labels[4, 1:] = IGNORED
    return {
        "image": torch.randn(6, 5, generator=g),
        "text": torch.randn(6, 6, generator=g),
        "ids": torch.tensor([0, 1, 2, 0, 3, 1]),
        "weight": torch.rand(6, generator=g) + 0.1,
        "labels": labels,
    }


def run_rank(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    model = torch.nn.parallel.DistributedDataParallel(Towers())
    loss = model({k: v[3 * rank : 3 * rank + 3] for k, v in towers_data().items()})
    loss.backward()
    mean = mean_across_ranks(loss)
    if rank == 0:
        gradients = {n: p.grad.tolist() for n, p in model.module.named_parameters()}
        results.put((mean.item(), gradients))
    torch.distributed.barrier()
    # in its reference cycles DDP would outlive the group, and the group's threads abort the process
    del model, loss, mean
    gc.collect()
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_loss_and_gradient_of_one() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    context = mp.start_processes(
        run_rank, args=(port, results), nprocs=2, join=False, start_method="spawn"
    )
    while not context.join():
        pass
    loss, gradients = results.get()
    single = Towers()
    want = single(towers_data())
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-5)
    for name, parameter in single.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            torch.tensor(gradients[name]), parameter.grad, rtol=1e-4, atol=1e-6
        )
