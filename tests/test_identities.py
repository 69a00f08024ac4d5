from tiny import Tiny

from capfilt.config import load
from capfilt.identities import identify_finetuning
from capfilt.manifest import Identity
from capfilt.pipeline import run
from capfilt.shards import RunDir


def test_labels_are_part_of_the_matchers_identity_only_where_there_are_some(tiny: Tiny) -> None:
    """Without labels it is what it was before there were any: no finished matcher is redone."""
    run(load(tiny.config), steps=("ingest",))
    init = tiny.folder / "init"
    init.mkdir()
    (init / "model.safetensors").write_bytes(b"weights")
    tiny.values["model"] = {"preset": "base"}

    def identity(labels_per_step: int, **verdicts: bool) -> Identity:
        tiny.values["matcher"] = {"init": str(init), "labels_per_step": labels_per_step}
        config = load(tiny.config)
        run_dir, settings = RunDir(config.run_dir), config.matcher
        return identify_finetuning("matcher", settings, run_dir, config, verdicts)

    without = identity(16)
    assert without.fingerprint == identity(3).fingerprint, "it decides nothing without labels"
    assert not {"labels", "labels_per_step"} & set(without.config["matcher"])
    assert set(without.weights) == {"model.safetensors"}
    seen = {without.fingerprint}
    for found in (
        identity(16, a=True, b=False),
        identity(16, a=True, b=True),
        identity(16, a=True),
        identity(3, a=True),
    ):
        assert found.fingerprint not in seen
        seen.add(found.fingerprint)
    assert identity(16, b=False, a=True).fingerprint == identity(16, a=True, b=False).fingerprint
