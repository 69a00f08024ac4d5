import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import TINY, tiny_med, write_run
from train_tiny import FULL, temperature_score, train_tiny

from capfilt.config import Optim
from capfilt.errors import ConfigError, DivergenceError, MissingExtraError
from capfilt.training import objectives
from capfilt.training.data import Batch
from capfilt.training.loop import slices
from capfilt.training.optim import (
    AveragedWeights,
    build_optimizer,
    freeze_layers,
    set_learning_rate,
)

SCRIPT = Path(__file__).with_name("train_tiny.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, {"human-00000": 8, "web-00000": 10})
    return folder


def logged(folder: Path) -> list[dict]:
    if not (folder / "log.jsonl").exists():
        return []
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in lines
        if line.endswith("}")
    ]


def test_killed_in_the_middle_it_goes_on_with_the_same_losses(run: Path, tmp_path: Path) -> None:
    values = {**FULL, "epochs": 15, "checkpoint_every": 4}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes below: the rounding depends on it
    train_tiny(run, tmp_path / "whole", "a" * 64, values, dropout=True, score=temperature_score)
    torch.set_num_threads(threads)
    whole = logged(tmp_path / "whole")
    folder = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), str(run), str(folder), "a" * 64]
    command.append(json.dumps({"settings": values, "dropout": True}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for lines in (9, 30):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 60
        while len(logged(folder)) < lines:
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from step" in done.stdout
    assert logged(folder) == whole
    assert [line["step"] for line in whole if "validation" not in line] == list(range(1, 31))


def test_a_checkpoint_of_another_training_is_left_alone(run: Path, tmp_path: Path) -> None:
    def stop(losses):
        def stopping(batch, step, generator):
            if step == 6:
                raise KeyboardInterrupt
            return losses(batch, step, generator)

        return stopping

    with pytest.raises(KeyboardInterrupt):
        train_tiny(run, tmp_path, "a" * 64, FULL, wrap=stop)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    assert list(before) == ["step-5-aaaaaaaaaaaa.pt"]
    first_step: list[int] = []

    def watch(losses):
        def watched(batch, step, generator):
            first_step.append(step)
            return losses(batch, step, generator)

        return watched

    train_tiny(run, tmp_path, "b" * 64, FULL, wrap=watch)
    assert first_step[0] == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    assert after["step-5-aaaaaaaaaaaa.pt"] == before["step-5-aaaaaaaaaaaa.pt"]
    assert "step-5-bbbbbbbbbbbb.pt" in after
    train_tiny(run, tmp_path, "a" * 64, FULL, wrap=watch)
    assert first_step[8] == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverging_loss_names_step_keys_and_checkpoint(
    run: Path, tmp_path: Path, value: float
) -> None:
    seen: list[str] = []

    def poison(losses):
        def poisoned(batch, step, generator):
            found = losses(batch, step, generator)
            if step == 6:
                seen.extend(batch.keys)
                found["loss"] = found["loss"] * value
            return found

        return poisoned

    with pytest.raises(DivergenceError) as error:
        train_tiny(run, tmp_path, "a" * 64, FULL, wrap=poison)
    message = str(error.value)
    assert "step 6 of 8" in message
    assert all(key in message for key in seen)
    assert str(tmp_path / "checkpoints" / "step-5-aaaaaaaaaaaa.pt") in message
    assert "Lower lr (is 0.001)" in message
    assert error.value.exit_code == 1


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_it_is_applied(
    run: Path, tmp_path: Path, clip: float | None
) -> None:
    kept = []

    def poison(losses):
        def poisoned(batch, step, generator):
            found = losses(batch, step, generator)
            if step == 6:  # the loss is as it was, its gradient is not
                model = losses.keywords["model"]
                weight = model.temp.expand(1)
                weight.register_hook(lambda gradient: gradient * float("inf"))
                found["loss"] = found["loss"] + 0.0 * weight.sum()
                kept.append(model)
            return found

        return poisoned

    values = {**FULL, "clip_grad_norm": clip}
    with pytest.raises(
        DivergenceError, match="the gradient is NaN or infinite at step 6 of 8"
    ) as e:
        train_tiny(run, tmp_path, "a" * 64, values, wrap=poison)
    assert "step-5-aaaaaaaaaaaa.pt" in str(e.value)
    assert all(parameter.isfinite().all() for parameter in kept[0].parameters())


def test_a_first_step_that_diverges_says_that_there_is_no_checkpoint(
    run: Path, tmp_path: Path
) -> None:
    def poison(losses):
        return lambda *arguments: {"loss": losses(*arguments)["loss"] * float("nan")}

    with pytest.raises(DivergenceError, match=r"step 0 of 8 .* checkpoint is none yet"):
        train_tiny(run, tmp_path, "a" * 64, FULL, wrap=poison)


def test_patience_stops_and_the_best_weights_are_kept(run: Path, tmp_path: Path) -> None:
    scores = iter([0.1, 0.5, 0.3, 0.4, 0.9])
    weights: list[torch.Tensor] = []

    def score(model):
        weights.append(model.vision_proj.weight.detach().clone())
        return {"score": next(scores)}

    values = {**FULL, "patience": 2, "epochs": 5}
    model, found = train_tiny(run, tmp_path, "a" * 64, values, score=score)
    assert len(weights) == 4
    assert found["steps"] == 8 and found["best"]["step"] == 4 and found["best"]["score"] == 0.5
    assert torch.equal(model.vision_proj.weight, weights[1])
    assert not torch.equal(weights[1], weights[3])
    assert not model.training


def test_without_patience_it_trains_to_the_end(run: Path, tmp_path: Path) -> None:
    scores = itertools.count(5, -1)
    _, found = train_tiny(
        run, tmp_path, "a" * 64, FULL, score=lambda model: {"score": next(scores)}
    )
    assert found["steps"] == 8 and found["best"]["step"] == 2


def test_tensorboard(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**FULL, "epochs": 1, "tensorboard": True}
    if importlib.util.find_spec("tensorboard") is not None:
        train_tiny(run, tmp_path, "a" * 64, values, score=temperature_score)
        assert list((tmp_path / "tensorboard").glob("events*"))
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(tmp_path / "tensorboard"))
        board.Reload()
        assert [event.step for event in board.Scalars("train/lm")] == [1, 2]
        assert [event.step for event in board.Scalars("validation/score")] == [2]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'capfilt\[tensorboard\]'"):
        train_tiny(run, tmp_path / "other", "a" * 64, values)


@pytest.mark.parametrize(
    "option",
    [
        {"gradient_accumulation": 2},
        {"gradient_checkpointing": True},
        {"precision": "bf16"},
        {"freeze_layers": 1},
        {"freeze_layers": 2, "new_layers_lr": 3e-3},
        {"average_weights": None, "clip_grad_norm": None},
    ],
)
def test_each_option_trains(run: Path, tmp_path: Path, option: dict) -> None:
    values = {**FULL, "epochs": 12, "lr": 2e-3, **option}
    if "gradient_accumulation" in option:
        values["itc"] = {}
    start = tiny_med()
    model, _ = train_tiny(run, tmp_path, "a" * 64, values)
    losses = [line["lm"] for line in logged(tmp_path)]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5
    frozen = {
        name
        for (name, before), (_, after) in zip(
            start.named_parameters(), model.named_parameters(), strict=True
        )
        if torch.equal(before, after)
    }
    expected = set()
    if option.get("freeze_layers"):
        expected = {
            name
            for name, _ in start.named_parameters()
            if "embeddings.word" in name
            or any(
                f".layers.{i}.{part}" in name
                for i in range(option["freeze_layers"])
                for part in ("self_attention", "feed_forward")
            )
        }
        assert len(expected) > 10
    assert frozen == expected


def test_checkpointed_gradients_give_the_same_losses(run: Path, tmp_path: Path) -> None:
    train_tiny(run, tmp_path / "plain", "a" * 64, FULL)
    train_tiny(run, tmp_path / "saving", "a" * 64, {**FULL, "gradient_checkpointing": True})
    for a, b in zip(logged(tmp_path / "plain"), logged(tmp_path / "saving"), strict=True):
        assert a == pytest.approx(b, abs=2e-5)


def test_more_frozen_layers_than_there_are(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"freeze_layers: 3 is more than .* 2 layers"):
        freeze_layers(tiny_med(), 3)


def batch_of(captions: list[str]) -> Batch:
    count = len(captions)
    generator = torch.Generator().manual_seed(0)
    return Batch(
        [f"web-00000-{i:05d}" for i in range(count)],
        torch.arange(count),
        captions,
        torch.zeros(count, dtype=torch.bool),
        torch.randn(count, TINY.image_tokens, TINY.image_width, generator=generator),
        None,
    )


@pytest.mark.parametrize("prompt", ["", "a picture of"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_accumulated_lm_is_that_of_the_whole_batch(prompt: str, count: int) -> None:
    from capfilt.config import Model
    from capfilt.models.folder import preset_tokenizer

    tokenizer, model = preset_tokenizer(Model()), tiny_med()
    captions = [
        "a dog",
        "a red boat on the water with a man",
        "trees",
        "two horses by a house",
        "a big ball",
    ]
    whole = batch_of(captions)
    vocabulary = objectives.vocabulary_in_use(tokenizer, captions, prompt)

    def lm(batch: Batch) -> torch.Tensor:
        return objectives.lm_objective(
            model, tokenizer, batch.captions, model.cross_keys_values(model.adapt(batch.features), "decoder"),
            prompt=prompt, max_tokens=12, label_smoothing=0.1, vocabulary=vocabulary, whole=batch.whole,
        )  # fmt: skip

    expected = lm(whole)
    expected.backward()
    gradient = model.decoder.layers[0].self_attention.qkv.weight.grad.clone()
    model.zero_grad()
    total = 0.0
    parts = slices(whole, count)
    assert [key for part in parts for key in part.keys] == whole.keys
    for part in parts:
        loss = lm(part) * len(part.keys) / len(whole.keys)
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(
        model.decoder.layers[0].self_attention.qkv.weight.grad, gradient, atol=1e-6, rtol=1e-4
    )


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    model = tiny_med()
    config = Optim(lr=1e-3, min_lr=1e-4, warmup_steps=4, new_layers_lr=5e-3)
    optimizer = build_optimizer(model, config)
    factors = [set_learning_rate(optimizer, config, step, 24) for step in range(25)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[14] == pytest.approx(0.55)
    assert factors[24] == pytest.approx(0.1)
    assert {round(group["lr"], 6) for group in optimizer.param_groups} == {1e-4, 5e-4}
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, 0.05}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(model.parameters())
    )


def test_averaged_weights_follow_and_come_back() -> None:
    model = tiny_med()
    averaged = AveragedWeights(model, 0.99)
    before = model.itm_head.weight.detach().clone()
    with torch.no_grad():
        model.itm_head.weight += 1.0
    averaged.update(model)
    decay = 2 / 11  # of the warm-up
    torch.testing.assert_close(averaged.weights["itm_head.weight"], before + (1 - decay))
    averaged.swap(model)
    torch.testing.assert_close(model.itm_head.weight, before + (1 - decay))
    averaged.swap(model)
    torch.testing.assert_close(model.itm_head.weight.detach(), before + 1.0)
