from pathlib import Path

import pytest
import torch
from torch import nn

from capfilt.errors import MismatchError
from capfilt.models.losses import Queue
from capfilt.training.checkpoint import (
    last_checkpoint,
    load_best,
    load_checkpoint,
    remove_checkpoints,
    save_best,
    save_checkpoint,
)
from capfilt.training.optim import AveragedWeights

A, B = "a" * 64, "b" * 64


class Trained:
    """A model with all that can have a state."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.model[1].bias.requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.01)
        self.averaged = AveragedWeights(self.model, 0.9)
        self.slow = nn.Linear(2, 2)
        self.queue = Queue(2, 5)

    def step(self) -> None:
        self.model(torch.randn(5, 3)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.averaged.update(self.model)
        self.queue.enqueue(torch.randn(3, 2), torch.randn(3, 2))

    @property
    def parts(self) -> dict:
        return {"averaged": self.averaged, "others": {"momentum": self.slow, "queue": self.queue}}

    def save(self, folder: Path, step: int, fingerprint: str = A, **more: object) -> Path:
        return save_checkpoint(
            folder, step, fingerprint, self.model, self.optimizer, **self.parts, **more
        )

    def load(self, folder: Path, fingerprint: str = A) -> tuple[int, dict | None]:
        return load_checkpoint(folder, fingerprint, self.model, self.optimizer, **self.parts)


def test_everything_comes_back(tmp_path: Path) -> None:
    old, new = Trained(0), Trained(1)
    for _ in range(3):
        old.step()
    best = {"best": {"step": 2, "score": 0.1 + 0.2}, "waited": 1}
    old.save(tmp_path, 3, validation=best)
    frozen = new.model[1].bias.clone()
    assert new.load(tmp_path) == (3, best)
    assert torch.equal(new.model[1].bias, frozen)
    assert new.queue.filled == 5 and new.queue.pointer == old.queue.pointer == 4
    torch.manual_seed(5)
    old.step()
    torch.manual_seed(5)
    with torch.no_grad():
        new.model[1].bias.copy_(old.model[1].bias)
    new.step()
    for (name, a), (_, b) in zip(
        old.model.named_parameters(), new.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert all(
        torch.equal(old.averaged.weights[n], new.averaged.weights[n]) for n in old.averaged.weights
    )
    assert torch.equal(old.slow.weight, new.slow.weight)
    assert torch.equal(old.queue.image_queue, new.queue.image_queue)


def test_the_last_two_are_kept_and_no_other_trainings_are_touched(tmp_path: Path) -> None:
    trained = Trained()
    trained.save(tmp_path, 1, B)
    for step in (5, 10, 15, 110):
        trained.save(tmp_path, step)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "step-1-bbbbbbbbbbbb.pt",
        "step-110-aaaaaaaaaaaa.pt",
        "step-15-aaaaaaaaaaaa.pt",
    ]
    assert last_checkpoint(tmp_path, A) == tmp_path / "step-110-aaaaaaaaaaaa.pt"
    assert trained.load(tmp_path)[0] == 110
    assert trained.load(tmp_path, B)[0] == 1
    assert trained.load(tmp_path, "c" * 64) == (0, None)
    remove_checkpoints(tmp_path)
    assert trained.load(tmp_path) == (0, None) and last_checkpoint(tmp_path, A) is None


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "zeros"])
def test_a_damaged_one_falls_back_to_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    trained = Trained()
    trained.save(tmp_path, 5)
    trained.step()
    path = trained.save(tmp_path, 10)
    data = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": data[: len(data) // 2], "text": b"hello", "zeros": bytes(len(data))}[
            damage
        ]
    )
    assert trained.load(tmp_path)[0] == 5
    assert "step-10-aaaaaaaaaaaa.pt can't be read" in caplog.text


def test_a_torn_file_is_ignored_and_cleared(tmp_path: Path) -> None:
    trained = Trained()
    trained.save(tmp_path, 5)
    torn = tmp_path / "step-10-aaaaaaaaaaaa.tmp"
    torn.write_bytes(b"half")
    foreign = tmp_path / "step-10-bbbbbbbbbbbb.tmp"
    foreign.write_bytes(b"half")
    assert trained.load(tmp_path)[0] == 5
    trained.save(tmp_path, 10)
    assert not torn.exists() and foreign.exists()


def test_best_weights_stay_as_long_as_a_checkpoint_goes_back_to_them(tmp_path: Path) -> None:
    trained = Trained()

    def best() -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("best-*"))

    save_best(tmp_path, 2, A, trained.model)
    trained.save(tmp_path, 5)
    save_best(tmp_path, 6, A, trained.model)
    save_best(tmp_path, 8, A, trained.model)
    save_best(tmp_path, 3, B, trained.model)
    trained.save(tmp_path, 10)  # the one at 5 goes back to the best at 2
    assert best() == [2, 3, 6, 8]
    trained.save(tmp_path, 15)  # the one at 10 goes back to the best at 8
    assert best() == [3, 8]
    weight = trained.model[0].weight.detach().clone()
    trained.step()
    load_best(tmp_path, 8, A, trained.model)
    assert torch.equal(trained.model[0].weight, weight)


def test_a_checkpoint_of_other_code_says_so(tmp_path: Path) -> None:
    trained = Trained()
    trained.save(tmp_path, 5)
    other = Trained()
    other.model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(MismatchError, match=r"step-5-a+\.pt does not fit .* 1\.weight"):
        other.load(tmp_path)
