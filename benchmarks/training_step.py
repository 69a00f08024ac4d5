"""How fast a training step is against its matrix products alone.

On any machine: a pretraining step (ITC + ITM + LM, AdamW included) of the small preset, batch 64,
texts of about 12 tokens, against the same matrix products done by themselves. The products are
recorded while a step runs, forward and backward, with their shapes and strides, and attention
counts as its two products forward and four backward.

On CUDA also: a pretraining step of ViT-B/16 in bf16, its share of the measured rate of large bf16
matrix products.

    python benchmarks/training_step.py --steps 5
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from capfilt.config import Model, Optim, Pretrain
from capfilt.models import folder as model_folder
from capfilt.models.med import MED
from capfilt.training import objectives
from capfilt.training.data import Batch
from capfilt.training.optim import build_optimizer, gradient_norm
from capfilt.training.pretrain import pretrain_losses

WORDS = ["man", "woman", "dog", "street", "water", "field", "ball", "shirt", "red", "black"]

Operand = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, stride and type of a matrix."""
Product = tuple[str, tuple[Operand, ...]]


class Recorder(TorchDispatchMode):
    """Writes down the matrix products of what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operation, and records it when it is a matrix product."""
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self._add(name, args[0], args[1])
        elif name in ("addmm", "baddbmm"):
            self._add("mm" if name == "addmm" else "bmm", args[1], args[2])
        elif name.startswith("_scaled_dot_product") and name.endswith("backward"):
            grad, query, key, value = (x.flatten(0, 1) for x in args[:4])
            weights = query @ key.mT
            self._add("bmm", grad, value.mT)
            self._add("bmm", weights.mT, grad)
            self._add("bmm", weights, key)
            self._add("bmm", weights.mT, query)
        elif name.startswith("_scaled_dot_product"):
            query, key, value = (x.flatten(0, 1) for x in args[:3])
            self._add("bmm", query, key.mT)
            self._add("bmm", query @ key.mT, value)
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, left: Tensor, right: Tensor) -> None:
        operands = tuple((tuple(x.shape), tuple(x.stride()), x.dtype) for x in (left, right))
        self.products[name, operands] += 1


def batch_of(model: MED, rows: int, pixels: bool, device: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(WORDS), (rows, 10), generator=generator).tolist()
    config = model.config
    side = config.image_size_px
    picture = torch.randn(rows, 3, side, side, generator=generator).to(device) if pixels else None
    cells = torch.randn(rows, config.image_tokens, config.image_width, generator=generator)
    return Batch(
        [f"web-00000-{row:05d}" for row in range(rows)],
        torch.arange(rows),
        [" ".join(WORDS[i] for i in row) for row in drawn],
        torch.zeros(rows, dtype=torch.bool),
        None if pixels else cells.to(device),
        picture,
    )


def step_of(preset: str, rows: int, device: str, precision: str) -> Callable[[], None]:
    """A training step as a function without arguments."""
    small = preset == "small"
    settings = Pretrain(batch_size=rows, freeze_image=small)
    torch.manual_seed(0)
    if small:
        model = model_folder.fresh_model(Model(), True).to(device)
    else:
        model = MED(model_folder.preset_config(Model(preset="base"))).to(device)
    tokenizer = model_folder.preset_tokenizer(Model())
    batch = batch_of(model, rows, not small, device)
    vocabulary = torch.arange(model.config.vocab_size)
    if small:
        # as many words as a set of 8,000 pictures has
        used = objectives.vocabulary_in_use(tokenizer, batch.captions, "")
        vocabulary = torch.cat([used, torch.arange(2000, 7000)]).unique()
    vocabulary = vocabulary.to(device)
    contrast = objectives.Contrast(model, settings.itc, device, 1)
    optimizer = build_optimizer(model, Optim())
    generator = torch.Generator().manual_seed(0)
    model.train()

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            losses = pretrain_losses(
                batch, 1, generator, model=model, tokenizer=tokenizer, contrast=contrast,
                vocabulary=vocabulary, weights={}, settings=settings, lm_only_steps=0,
                easy_steps=0, device=device,
            )  # fmt: skip
        losses["loss"].backward()
        gradient_norm(model, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(work: Callable[[], object], times: int, device: str) -> float:
    """The median time of some work, in seconds."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def products_alone(products: Counter[Product], device: str) -> tuple[float, float]:
    """Seconds and floating-point operations of the recorded products."""
    total = operations = 0.0
    for (name, operands), count in products.items():
        left, right = (
            torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
            for shape, stride, dtype in operands
        )
        multiply = torch.mm if name == "mm" else torch.bmm
        with torch.no_grad():
            multiply(left, right)
            taken = seconds(lambda: multiply(left, right), 3, device)  # noqa: B023
        total += count * taken
        operations += count * 2.0 * left.numel() * right.shape[-1]
    return total, operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="steps timed")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step, small preset")
    parser.add_argument("--gpu-batch", type=int, default=64, help="pictures a step, ViT-B/16")
    options = parser.parse_args()

    step = step_of("small", options.batch, "cpu", "fp32")
    step()
    with Recorder() as recorder:
        step()
    taken = seconds(step, options.steps, "cpu")
    alone, operations = products_alone(recorder.products, "cpu")
    print(f"small preset, batch {options.batch}, {torch.get_num_threads()} threads")
    print(f"  step                   {taken:8.3f} s")
    print(f"  its matrix products    {alone:8.3f} s, {operations / alone / 1e9:.0f} GFLOP/s")
    print(f"  ratio                  {taken / alone:8.2f}   (goal: 2 or less)")

    if not torch.cuda.is_available():
        print("ViT-B/16: no CUDA device here, not measured")
        return
    step = step_of("base", options.gpu_batch, "cuda", "bf16")
    for _ in range(3):
        step()
    with FlopCounterMode(display=False) as counter:
        step()
    taken = seconds(step, options.steps, "cuda")
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    square @ square
    peak = 2 * 8192**3 / seconds(lambda: square @ square, 20, "cuda")
    rate = counter.get_total_flops() / taken
    print(f"ViT-B/16, batch {options.gpu_batch}, bf16, {torch.cuda.get_device_name()}")
    print(f"  step                   {taken:8.3f} s, {rate / 1e12:.0f} TFLOP/s")
    print(f"  large matrix products  {peak / 1e12:8.0f} TFLOP/s")
    print(f"  share                  {rate / peak:8.0%}   (goal: 40 % or more)")


if __name__ == "__main__":
    main()
