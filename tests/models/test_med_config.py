from __future__ import annotations

import dataclasses
import json

import pytest
from tiny_models import LITE, TINY

from capfilt.errors import ConfigError
from capfilt.models import med_config
from capfilt.models.med_config import MEDConfig


@pytest.mark.parametrize(
    "values", [{"sharing": "half"}, {"image_tower": "cnn"}, {"text_heads": 5}, {"image_size_px": 30},
               {"vision_heads": 5}, {"image_tower": "efficientnet_lite"}, {"lite_variant": "lite9"},
               {"lite_variant": "lite0+lite9"}]
)  # fmt: skip
def test_config_refuses(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        MEDConfig.from_dict({**TINY.to_dict(), **values})


@pytest.mark.parametrize("preset", [med_config.small, med_config.base, med_config.large])
def test_presets(preset: object) -> None:
    config = preset()  # type: ignore[operator]
    assert MEDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values",
    [
        {"itc_heads": 3},
        {"itc_heads": 2, "projection_hidden": None},
        {"itc_heads": 2, "text_residual": True},
    ],
)
def test_heads_that_do_not_divide_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(LITE, **values)  # type: ignore[arg-type]
