import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import write_run
from train_tiny import FULL, temperature_score, train_tiny

from capfilt.training import ranks

SCRIPT = Path(__file__).with_name("train_tiny.py")


def in_processes(count: int, arguments: list[str]) -> list[str]:
    """Runs a script in so many processes, as torchrun would start them; what they print."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        printed = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, printed
    return printed


def logged(folder: Path) -> list[dict]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_two_processes_give_the_losses_and_weights_of_one(tmp_path: Path) -> None:
    # 18 pictures, some of them equal: the hard negatives and targets of a batch know them by id
    write_run(tmp_path / "run", {"human-00000": 8, "web-00000": 10})
    model, _ = train_tiny(
        tmp_path / "run", tmp_path / "one", "f" * 64, FULL, score=temperature_score
    )
    options = json.dumps({"settings": FULL, "dropout": False})
    in_processes(2, [str(SCRIPT), str(tmp_path / "run"), str(tmp_path / "two"), "f" * 64, options])
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == len(two) == 8 + 4
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert all(a[name] == pytest.approx(b[name], abs=2e-5, rel=2e-5) for name in a), (a, b)
    ends = [torch.load(tmp_path / "two" / f"end-{rank}.pt") for rank in range(2)]
    for name, weight in model.named_parameters():
        assert torch.equal(ends[0][name], ends[1][name]), name
        if not name.endswith("qkv.bias"):  # a key's bias changes nothing: AdamW grows its noise
            torch.testing.assert_close(ends[0][name], weight, atol=5e-4, rtol=1e-3, msg=name)


UNEVEN = """
import torch
from pathlib import Path
from capfilt.config import Optim
from capfilt.training import ranks
from capfilt.training.loop import _diverged
from small_run import TINY
from test_loop import batch_of

ranks.start()
mine, both, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
(mine.sum() * (ranks.rank() + 1) if ranks.is_first() else both.sum() * 0).backward()
(both.sum() * (ranks.rank() + 1)).backward()
ranks.BUCKET = 1
ranks.average_gradients([mine, both, none, torch.nn.Parameter(torch.zeros(2), requires_grad=False)])
assert mine.grad.tolist() == [0.5, 0.5], mine.grad
assert both.grad.tolist() == [1.5, 1.5], both.grad
assert none.grad is None
assert ranks.gather("abc"[ranks.rank()]) == ["a", "b"] and ranks.from_first(ranks.rank()) == 0
model = torch.nn.Linear(2, 2)
torch.nn.init.constant_(model.weight, ranks.rank())
ranks.send_from_first([model])
assert not model.weight.any()
losses = {"loss": float("nan") if ranks.rank() else 1.0}
batch = batch_of(["a dog"] * (1 + ranks.rank()))
message = str(_diverged(batch, losses, Optim(), "step 3", None))
assert "keys are web-00000-00000, web-00000-00001. The" in message, message
ranks.wait()
print("well")
"""


def test_a_parameter_that_one_process_used_and_a_loss_that_diverged_on_one(tmp_path: Path) -> None:
    script = tmp_path / "uneven.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n{UNEVEN}")
    assert all("well" in printed for printed in in_processes(2, [str(script)]))


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # some schedulers set it; torchrun sets both
    assert (ranks.rank(), ranks.world_size(), ranks.is_first()) == (0, 1, True)
    assert ranks.gather("a") == ["a"] and ranks.from_first(3) == 3
    ranks.wait()
    ranks.average_gradients([torch.nn.Parameter(torch.zeros(2))])
    assert ranks.own_device("cuda") == "cuda"


def test_the_rank_and_its_device_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (ranks.rank(), ranks.world_size(), ranks.is_first()) == (5, 8, False)
    assert (ranks.own_device("cuda"), ranks.own_device("cpu")) == ("cuda:1", "cpu")
