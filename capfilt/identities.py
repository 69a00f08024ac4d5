"""Which work is the same work: the identity of each training, by what decides what it learns.

An identity names the settings, the tables and the weights that a training reads. A model folder
that is signed for the same identity is not trained again.
"""

import hashlib
from pathlib import Path
from typing import Any

from capfilt import manifest
from capfilt.config import Captioner, Config, Matcher
from capfilt.errors import InputError
from capfilt.manifest import Identity
from capfilt.shards import RunDir


def image_shards(run_dir: RunDir, config: Config, sources: tuple[str, ...]) -> list[str]:
    """Names of the shards of pictures of some sources; all of them are finished.

    How many a list makes is told by the manifests of those that are finished, so that the list may
    have been moved away since.

    Raises:
        InputError: one isn't finished, or none is there.
    """
    found = []
    for source in sources:
        step = "download" if source == "web" and config.web.urls is not None else "ingest"
        signed = run_dir.shards("images", (source,))
        if not signed:
            raise InputError(
                f"{run_dir.at('images')} holds no finished shards of {source} pairs: run "
                f"`capfilt {step} CONFIG` first, or `capfilt run CONFIG`"
            )
        missing = sorted(set(_made_shards(run_dir, config, source, signed)) - set(signed))
        if missing:
            more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
            raise InputError(
                f"{run_dir.at('images')} lacks {', '.join(missing[:3])}{more} of the {source} "
                f"pairs, not finished (interrupted, or failed): run `capfilt {step} CONFIG` first, "
                "or `capfilt run CONFIG`"
            )
        found += signed
    return sorted(found)


def _made_shards(run_dir: RunDir, config: Config, source: str, signed: list[str]) -> list[str]:
    """The shards that the list of a source makes, as the manifests of the finished ones say."""
    from capfilt.stages import download, ingest
    from capfilt.stages.lists import numbered_shards

    records = [manifest.read(run_dir, run_dir.manifest("images", shard)) for shard in signed]
    counts = [record["list_shards"] for record in records if record and "list_shards" in record]
    if counts:
        return numbered_shards(source, max(counts))
    # a run folder of before manifests said so: the list does, while it is there
    try:
        if source == "web" and config.web.urls is not None:
            return download.list_shards(config)
        return ingest.list_shards(config, "human" if source == "human" else "web")
    except InputError:
        return signed


def model_manifest(run_dir: RunDir, step: str) -> str:
    """Where the manifest of a training lies; `step` names it: pretrain, captioner or matcher."""
    return run_dir.at("models", step, "manifest.json")


def identify_training(
    step: str,
    run_dir: RunDir,
    config: Config,
    *,
    sources: tuple[str, ...],
    deciding: dict[str, Any],
    weights: dict[str, str],
) -> Identity:
    """The identity of a training on the pictures of some sources.

    Raises:
        InputError: a table that it reads isn't finished.
    """
    upstream = {}
    tables = ("images", "features") if config.model.caches_features else ("images",)
    shards = image_shards(run_dir, config, sources)
    for table in tables:
        prints = []
        for shard in shards:
            record = manifest.read(run_dir, run_dir.manifest(table, shard))
            if record is None:
                raise InputError(
                    f"{step} reads {table}/{shard}, and it isn't finished: run "
                    "`capfilt features CONFIG` first, or `capfilt run CONFIG`"
                )
            prints.append(manifest.signature(record))
        upstream[table] = hashlib.sha256(" ".join(prints).encode()).hexdigest()
    return Identity(step, 1, deciding, upstream, weights)


def identify_finetuning(
    step: str,
    settings: Matcher | Captioner,
    run_dir: RunDir,
    config: Config,
    verdicts: dict[str, bool],
) -> Identity:
    """The identity of a finetuning; of the reviewed pairs their verdicts decide, which name them.

    A pair's name is the digest of its picture and text, so the tables that hold them need not be
    part of it.
    """
    if settings.checkpoint is not None:  # taken as it is, whatever pictures there are
        deciding: dict[str, Any] = {step: {"checkpoint": settings.checkpoint}}
        deciding |= _picture_size(config)
        weights = checkpoint_digest(settings.checkpoint)
        return Identity(step, 1, deciding, {}, weights)
    own = manifest.deciding_config(settings)
    deciding = {step: own, "seed": config.seed}
    sources: tuple[str, ...] = ("human",)
    if isinstance(settings, Matcher) and (settings.itm.web_negatives or settings.head_warmup):
        sources = ("human", "web")
    if settings.init is not None:
        weights = checkpoint_digest(settings.init)
        deciding |= _picture_size(config)
    elif config.pretrain is not None:
        record = manifest.read(run_dir, model_manifest(run_dir, "pretrain"))
        if record is None:
            raise InputError(
                f"finetuning the {step} starts from the run's pretraining, which isn't finished: "
                f"run `capfilt pretrain CONFIG` first, set {step}.init, or set pretrain: null"
            )
        weights = {"pretrain": str(record["fingerprint"])}
    else:
        deciding["model"] = manifest.deciding_config(config.model)
        weights = start_weights(config)
    if verdicts:
        listed = manifest.canonical_json(verdicts).encode()
        weights = {**weights, "labels": hashlib.sha256(listed).hexdigest()}
    elif isinstance(settings, Matcher):
        del own["labels_per_step"]  # nothing to draw: it decides nothing
    return identify_training(
        step, run_dir, config, sources=sources, deciding=deciding, weights=weights
    )


def _picture_size(config: Config) -> dict[str, Any]:
    """What of the section `model` decides a model that starts from a checkpoint."""
    if config.model.caches_features or config.model.image_size_px is None:
        return {}
    return {"model": {"image_size_px": config.model.image_size_px}}


def matcher_verdicts(config: Config) -> dict[str, bool]:
    """Whether each reviewed pair is right; empty where `matcher.labels` is off.

    Raises:
        InputError: the folder holds nothing to learn from.
    """
    if config.matcher.labels is None:
        return {}
    from capfilt.inspect.labels import read_labels, verdicts_of

    folder = config.matcher.labels
    labels = read_labels(folder)
    if not labels:
        found = "holds no labels" if Path(folder).is_dir() else "is not there"
        raise InputError(
            f"matcher.labels: folder {folder!r} {found}; review pairs with `capfilt inspect RUN`, "
            "which writes them into labels/ of the run folder, and give that one"
        )
    verdicts = verdicts_of(labels)
    if not verdicts:
        raise InputError(
            f"matcher.labels: none of the {len(labels)} labels in {folder!r} says that a pair is "
            "right or wrong (`unsure`, and reviewers who are split, say nothing); review more "
            "pairs with `capfilt inspect RUN`"
        )
    return verdicts


def start_weights(config: Config) -> dict[str, str]:
    """Digests of the pretrained parts that a fresh model starts from."""
    if config.model.preset != "small":
        found = {}
        for name in ("image_weights", "text_weights"):
            value = getattr(config.model, name)
            if value is not None:
                found.update(checkpoint_digest(value))
        return found
    from capfilt.models.weights import lite_files, minilm_folder

    files = lite_files(config.model.lite)
    digests = {name: manifest.file_digest(path) for name, path in files.items()}
    if config.model.text_weights is not None:
        return {**digests, **checkpoint_digest(config.model.text_weights)}
    return {**digests, "text": manifest.file_digest(minilm_folder() / "model.safetensors")}


def checkpoint_digest(name_or_folder: str) -> dict[str, str]:
    """What tells one checkpoint from another: its files' digests, or a hub name as it is."""
    folder = Path(name_or_folder)
    if not folder.exists():
        return {"hub": name_or_folder}
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if folder.is_file():
        files = [folder]
    if not files:
        raise InputError(
            f"{name_or_folder} holds no weights (model.safetensors or pytorch_model.bin)"
        )
    return {file.name: manifest.file_digest(file) for file in files}
