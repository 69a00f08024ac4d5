"""The manifest that signs a finished shard or model, and the fingerprint that it carries.

The fingerprint covers what decides the output: the stage's name and version, its whole config less
what is marked runtime-only, the signatures of what it read and the digest of the weights. Never a
path. A value that it can't serialise is an error: a forgotten field may cost a rerun, and never
serves stale work.
"""

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import capfilt
from capfilt.errors import InputError, MismatchError
from capfilt.shards import RunDir


@dataclass(frozen=True)
class Identity:
    """What decides a stage's output on one shard.

    Attributes:
        stage: the stage's name.
        version: its version; raised when the same config would give other output.
        config: its config as plain values, runtime-only fields left out.
        upstream: signatures of what it read, by table or model.
        weights: digests of the weights it used, by what they are.
    """

    stage: str
    version: int
    config: dict[str, Any]
    upstream: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A sha256 over all of the above, hex."""
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys; refuses what it would have to guess about.

    Raises:
        TypeError: a value is not a plain JSON value.
        ValueError: a float is NaN or infinite.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def deciding_config(config: BaseModel) -> dict[str, Any]:
    """A config as plain values, without the fields marked `runtime` (device, batch size, …)."""
    values = {}
    for name, info in type(config).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("runtime"):
            continue
        value = getattr(config, name)
        values[name] = deciding_config(value) if isinstance(value, BaseModel) else value
    return values


def file_digest(path: str | Path) -> str:
    """The sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sign(
    run: RunDir,
    path: str,
    identity: Identity,
    *,
    rows: int,
    counts: Mapping[str, int],
    seconds: float,
    sha256: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a manifest, last and by rename: what it signs is complete.

    Args:
        run: the run folder.
        path: of the manifest.
        identity: what decided the work.
        rows: how many it has.
        counts: rows by reason or source.
        seconds: that it took.
        sha256: of the table's file; see `signature`.
        extra: further fields to record.
    """
    record = {
        **asdict(identity),
        "fingerprint": identity.fingerprint,
        **({} if sha256 is None else {"sha256": sha256}),
        "rows": rows,
        "counts": dict(counts),
        "seconds": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"capfilt": capfilt.__version__, "python": platform.python_version()},
        **(extra or {}),
    }
    run.write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read(run: RunDir, path: str) -> dict[str, Any] | None:
    """The manifest at a path, or None.

    Raises:
        InputError: it is there and is not a manifest.
    """
    if not run.exists(path):
        return None
    try:
        record = json.loads(run.read_text(path))
        if not isinstance(record["fingerprint"], str):
            raise TypeError("fingerprint is not text")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a manifest ({error}); delete it to redo what it signs"
        ) from None
    return dict(record)


def signature(record: Mapping[str, Any]) -> str:
    """What later stages record of work that they read: its fingerprint, and the file's digest.

    The fingerprint alone would not do: the same URL may answer otherwise when it is fetched again.
    """
    fingerprint = str(record["fingerprint"])
    return f"{fingerprint}:{record['sha256']}" if "sha256" in record else fingerprint


def is_done(
    run: RunDir,
    path: str,
    identity: Identity,
    *,
    table: str | None = None,
    stale_is_pending: bool = False,
) -> bool:
    """Whether the work at `path` is signed with this identity, and there.

    Args:
        run: the run folder.
        path: of the manifest.
        identity: what would be done now.
        table: the file that it signs: without it nothing is done.
        stale_is_pending: work of another identity counts as not done (and will be replaced)
            instead of being an error.

    Raises:
        MismatchError: it is signed with another identity.
    """
    record = read(run, path)
    if record is None:
        return False
    if record["fingerprint"] == identity.fingerprint:
        return table is None or run.exists(table)
    if stale_is_pending:
        return False
    raise MismatchError(
        f"{path} was made with another config or input; nothing was overwritten. What differs:\n"
        f"{listed_differences(record, identity)}\n"
        f"Set it back, choose another run_dir, or redo this stage and those after it with "
        f"`capfilt run CONFIG --redo {identity.stage}`"
    )


def listed_differences(record: Mapping[str, Any], identity: Identity) -> str:
    """What differs between a manifest and an identity, a line each, for messages."""
    keys = differences(record, asdict(identity))
    return "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, old, new in keys)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The dotted keys at which two identities differ, with both values."""
    found: list[tuple[str, Any, Any]] = []

    def walk(prefix: str, left: Any, right: Any) -> None:
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            for key in sorted({*left, *right}):
                walk(f"{prefix}.{key}" if prefix else str(key), left.get(key), right.get(key))
        elif left != right:
            found.append((prefix, left, right))

    for part in ("version", "config", "upstream", "weights"):
        name = str(new["stage"]) if part == "config" else part
        # JSON turns tuples into lists: compare what would be stored
        walk(name, old.get(part), json.loads(canonical_json(new.get(part))))
    return found
