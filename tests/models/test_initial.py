from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TINY, texts, tiny

from capfilt.errors import InputError
from capfilt.models import initial, med_config, text_tower
from capfilt.models.med import MED


def bert_state(vocabulary: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {
        "embeddings.word_embeddings.weight": (vocabulary, 32),
        "embeddings.position_embeddings.weight": (24, 32),
        "embeddings.token_type_embeddings.weight": (2, 32),
        "embeddings.LayerNorm.weight": (32,),
        "embeddings.LayerNorm.bias": (32,),
        "pooler.dense.weight": (32, 32),
    }
    for i in range(2):
        prefix = f"encoder.layer.{i}."
        for name, shape in {
            "attention.self.query": (32, 32), "attention.self.key": (32, 32), "attention.self.value": (32, 32),
            "attention.output.dense": (32, 32), "attention.output.LayerNorm": (32,),
            "intermediate.dense": (64, 32), "output.dense": (32, 64), "output.LayerNorm": (32,),
        }.items():  # fmt: skip
            shapes[f"{prefix}{name}.weight"], shapes[f"{prefix}{name}.bias"] = shape, shape[:1]
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


@pytest.mark.parametrize("sharing", ["all_but_self_attention", "none", "all"])
def test_init_from_bert_computes_what_bert_computes(sharing: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    state = bert_state(158)
    save_file(state, tmp_path / "model.safetensors")
    bert = BertModel(
        BertConfig(vocab_size=158, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                   max_position_embeddings=24, layer_norm_eps=1e-12), add_pooling_layer=False
    ).eval()  # fmt: skip
    bert.load_state_dict({k: v for k, v in state.items() if "pooler" not in k})
    model = tiny(dataclasses.replace(TINY, sharing=sharing))
    initial.init_from_bert(model, tmp_path)
    ids, mask = texts()
    ids = ids.clamp(max=157)
    with torch.no_grad():
        expected = bert(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(
            model.text_hidden(ids, mask)[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5
        )
        decoder = model.decoder(ids, mask)[0]
        torch.testing.assert_close(
            decoder[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5
        )


def test_init_from_bert_lists_what_does_not_fit(tmp_path: Path) -> None:
    state = bert_state(158)
    del state["encoder.layer.1.output.dense.bias"]
    save_file(
        {**state, "encoder.layer.2.output.dense.bias": torch.zeros(32)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        InputError, match=r"1 unknown: encoder\.layer\.2.*1 missing: encoder\.layer\.1"
    ):
        initial.init_from_bert(tiny(), tmp_path)


def test_init_from_minilm() -> None:
    model = MED(dataclasses.replace(med_config.small(), text_ffn_width=1536)).eval()
    initial.init_from_minilm(model)
    words = model.encoder.embeddings.word.weight
    assert torch.equal(words[text_tower.ENC_ID], words[text_tower.CLS_ID])
    assert words[text_tower.DEC_ID].norm() < words[1000].norm() * 2
    ids = torch.tensor([[101, 1037, 3899, 102], [101, 1037, 17022, 102], [101, 4013, 12870, 102]])
    hidden = torch.nn.functional.normalize(model.text_hidden(ids, None).mean(1), dim=1)
    similar = hidden @ hidden.T  # a dog, a puppy, pro spam
    assert similar[0, 1] > 0.6 > 0.4 > similar[0, 2]
