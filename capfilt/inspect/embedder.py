"""The run's matcher as what turns a search query into an ITC embedding."""

import threading
from functools import partial
from typing import Any

import numpy as np

from capfilt import manifest
from capfilt.errors import InputError
from capfilt.inspect.search import TABLE, Embedder
from capfilt.shards import RunDir

MAX_TOKENS = 35


def open_embedder(run: RunDir) -> Embedder | None:
    """The embedder of a run whose embeddings are stored; None where there are none, or no matcher.

    The model is loaded at the first query, on the CPU.
    """
    weights = run.at("models", "matcher", "model.safetensors")
    if "://" in run.path or not run.shards(TABLE) or not run.exists(weights):
        return None
    loaded = _Loaded(run, weights)
    return Embedder(partial(_embed_text, loaded), partial(_embed_picture, loaded))


class _Loaded:
    """The model and tokenizer, loaded once, by whichever thread asks first."""

    def __init__(self, run: RunDir, weights: str) -> None:
        self.run, self.weights = run, weights
        self.parts: tuple[Any, Any] | None = None
        self.lock = threading.Lock()

    def __call__(self) -> tuple[Any, Any]:
        with self.lock:
            if self.parts is None:
                self._check()
                from capfilt.models import folder

                model, tokenizer, _ = folder.load(self.run.local("models", "matcher"))
                self.parts = model.eval(), tokenizer
            return self.parts

    def _check(self) -> None:
        shard = self.run.shards(TABLE)[0]
        record = manifest.read(self.run, self.run.manifest(TABLE, shard))
        if (record or {}).get("weights", {}).get("matcher") != manifest.file_digest(self.weights):
            raise InputError(
                f"{self.run.at(TABLE)} is of another matcher than {self.weights}; score the run "
                "again with score.store_embeddings: true"
            )


def _embed_text(loaded: _Loaded, text: str) -> np.ndarray:
    import torch

    from capfilt.models.tokens import clean, tokenize

    cleaned = clean(text)
    if not cleaned:
        raise InputError("the query holds no word")
    model, tokenizer = loaded()
    with torch.inference_mode():
        ids, mask = tokenize(tokenizer, [cleaned], MAX_TOKENS, first_token="cls")
        return np.asarray(model.embed_text(ids, mask)[0].float().numpy())


def _embed_picture(loaded: _Loaded, data: bytes) -> np.ndarray:
    import torch

    from capfilt.models.images import open_rgb, pixels

    picture = open_rgb(data)
    model, _ = loaded()
    with torch.inference_mode():
        values = pixels([picture], model.config.image_size_px, model.config.image_tower)
        return np.asarray(model.embed_image(model.encode_image(values))[0].float().numpy())
