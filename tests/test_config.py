import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from capfilt.config import Config, Download, load
from capfilt.errors import ConfigError
from capfilt.manifest import Identity, canonical_json, deciding_config

MINIMAL = """\
run_dir: runs/x
human:
  pairs: human.jsonl
web:
  urls: urls.csv
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_smallest_config_has_the_papers_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL))
    assert config.caption.method == "nucleus" and config.caption.top_p == 0.9
    assert config.filter.itm_threshold == 0.5 and config.demo is None
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"run\.yaml: expected `key: value` lines, found NoneType"),
        ("- a\n", r"found list"),
        ("a: [1\n", r"run\.yaml is not valid YAML.*line 2"),
        ("run_dir: a\nrun_dir: b\n", r"key 'run_dir' is there twice.*line 2"),
        ("? [a]\n: b\n", r"a key must be plain text"),
        ("a: \x00\n", r"not valid YAML"),
        (f"a: {'[' * 3000}{']' * 3000}\n", r"not valid YAML.*recursion"),
        (MINIMAL + "filter:\n  expression: width > 99999999999999999999\n", r"filter\.expression \(line 7\): .*too large for a whole number of 64 bits"),
        (MINIMAL + "seeed: 1\n", r"seeed \(line 6\): unknown key; did you mean 'seed'\?"),
        (MINIMAL + "zzz: 1\n", r"zzz \(line 6\): unknown key; known here: run_dir, seed"),
        (MINIMAL + "score:\n  batchsize: 1\n", r"score\.batchsize \(line 7\): unknown key; did you mean 'batch_size'"),
        (MINIMAL + "pretrain:\n  itc:\n    que_size: 1\n", r"pretrain\.itc\.que_size \(line 8\).*'queue_size'"),
        (MINIMAL + "demo:\n  serve: a\n  prt: 1\n", r"demo\.prt \(line 8\): unknown key; did you mean 'port'"),
        (MINIMAL + "seed: many\n", r"seed \(line 6\): .*integer.* \(is 'many'\)"),
        (MINIMAL + "seed: true\n", r"seed \(line 6\): .*integer \(is True\)"),
        (MINIMAL + 'seed: "5"\n', r"seed \(line 6\): .*integer \(is '5'\)"),
        (MINIMAL + "filter:\n  top_fraction: off\n", r"filter\.top_fraction \(line 7\): .*number; write null to turn it off \(is False\)"),
        (MINIMAL + "filter:\n  itc_threshold: off\n", r"filter\.itc_threshold \(line 7\): .*write null"),
        (MINIMAL + "filter:\n  best_of: on\n", r"filter\.best_of \(line 7\): .*integer; write null .*True"),
        (MINIMAL + "pretrain:\n  itc:\n    momentum: no\n", r"pretrain\.itc\.momentum \(line 8\): .*write null"),
        (MINIMAL + "pretrain:\n  lr: '1e-4'\n", r"pretrain\.lr \(line 7\): .*number \(is '1e-4'\)"),
        (MINIMAL + "export:\n  human: 1\n", r"export\.human \(line 7\): .*boolean"),
        (MINIMAL + "filter:\n  itm_threshold: 1.5\n", r"filter\.itm_threshold \(line 7\): .*less than or equal to 1 \(is 1\.5\)"),
        (MINIMAL + "pretrain:\n  lr: .inf\n", r"pretrain\.lr \(line 7\): .*finite"),
        (MINIMAL + "pretrain:\n  lr: .nan\n", r"pretrain\.lr \(line 7\)"),
        (MINIMAL + "download:\n  shard_size: 0\n", r"download\.shard_size \(line 7\)"),
        (MINIMAL + "download:\n  shard_size: 100001\n", r"download\.shard_size \(line 7\): .*100000"),
        (MINIMAL + "download:\n  max_area_px: 89478486\n", r"download\.max_area_px \(line 7\): .*89478485"),
        (MINIMAL + "download: 3\n", r"download \(line 6\): .* \(is 3\)"),
        (MINIMAL + "model:\n  preset: tiny\n", r"model\.preset \(line 7\): .*'small', 'base' or 'large'.*'tiny'"),
        (MINIMAL + "  pairs: x\n", r"web \(line 4\): give exactly one of `urls`"),
        (MINIMAL + "1: x\n", r"1.*(unknown key|string)"),
        ("seed: 1\n", r"run_dir: required, and not there\n +web: required, and not there"),
        ("run_dir: a\nweb: {urls: x}\n", r"`human` is missing, and pretrain, captioner, matcher would"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_message_with_key_line_and_value(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    assert str(tmp_path / "run.yaml") in str(caught.value)
    assert caught.match(f"(?s){message}")
    assert caught.value.exit_code == 2


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, MINIMAL + "seed: -1\nscore:\n  batch: 1\n"))
    assert len(str(caught.value).splitlines()) == 3


def test_a_config_that_is_not_there_names_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/a.yaml").touch()
    with pytest.raises(
        ConfigError, match=r"'b\.yaml' is not there; in pipelines/ there are pipelines/a\.yaml"
    ):
        load("b.yaml")
    with pytest.raises(ConfigError, match=r"can't be read"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match=r"can't be read"):
        load("latin.yaml")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = MINIMAL.replace("runs/x", "~/x").replace("human.jsonl", "~/human.jsonl")
    config = load(write(tmp_path, text), ("filter.columns=~/own.csv", "human.images=~"))
    assert (config.run_dir, config.human.pairs) == (f"{tmp_path}/x", f"{tmp_path}/human.jsonl")
    assert (config.filter.columns, config.human.images) == (f"{tmp_path}/own.csv", None)
    assert load(write(tmp_path, MINIMAL), ("human.images='~'",)).human.images == str(tmp_path)
    assert load(write(tmp_path, MINIMAL), ("run_dir=s3://b/~x",)).run_dir == "s3://b/~x"


@pytest.mark.parametrize(
    "key", ["run_dir", "human.pairs", "human.images", "web.urls", "filter.columns"]
)
def test_a_path_is_not_empty(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}\b.*at least 1 character"):
        load(write(tmp_path, MINIMAL), (f"{key}=''",))


def test_labels_need_a_training(tmp_path: Path) -> None:
    text = MINIMAL + "matcher:\n  checkpoint: some/model\n  labels: runs/x/labels\n"
    with pytest.raises(ConfigError, match=r"matcher \(line 6\): `labels` needs a training"):
        load(write(tmp_path, text))


def test_what_the_head_warmup_finds_needs_it(tmp_path: Path) -> None:
    small = "model:\n  itm_bank: 10\n"
    with pytest.raises(ConfigError, match=r"`model\.itm_bank` .* by `pretrain\.head_warmup`"):
        load(write(tmp_path, MINIMAL + small))
    with pytest.raises(ConfigError, match=r"by `matcher\.head_warmup`"):
        load(write(tmp_path, MINIMAL + small + "pretrain: null\n"))
    load(write(tmp_path, MINIMAL + small + "pretrain:\n  head_warmup: {}\n"))
    load(write(tmp_path, MINIMAL + small + "pretrain: null\nmatcher:\n  init: some/matcher\n"))
    with pytest.raises(ConfigError, match="`lite_levels: all` needs `pooled_components`"):
        load(write(tmp_path, MINIMAL + "model:\n  lite_levels: all\n"))
    words = "model:\n  itm_words: 9\n"
    with pytest.raises(ConfigError, match=r"`model\.itm_words` .* by `pretrain\.head_warmup`"):
        load(write(tmp_path, MINIMAL + words))
    bonus = "caption:\n  word_bonus: 0.3\n"
    with pytest.raises(ConfigError, match=r"`caption\.word_bonus` needs word detectors"):
        load(write(tmp_path, MINIMAL + bonus))
    load(write(tmp_path, MINIMAL + bonus + "captioner:\n  init: some/captioner\n"))
    with pytest.raises(ConfigError, match="`itm_bank` is for `preset: small`"):
        load(write(tmp_path, MINIMAL + small + "  preset: base\n"))


def test_web_pairs_need_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"matcher \(line 6\): `web_pairs` needs `head_warmup`"):
        load(write(tmp_path, MINIMAL + "matcher:\n  web_pairs: true\n"))


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load(
        path,
        (
            "score.batch_size=8",
            "filter.itm_threshold=null",
            "demo.serve=web",
            "pretrain.itc.momentum = 0.5",
        ),
    )
    assert config.score.batch_size == 8 and config.filter.itm_threshold is None
    assert config.demo is not None and config.demo.serve == "web"
    assert config.pretrain is not None and config.pretrain.itc.momentum == 0.5


@pytest.mark.parametrize(
    ("text", "lr"),
    [("1e-4", 1e-4), ("2E3", 2000.0), ("1.5e2", 150.0), ("1.0e-3", 0.001), ("3", 3.0)],
)
def test_numbers_with_an_exponent(tmp_path: Path, text: str, lr: float) -> None:
    assert load(write(tmp_path, MINIMAL), (f"matcher.lr={text}",)).matcher.lr == lr
    assert load(write(tmp_path, MINIMAL + f"matcher:\n  lr: {text}\n")).matcher.lr == lr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"--set 'seed': expected key\.subkey=value"),
        ("=1", r"expected key\.subkey=value"),
        ("score..x=1", r"expected key\.subkey=value"),
        ("run_dir.x=1", r"'run_dir' holds a value, not a section"),
        ("seed=[1", r"the value is not YAML"),
        ("filter={best_of: 1, best_of: 2}", r"the value is not YAML.*'best_of' is there twice"),
        ("score.bach_size=1", r"score\.bach_size.*unknown key; did you mean 'batch_size'"),
    ],
)
def test_a_bad_override_is_told(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, MINIMAL), (override,))


def leaves(
    section: type[BaseModel], prefix: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Any]]:
    """Every field of a config with its path, sections walked into."""
    found = []
    for name, info in section.model_fields.items():
        kinds = [info.annotation, *get_args(info.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner:
            found += leaves(inner[0], (*prefix, name))
        else:
            found.append(((*prefix, name), info))
    return found


def is_runtime(info: Any) -> bool:
    return bool(info.json_schema_extra and info.json_schema_extra.get("runtime"))


LEAVES = leaves(Config)


def test_every_field_says_what_it_is() -> None:
    for path, info in LEAVES:
        assert info.description, ".".join(path)


def test_runtime_fields_are_those_that_cannot_change_the_output() -> None:
    assert {path[-1] for path, info in LEAVES if is_runtime(info)} <= {
        "device", "threads", "processes", "batch_size", "tensorboard", "calibration",
        "store_embeddings", "labels", "columns",
    }  # fmt: skip
    trained = [path for path, _ in LEAVES if path[0] in ("pretrain", "matcher", "captioner")]
    assert ("pretrain", "batch_size") in trained
    runtime = {path[-1] for path, info in LEAVES if path in trained and is_runtime(info)}
    assert runtime == {"tensorboard", "labels"}


def print_of(section: BaseModel) -> str:
    return Identity("stage", 1, deciding_config(section)).fingerprint


BASE: dict[str, Any] = yaml.safe_load(MINIMAL) | {
    "demo": {"serve": "web"},
    "pretrain": {"head_warmup": {}},
    "matcher": {"head_warmup": {}},
    # said outright: as a default it gives way to other rules
    "filter": {"itm_threshold": 0.5},
}


def another(value: Any, info: Any, choice: int) -> Any:
    """A valid value that differs from `value`, or None where there is none to be found."""
    candidates: list[Any] = [
        True,
        False,
        0.25,
        0.5,
        0.75,
        1,
        2,
        3,
        17,
        "x",
        None,
        *get_args(info.annotation),
    ]
    candidates = [one for one in candidates if one != value or type(one) is not type(value)]
    return candidates[choice % len(candidates)]


@settings(max_examples=300, deadline=None)
@given(leaf=st.sampled_from(LEAVES), choice=st.integers(0, 50))
def test_the_fingerprint_changes_with_every_deciding_field_and_no_other(
    leaf: Any, choice: int
) -> None:
    path, info = leaf
    before = Config.model_validate(BASE)
    holder: Any = before
    for part in path[:-1]:
        holder = getattr(holder, part)
    values = copy.deepcopy(BASE)
    section = values
    for part in path[:-1]:
        section = section.setdefault(part, {})
    section[path[-1]] = another(getattr(holder, path[-1]), info, choice)
    if path == ("web", "pairs"):
        section.pop("urls")
    try:
        after = Config.model_validate(values)
    except ValidationError:
        return
    holder_after: Any = after
    for part in path[:-1]:
        holder_after = getattr(holder_after, part)
    changed = getattr(holder_after, path[-1]) != getattr(holder, path[-1])
    assert (print_of(before) != print_of(after)) == (changed and not is_runtime(info))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 64), st.integers(1, 64))
def test_workers_stay_out_of_the_fingerprint(processes: int, threads: int) -> None:
    assert print_of(Download()) == print_of(Download(processes=processes, threads=threads))


def test_what_download_takes_later_steps_can_decode() -> None:
    from capfilt.models.images import MAX_PIXELS

    assert Download(max_area_px=MAX_PIXELS).max_area_px == MAX_PIXELS
    with pytest.raises(ValidationError, match="max_area_px"):
        Download(max_area_px=MAX_PIXELS + 1)


def test_a_deciding_config_is_plain_json() -> None:
    canonical_json(deciding_config(Config.model_validate(BASE)))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("pretrain: {freeze_image: false}", "`pretrain.freeze_image: false` is for `model.preset: base`"),
        ("matcher: {freeze_image: false}", "`matcher.freeze_image: false` is for"),
        ("model: {preset: base}\ncaptioner: {image_dropout: 0.1}", "`captioner.image_dropout` blanks cached"),
        ("pretrain: {patience: 2}", "`pretrain.patience` needs a validation: pretraining has none"),
        ("matcher: {patience: 2}", "set `matcher.val_fraction`"),
        ("pretrain: {itc: {queue_size: 64}}", "set `momentum` (0.995, say), or `queue_size: 0`"),
        ("matcher: {itc: {alpha: 0.4}}", "or `alpha: 0`"),
        ("matcher: {itc: {queue_size: 32, momentum: 0.99}}", "less than a batch (64)"),
        ("pretrain: {itm: {word_swap: 0.5}}", "move it to `matcher.itm.word_swap`"),
        ("caption: {method: top_k}", "needs `top_k`"),
        ("caption: {method: beam, captions_per_image: 3}", "`method: beam` gives one caption a picture"),
        ("caption: {min_tokens: 30}", "`min_tokens: 30` is above `max_tokens: 20`"),
        ("captioner: {prompt: a b c d e f}\ncaption: {max_tokens: 7}", "leaves no room after `captioner.prompt`"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_told_before_anything_happens(
    tmp_path: Path, lines: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{MINIMAL}{lines}\n")
    with pytest.raises(ConfigError) as error:
        load(path)
    assert message in str(error.value)


def test_what_keeps_a_training_from_starting_fresh(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{MINIMAL}model: {{preset: base}}\n")
    problem = load(path).start_problem("pretrain")
    assert (
        problem is not None and "nothing fills the image tower of `model.preset: base`" in problem
    )
    for change in ("pretrain.freeze_image=false", "model.image_weights=vit", "pretrain=null"):
        assert load(path, (change,)).start_problem("pretrain") is None
    assert load(path, ("pretrain=null",)).start_problem("matcher") is not None
    assert load(path, ("pretrain=null", "matcher.init=blip")).start_problem("matcher") is None
    small = (
        "pretrain=null",
        "model.preset=small",
        "model.grid_components=8",
        "matcher.head_warmup={}",
    )
    problem = load(path, small).start_problem("captioner")
    assert problem is not None and "a captioner without pretraining has none" in problem
    assert load(path, (*small, "captioner.init=x")).start_problem("captioner") is None
    assert load(path, small).start_problem("matcher") is None
