"""A MED's weights as files: written, read, and held against what the model needs."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from capfilt.errors import InputError
from capfilt.models.med import MED
from capfilt.models.med_config import MEDConfig


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every shared tensor once, under the first of its names."""
    state: dict[str, Tensor] = dict(model.named_parameters())
    kept = model.state_dict()
    state.update({name: tensor for name, tensor in model.named_buffers() if name in kept})
    return {name: tensor.detach() for name, tensor in state.items()}


def load_unique_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Fill a model from `unique_state`'s output.

    Args:
        model: filled in place.
        state: one tensor for each of `unique_state(model)`.
        where: the file, for messages.

    Raises:
        InputError: keys are unknown, missing or of another shape; the message lists them.
    """
    wanted = unique_state(model)
    check_keys({name: tuple(tensor.shape) for name, tensor in wanted.items()}, state, where)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(state[name])


def check_keys(
    wanted: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], where: str
) -> None:
    """Compare a file's tensors with what the model needs.

    Args:
        wanted: name to shape.
        state: what the file holds.
        where: the file, for messages.

    Raises:
        InputError: keys are unknown, missing or of another shape; the message lists them.
    """
    unknown = sorted(set(state) - set(wanted))
    missing = sorted(set(wanted) - set(state))
    misshapen = [
        f"{name} (file: {tuple(state[name].shape)}, model: {shape})"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    parts = []
    for label, names in (
        ("unknown", unknown),
        ("missing", missing),
        ("of another shape", misshapen),
    ):
        if names:
            more = f", and {len(names) - 20} more" if len(names) > 20 else ""
            parts.append(f"{len(names)} {label}: {', '.join(names[:20])}{more}")
    if parts:
        raise InputError(
            f"{where}: the weights do not fit the model. Keys {'; '.join(parts)}. "
            "Check that config.json and the weights belong together."
        )


def save(model: MED, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`; each file is written beside and renamed.

    Args:
        model: shared tensors are written once.
        folder: created when absent.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors.tmp"
    save_file(
        {k: v.contiguous() for k, v in unique_state(model).items()},
        weights,
        metadata={"format": "pt"},
    )
    config = folder / "config.json.tmp"
    config.write_text(
        json.dumps({"model_type": "capfilt-med", **model.config.to_dict()}, indent=1) + "\n"
    )
    os.replace(weights, folder / "model.safetensors")
    os.replace(config, folder / "config.json")


def load_config(folder: str | Path) -> MEDConfig:
    """Read `config.json` of a folder that `save` wrote.

    Raises:
        InputError: there is no such file, or it is another kind of model's.
        ConfigError: a key is unknown or a value not allowed.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; expected a model folder written by capfilt"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    kind = values.pop("model_type", None)
    if kind != "capfilt-med":
        raise InputError(
            f"{path}: model_type is {kind!r}, not 'capfilt-med'; "
            "load BLIP checkpoints with capfilt.models.hub"
        )
    return MEDConfig.from_dict(values, str(path))


def load(folder: str | Path) -> MED:
    """Read a model that `save` wrote, in evaluation mode on the CPU.

    Raises:
        InputError: a file is missing, or keys are unknown, missing or of another shape.
    """
    model = MED(load_config(folder))
    path = Path(folder) / "model.safetensors"
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; expected a model folder written by capfilt"
        ) from None
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a readable safetensors file ({error}); write it again"
        ) from None
    load_unique_state(model, state, str(path))
    return model.eval()


def read_weights(name_or_folder: str | Path) -> tuple[Path, dict[str, Tensor]]:
    """Read a checkpoint's tensors, from safetensors where there are any.

    Args:
        name_or_folder: a folder, a file of weights, or a name on the Hugging Face hub.

    Returns:
        The file read, and its tensors.

    Raises:
        InputError: there is nothing to read, or it holds more than tensors.
    """
    folder = Path(name_or_folder)
    if not folder.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        name, others = str(name_or_folder), ["*.json", "*.txt"]
        try:
            folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", *others]))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(name, allow_patterns=["*.bin", *others]))
        except (HFValidationError, OSError) as error:  # what the hub raises are OSErrors
            raise InputError(
                f"{name_or_folder}: no such folder, and no such checkpoint on the hub ({error}). "
                "Give a folder with model.safetensors, or check the name and the network."
            ) from None
    if folder.is_file():
        files = [folder]
    else:
        patterns = ("model*.safetensors", "pytorch_model*.bin")
        files = next((found for p in patterns if (found := sorted(folder.glob(p)))), [])
    if not files:
        raise InputError(f"{folder}: no weights; expected model.safetensors or pytorch_model.bin")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                state.update(load_file(file))
            else:
                # weights_only: a pickle from elsewhere must not run code
                loaded = torch.load(file, map_location="cpu", weights_only=True)
                state.update(loaded["model"] if isinstance(loaded.get("model"), dict) else loaded)
        except Exception as error:
            raise InputError(
                f"{file}: not readable as weights ({type(error).__name__}: {error})"
            ) from None
    return files[0], state
