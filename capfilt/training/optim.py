"""The optimiser, the learning rate, and the averaged weights."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from capfilt.config import Optim
from capfilt.errors import ConfigError
from capfilt.models.med import MED
from capfilt.models.text_tower import TextLayer

NEW_PARTS = ("adapter.", "cross_attention", "lm_head", "itm_head", "vision_proj", "text_proj")
"""Parts that no BERT, ViT or EfficientNet checkpoint fills."""


def freeze_layers(model: MED, count: int) -> None:
    """Keeps the first text layers and the word embeddings as they are.

    Frozen are the self-attention and the feed-forward part of the layers, in the encoder and the
    decoder: what a language model's weights fill. Cross-attention, which they don't fill, goes on
    learning.

    Args:
        model: the MED.
        count: layers; 0 freezes nothing.

    Raises:
        ConfigError: there are not so many layers.
    """
    if count > model.config.text_depth:
        raise ConfigError(
            f"freeze_layers: {count} is more than the text towers' {model.config.text_depth} layers"
        )
    if count == 0:
        return
    for tower in (model.encoder, model.decoder):
        tower.embeddings.word.requires_grad_(False)
        for layer in tower.layers[:count]:
            assert isinstance(layer, TextLayer)
            layer.self_attention.requires_grad_(False)
            layer.feed_forward.requires_grad_(False)


def build_optimizer(model: MED, config: Optim) -> torch.optim.AdamW:
    """AdamW, weight decay on matrices only. Parts without weights have their own rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = config.lr
        if config.new_layers_lr is not None and any(part in name for part in NEW_PARTS):
            lr = config.new_layers_lr
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in groups.items()
        ],
        fused=True,
    )


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: Optim, step: int, steps: int
) -> float:
    """Linear warm-up, then a cosine from the peak to `min_lr`. Returns the factor of the peak."""
    if step < config.warmup_steps:
        factor = (step + 1) / config.warmup_steps
    else:
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        low = config.min_lr / config.lr
        factor = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return factor


class AveragedWeights:
    """An exponential moving average of the trainable weights, with a warm-up of the decay."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts at the model's weights."""
        self.decay = decay
        self.updates = 0
        self.weights = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        named = dict(model.named_parameters())
        torch._foreach_lerp_(
            list(self.weights.values()),
            [named[name].detach() for name in self.weights],
            1 - decay,
        )

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges the average with the model's weights; call twice to undo."""
        for name, parameter in model.named_parameters():
            if name in self.weights:
                average = self.weights[name].clone()
                self.weights[name].copy_(parameter)
                parameter.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {**self.weights, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From a checkpoint."""
        self.updates = int(state["updates"])
        for name, weight in self.weights.items():
            weight.copy_(state[name])


def cosine_batches(
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


def gradient_norm(model: nn.Module, limit: float | None) -> float:
    """The gradient's norm; where there is a limit, the gradient is scaled down to it."""
    if limit is not None:
        return float(nn.utils.clip_grad_norm_(model.parameters(), limit))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients))
