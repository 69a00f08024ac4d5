from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LITE, TINY, texts, tiny

from capfilt.errors import ConfigError, InputError
from capfilt.models import med_files
from capfilt.models.med import MED
from capfilt.models.med_config import SHARINGS, MEDConfig


@pytest.mark.parametrize("config", [TINY, LITE], ids=["vit", "lite"])
def test_shapes(config: MEDConfig) -> None:
    model = tiny(config)
    ids, mask = texts()
    with torch.no_grad():
        tokens = model.encode_image(torch.randn(2, 3, config.image_size_px, config.image_size_px))
        assert tokens.shape == (2, config.image_tokens, config.image_width)
        image, text = model.embed_image(tokens), model.embed_text(ids, mask)
        for embedding, rows in ((image, 2), (text, 4)):
            assert embedding.shape == (rows, 16)
            torch.testing.assert_close(embedding.norm(dim=1), torch.ones(rows))
        kv = model.cross_keys_values(model.adapt(tokens))
        assert len(kv) == 2 and kv[0][0].shape == (2, 4, config.image_tokens, 8)
        index = torch.tensor([0, 1, 1, 0])
        sims = (image[index] * text).sum(1)
        assert model.itm_logits(ids, mask, kv, index, sims).shape == (4, 2)
        decoder_kv = model.cross_keys_values(model.adapt(tokens), "decoder")
        assert model.lm_logits(ids, mask, decoder_kv, index).shape == (4, 7, 160)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_sharing(sharing: str) -> None:
    model = tiny(dataclasses.replace(TINY, sharing=sharing))
    shared = {
        "self_attention": sharing in ("all", "all_but_cross_attention"),
        "cross_attention": sharing in ("all", "all_but_self_attention"),
        "feed_forward": sharing != "none",
    }
    for one, other in zip(model.encoder.layers, model.decoder.layers, strict=True):
        for part, expected in shared.items():
            assert (getattr(one, part) is getattr(other, part)) == expected
    assert (model.encoder.embeddings is model.decoder.embeddings) == (sharing != "none")


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 6))
def test_image_index_is_a_repeated_image(index: list[int], length: int) -> None:
    model = tiny()
    image = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    ids, _ = texts(len(index), length)
    picked = torch.tensor(index)
    with torch.no_grad():
        shared = model.itm_logits(ids, None, model.cross_keys_values(image), picked)
        copied = model.itm_logits(ids, None, model.cross_keys_values(image[picked]))
    torch.testing.assert_close(shared, copied, atol=1e-5, rtol=1e-5)


def test_texts_in_image_order_need_no_index() -> None:
    model = tiny()
    kv = model.cross_keys_values(torch.randn(2, 5, 32), "decoder")
    ids, mask = texts(6)
    with torch.no_grad():
        grouped = model.lm_logits(ids, mask, kv)
        indexed = model.lm_logits(ids, mask, kv, torch.tensor([0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(grouped, indexed, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing() -> None:
    model = tiny(dataclasses.replace(TINY, text_pool="mean"))
    ids, _ = texts(1, 5)
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = (torch.arange(9) < 5).long()[None]
    kv = model.cross_keys_values(torch.randn(1, 5, 32))
    with torch.no_grad():
        torch.testing.assert_close(model.embed_text(padded, mask), model.embed_text(ids, None))
        torch.testing.assert_close(
            model.itm_logits(padded, mask, kv), model.itm_logits(ids, None, kv)
        )
        torch.testing.assert_close(
            model.lm_logits(padded, mask, kv)[:, :5], model.lm_logits(ids, None, kv)
        )


def test_decoder_sees_no_future() -> None:
    model = tiny()
    kv = model.cross_keys_values(torch.randn(2, 5, 32), "decoder")
    ids, _ = texts(2)
    changed = ids.clone()
    changed[:, 4:] = 120
    with torch.no_grad():
        one, other = model.lm_logits(ids, None, kv), model.lm_logits(changed, None, kv)
    torch.testing.assert_close(one[:, :4], other[:, :4])
    assert not torch.allclose(one[:, 4:], other[:, 4:])


@pytest.mark.parametrize("split", [1, 2, 3, 5])
def test_cache_equals_full_pass(split: int) -> None:
    model = tiny()
    kv = model.cross_keys_values(torch.randn(2, 5, 32), "decoder")
    ids = texts(4, 6)[0].clamp(min=103)
    with torch.no_grad():
        full = model.lm_logits(ids, None, kv)
        logits, past = model.decode_step(ids[:, :split], None, kv)
        torch.testing.assert_close(logits, full[:, split - 1], atol=1e-5, rtol=1e-5)
        for position in range(split, 6):
            logits, past = model.decode_step(ids[:, position : position + 1], past, kv)
            torch.testing.assert_close(logits, full[:, position], atol=1e-5, rtol=1e-5)
        logits, past = model.decode_step(ids[:, :2], None, kv)
        logits, past = model.decode_step(ids[:, 2:], past, kv)  # several tokens onto a cache
        torch.testing.assert_close(logits, full[:, -1], atol=1e-5, rtol=1e-5)


def test_vocab_ids_are_a_slice() -> None:
    model = tiny()
    kv = model.cross_keys_values(torch.randn(2, 5, 32), "decoder")
    ids, mask = texts(2)
    some = torch.tensor([3, 102, 110, 159])
    with torch.no_grad():
        torch.testing.assert_close(
            model.lm_logits(ids, mask, kv, vocab_ids=some),
            model.lm_logits(ids, mask, kv)[..., some],
        )


def test_features_of_another_picture_size_are_refused() -> None:
    with pytest.raises(InputError, match="image_size_px"):
        tiny(LITE).adapt(torch.randn(2, 3, 1280))


def test_a_smaller_grid_reads_averages_of_cells() -> None:
    model = tiny(dataclasses.replace(LITE, grid_side=1))
    tokens = torch.randn(2, 4, 1280)
    with torch.no_grad():
        adapted = model.adapt(tokens)
        torch.testing.assert_close(
            adapted, model.adapt(tokens.mean(1, keepdim=True).expand(-1, 4, -1))
        )
    assert adapted.shape == (2, 1, 32)


def test_the_itc_token_stands_before_the_grid_and_carries_no_gradient_to_itc() -> None:
    config = dataclasses.replace(LITE, itc_token=True, projection_dropout=0.5)
    model = tiny(config).train()
    tokens = torch.randn(2, 4, 1280)
    adapted = model.adapt(tokens)
    assert adapted.shape == (2, 5, 32)
    torch.testing.assert_close(adapted, model.adapt(tokens))  # without the head's dropout
    assert torch.equal(adapted, model.adapt(tokens, model.known_image(tokens)))
    assert not torch.equal(adapted, model.adapt(tokens, -model.known_image(tokens)))
    adapted.sum().backward()
    assert all(parameter.grad is None for parameter in model.vision_proj.parameters())
    assert model.vision_proj.training


def test_a_residual_text_head_starts_in_the_space_of_the_pooled_text() -> None:
    torch.manual_seed(0)
    model = MED(dataclasses.replace(LITE, text_residual=True, embed_dim=32)).eval()
    pooled = torch.randn(3, 32)
    with torch.no_grad():
        embeds = model.project_text(pooled)
    torch.testing.assert_close(embeds, torch.nn.functional.normalize(pooled, dim=-1))


def test_a_longer_residual_changes_less() -> None:
    torch.manual_seed(0)
    model = MED(dataclasses.replace(LITE, text_residual=True, embed_dim=32)).eval()
    pooled = torch.nn.functional.normalize(torch.randn(3, 32), dim=-1)
    with torch.no_grad():
        model.text_proj[5].weight.normal_()
        short = (model.project_text(pooled) * pooled).sum(1)
        model.config = dataclasses.replace(model.config, text_residual_scale=50.0)
        long = (model.project_text(pooled) * pooled).sum(1)
    assert (long > short).all() and (long > 0.9).all()


def test_mean_max_pooling_sees_both() -> None:
    model = tiny(dataclasses.replace(LITE, image_pool="mean_max"))
    tokens = torch.randn(2, 4, 1280)
    pooled = model.pool_image(tokens)
    torch.testing.assert_close(pooled[:, :1280], tokens.mean(1))
    torch.testing.assert_close(pooled[:, 1280:], tokens.max(1).values)
    assert model.embed_image(tokens).shape == (2, 16)


def test_the_similarity_of_several_heads_is_the_mean_of_theirs() -> None:
    torch.manual_seed(0)
    several = dataclasses.replace(LITE, itc_heads=3, text_residual=True, embed_dim=96)
    model = MED(several).eval()
    tokens, pooled = torch.randn(2, 4, 1280), torch.randn(5, 32)
    with torch.no_grad():
        images, texts = model.embed_image(tokens), model.project_text(pooled)
        assert images.shape == (2, 96) and texts.shape == (5, 96)
        torch.testing.assert_close(images.norm(dim=-1), torch.ones(2))
        seen = model.vision_proj(model.pool_image(tokens))
        own = torch.nn.functional.normalize(pooled, dim=-1)
        # the residual text head starts at the pooled text, in each head
        apart = [torch.nn.functional.normalize(seen[:, head], dim=-1) @ own.T for head in range(3)]
    torch.testing.assert_close(images @ texts.T, torch.stack(apart).mean(0))


def test_two_lites_stack_their_feature_maps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MED(dataclasses.replace(LITE, lite_variant="lite0+lite1")).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = model.encode_image(pixels)
        first, second = model.vision.trunks
        assert (
            tokens.shape == (1, 4, 2560) == (1, model.config.image_tokens, model.config.image_width)
        )
        assert torch.equal(tokens[..., :1280], first(pixels).flatten(2).transpose(1, 2))
        assert torch.equal(tokens[..., 1280:], second(pixels).flatten(2).transpose(1, 2))
    med_files.save(model, tmp_path)
    again = med_files.load(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again.embed_image(tokens), model.embed_image(tokens))
    assert not any(parameter.requires_grad for parameter in model.vision.parameters())


def test_itm_from_itc_moves_the_match_logit_only() -> None:
    model = tiny(LITE)
    kv = model.cross_keys_values(torch.randn(2, 4, 32))
    ids, mask = texts(2)
    with torch.no_grad():
        low = model.itm_logits(ids, mask, kv, None, torch.zeros(2))
        high = model.itm_logits(ids, mask, kv, None, torch.tensor([5.0, 1.0]))
    torch.testing.assert_close(
        high - low, torch.tensor([[0.0, 5.0], [0.0, 1.0]]), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="itm_start"):
        model.itm_logits(ids, mask, kv)


def test_components_are_those_of_a_singular_value_decomposition(tmp_path: Path) -> None:
    config = dataclasses.replace(LITE, lite_levels="all", pooled_components=12)
    model = MED(config).eval()
    # pictures differ in some ways much more than in others
    ways = torch.randn(40, 4, 20) * 0.7 ** torch.arange(20)
    tokens = ways @ torch.randn(20, config.image_width)
    tokens[..., 3] = 7.0  # a channel that says nothing
    with torch.no_grad():
        pooled = model.pool_tokens(tokens)
        model.set_components(pooled)
        reduced = model.reduce(pooled)
    assert reduced.shape == (40, 12) and torch.equal(reduced, model.pool_image(tokens))
    standardised = (pooled - pooled.mean(0)) / pooled.std(0).clamp(min=1e-3)
    wanted = torch.linalg.svdvals(standardised)[:12]
    torch.testing.assert_close(reduced.norm(dim=0), wanted, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(reduced.mean(0), torch.zeros(12), atol=1e-3, rtol=0)
    med_files.save(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(med_files.load(tmp_path).pool_image(tokens), reduced)


def test_fewer_pictures_than_components_leave_the_rest_at_zero() -> None:
    model = MED(dataclasses.replace(LITE, pooled_components=12))
    pooled = torch.randn(5, model.config.raw_pooled_width)
    with torch.no_grad():
        model.set_components(pooled)
        reduced = model.reduce(pooled)
    assert (reduced[:, 5:] == 0).all() and (reduced[:, :4].norm(dim=0) > 1).all()


def test_the_grid_is_reduced_to_components_that_stay(tmp_path: Path) -> None:
    config = dataclasses.replace(LITE, lite_levels="all", pooled_components=8, grid_components=6)
    model = MED(config).eval()
    cells = torch.randn(200, 5) * 0.6 ** torch.arange(5) @ torch.randn(5, config.image_width)
    with torch.no_grad():
        model.set_channel_scale(cells.mean(0), cells.std(0))
        model.set_grid_components(cells + 1)
        found = model.adapter.components.clone()
        model.set_grid_components(torch.randn_like(cells))
    assert torch.equal(model.adapter.components, found)
    # five ways of varying: five components hold it all, the sixth is next to nothing
    centred = model._standardised(cells + 1) - model.adapter.components_mean
    torch.testing.assert_close(centred @ found[:5].T @ found[:5], centred, atol=1e-2, rtol=1e-2)
    tokens, known = cells.view(50, 4, -1), torch.zeros(50, config.embed_dim)
    with torch.no_grad():
        adapted = model.adapt(tokens, known)
        med_files.save(model, tmp_path)
        assert torch.equal(med_files.load(tmp_path).adapt(tokens, known), adapted)
    with pytest.raises(ConfigError, match="grid_components: only for the tower"):
        dataclasses.replace(TINY, grid_components=6)


def test_word_bonus_needs_detectors() -> None:
    model = MED(dataclasses.replace(LITE, itm_words=9))
    assert model.word_bonus(torch.randn(2, LITE.pooled_width), None).shape == (2, LITE.vocab_size)
    with pytest.raises(ConfigError, match="no word detectors"):
        MED(LITE).word_bonus(torch.randn(2, LITE.pooled_width), None)


def test_all_levels_are_standardised_before_cross_attention() -> None:
    config = dataclasses.replace(LITE, lite_levels="all", pooled_components=8)
    model = MED(config).eval()
    tokens = torch.randn(3, 4, config.image_width) * torch.rand(config.image_width) * 50 + 5
    known = torch.zeros(3, config.embed_dim)
    with torch.no_grad():
        cells = tokens.flatten(0, 1)
        plain = model.adapter((tokens - cells.mean(0)) / cells.std(0), known)
        model.set_channel_scale(cells.mean(0), cells.std(0))
        torch.testing.assert_close(model.adapt(tokens, known), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [TINY, LITE], ids=["vit", "lite"])
def test_gradient_checkpointing_gives_the_same_gradients(config: MEDConfig) -> None:
    config = dataclasses.replace(config, itm_from_itc=False)
    gradients = []
    for enabled in (False, True):
        model = tiny(config).train()
        model.set_gradient_checkpointing(enabled)
        torch.manual_seed(2)  # the recomputed pass drops the same elements
        ids, mask = texts(2)
        side = config.image_size_px
        pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
        adapted = model.image(pixels)
        loss = model.itm_logits(ids, mask, model.cross_keys_values(adapted)).square().sum()
        loss = (
            loss
            + model.lm_logits(ids, None, model.cross_keys_values(adapted, "decoder"))
            .square()
            .mean()
        )
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-4)


def test_lite_tower_is_frozen() -> None:
    model = tiny(LITE)
    assert not any(p.requires_grad for p in model.vision.parameters())
    assert all(p.requires_grad for n, p in model.named_parameters() if not n.startswith("vision."))
