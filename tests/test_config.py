"""The config: overrides by type, messages that help, and every check of every section."""

import dataclasses
import json

import pytest

from configs import load_preset, preset_names, tiny
from dsv3_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainConfig,
    YarnConfig,
)
from dsv3_jax.config_cli import RENAMED, differences, from_dict, override, to_dict, with_new_names
from dsv3_jax.errors import did_you_mean
from dsv3_jax.mesh_checks import check_mesh
from sharding.mesh import parse_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switches:
    """The config has no bool field today; the parser takes them all the same."""

    loud: bool = False
    limit: int | None = 3


def field_of(config, path: str):
    for key in path.split("."):
        config = getattr(config, key)
    return config


@pytest.mark.parametrize(
    "path, text, value",
    [
        ("train.steps", "7", 7),
        ("train.steps", "1e9", 1_000_000_000),
        ("train.steps", "10_000", 10_000),
        ("train.seed", "-3", -3),
        ("optimizer.constant_tokens", "1e9", 1e9),
        ("optimizer.peak_lr", "1", 1.0),
        ("optimizer.peak_lr", " 2.5e-4 ", 2.5e-4),
        ("data.source", "/books/*.txt", "/books/*.txt"),
        ("data.source", "a=b", "a=b"),
        ("data.tokenizer", "None", "None"),
        ("name", "1e9", "1e9"),
        ("model.attention.q_rank", "None", None),
        ("model.attention.q_rank", "48", 48),
        ("model.attention.yarn", "None", None),
    ],
)
def test_override(path, text, value):
    config = tiny.get_config()
    got = field_of(override(config, f"{path}={text}"), path)
    assert got == value and type(got) is type(value)
    assert config == tiny.get_config()


@pytest.mark.parametrize("text, value", [("True", True), ("False", False)])
def test_override_bool(text, value):
    assert override(Switches(), f"loud={text}").loud is value


def test_override_leaves_the_rest():
    changed = override(tiny.get_config(), "model.moe.top_k=3")
    assert differences(changed, to_dict(tiny.get_config())) == ["model.moe.top_k: 4 -> 3"]


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("optimizer.peek_lr=1", "did you mean 'peak_lr'"),
        ("optimiser.peak_lr=1", "did you mean 'optimizer'"),
        ("train.batches=1", "did you mean"),
        ("model.zzz=1", "known: attention, dense_hidden"),
        ("train.steps.x=1", "'steps' is 150 and has no fields"),
        ("model.attention.yarn.factor=4", "'yarn' is None and has no fields"),
        ("=1", "unknown config key"),
    ],
)
def test_unknown_key(assignment, message):
    with pytest.raises(KeyError) as error:
        override(tiny.get_config(), assignment)
    assert message in error.value.args[0]


@pytest.mark.parametrize(
    "assignment",
    [
        "train.steps",
        "train.steps=",
        "train.steps=many",
        "train.steps=1.5",
        "train.steps=True",
        "train.steps=None",
        "train.steps=[1]",
        "train.steps=__import__('os')",
        "optimizer.peak_lr=fast",
        "optimizer.peak_lr=True",
        "model.moe=None_",
        "model.attention=3",
        "model.attention.q_rank=1.5",
    ],
)
def test_bad_value(assignment):
    with pytest.raises(ValueError) as error:
        override(tiny.get_config(), assignment)
    assert assignment in str(error.value)


@pytest.mark.parametrize("text", ["1", "yes", "None", "0.0"])
def test_bad_bool(text):
    with pytest.raises(ValueError, match="expected bool"):
        override(Switches(), f"loud={text}")


def test_override_is_checked():
    with pytest.raises(ValueError, match=r"moe.top_k=9 exceeds the 8 experts"):
        override(tiny.get_config(), "model.moe.top_k=9")


def test_settings_are_checked_together():
    both = ("model.moe.top_k=16", "model.moe.topk_groups=8")
    assert override(tiny.get_config(), *both).model.moe.top_k == 16
    with pytest.raises(ValueError, match=r"moe.top_k=16 exceeds"):
        override(tiny.get_config(), *both[:1])


ATTENTION = dict(n_heads=3, q_rank=None, kv_rank=5, nope_dim=7, rope_dim=2, value_dim=4)
MOE = dict(n_experts=12, n_shared=1, hidden=5, top_k=2, n_groups=4, topk_groups=2)
MODEL = dict(
    vocab_size=11,
    width=6,
    n_layers=3,
    n_dense=1,
    dense_hidden=9,
    attention=AttentionConfig(**ATTENTION),
    moe=MoEConfig(**MOE),
)


@pytest.mark.parametrize(
    "kind, good, bad, message",
    [
        (YarnConfig, dict(factor=4.0, original_length=64), dict(factor=0.0), "yarn.factor=0.0"),
        (
            YarnConfig,
            dict(factor=4.0, original_length=64),
            dict(original_length=-1),
            "yarn.original_length=-1 must be positive",
        ),
        *(
            (AttentionConfig, ATTENTION, {name: 0}, f"attention.{name}=0 must be positive")
            for name in ("n_heads", "kv_rank", "nope_dim", "rope_dim", "value_dim")
        ),
        (AttentionConfig, ATTENTION, dict(rope_dim=5), "attention.rope_dim=5 must be even"),
        *(
            (MoEConfig, MOE, {name: 0}, f"moe.{name}=0 must be positive")
            for name in ("n_experts", "hidden", "top_k", "n_groups", "topk_groups")
        ),
        (MoEConfig, MOE, dict(n_shared=-1), "moe.n_shared=-1 must not be negative"),
        (MoEConfig, MOE, dict(n_groups=5), "n_experts=12 must be a multiple of moe.n_groups=5"),
        (MoEConfig, MOE, dict(topk_groups=5), "topk_groups=5 exceeds moe.n_groups=4"),
        (MoEConfig, MOE, dict(top_k=7), "top_k=7 exceeds the 6 experts that moe.topk_groups=2"),
        *(
            (ModelConfig, MODEL, {name: 0}, f"model.{name}=0 must be positive")
            for name in ("vocab_size", "width", "n_layers", "dense_hidden", "init_std")
        ),
        (ModelConfig, MODEL, dict(n_dense=4), "model.n_dense=4 must be in 0..3"),
        (ModelConfig, MODEL, dict(n_dense=-1), "model.n_dense=-1 must be in 0..3"),
        (ModelConfig, MODEL, dict(moe=None), "model.moe is None, so model.n_dense=1 must equal"),
        (ModelConfig, MODEL, dict(moe=None, n_dense=3), "model.mtp_depth=1 must be 0"),
        (ModelConfig, MODEL, dict(mtp_depth=-1), "model.mtp_depth=-1 must not be negative"),
        *((DataConfig, {}, dict(held_out=x), f"data.held_out={x}") for x in (0.0, 1.0, -0.5)),
        *(
            (OptimizerConfig, {}, {name: 0.0}, f"optimizer.{name}=0.0 must be positive")
            for name in ("peak_lr", "clip", "eps", "decay_tokens")
        ),
        *(
            (PrecisionConfig, {}, {name: "float16"}, f"precision.{name}='float16' must be")
            for name in ("compute", "master", "moments")
        ),
        (ParallelConfig, {}, dict(zero=2), "parallel.zero=2 must be 1 or 3"),
        (ParallelConfig, {}, dict(remat="some"), "parallel.remat='some' must be 'report'"),
        (
            ParallelConfig,
            {},
            dict(capacity_factor=0.5),
            "parallel.capacity_factor=0.5 must be at least 1",
        ),
        *(
            (
                TrainConfig,
                dict(batch=2, seq_len=8, steps=3),
                {name: 0},
                f"train.{name}=0 must be positive",
            )
            for name in ("batch", "seq_len", "steps", "eval_every", "eval_batches")
        ),
        *(
            (CheckpointConfig, {}, {name: 0}, f"checkpoint.{name}=0 must be positive")
            for name in ("every", "keep")
        ),
    ],
)
def test_checks(kind, good, bad, message):
    kind(**good)
    with pytest.raises(ValueError) as error:
        kind(**good | bad)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "mesh, change, message",
    [
        ("dp3,ep8", "name=x", "train.batch=32 sequences cannot be divided over dp * ep=24"),
        ("ep32", "name=x", "model.moe.n_experts=16 cannot be divided over ep=32"),
        ("ep8", "model.vocab_size=2044", "model.vocab_size=2044 cannot be divided over ep=8"),
        ("ep8", "model.width=124", "model.width=124 cannot be divided over ep=8"),
        ("ep16x2", "name=x", "model.moe.n_groups=8 cannot be divided over nodes=16"),
    ],
)
def test_check_mesh(mesh, change, message):
    check_mesh(tiny.get_config(), parse_mesh("dp4,ep8"))
    with pytest.raises(ValueError) as error:
        check_mesh(override(tiny.get_config(), change), parse_mesh(mesh))
    assert message in str(error.value) and "nearest that work" in str(error.value)


def test_differences():
    config = tiny.get_config()
    saved = json.loads(json.dumps(to_dict(config)))
    assert differences(config, saved) == []
    saved["train"]["seed"] = 5
    saved["model"]["attention"]["q_rank"] = None
    saved["losses"]["ancient"] = 1
    del saved["data"]["tokenizer"]
    assert differences(config, saved) == [
        "data.tokenizer: None -> 'bpe'",
        "losses.ancient: 1 -> None",
        "model.attention.q_rank: None -> 64",
        "train.seed: 5 -> 0",
    ]


def test_differences_of_a_whole_section():
    yarn = YarnConfig(factor=4.0, original_length=64)
    config = tiny.get_config()
    attention = dataclasses.replace(config.model.attention, yarn=yarn)
    longer = dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention=attention)
    )
    lines = differences(longer, to_dict(config))
    assert "model.attention.yarn.factor: None -> 4.0" in lines
    assert differences(config, to_dict(longer))


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_old_name_of_a_field_tells_the_new_one(old, new):
    field_of(tiny.get_config(), new)
    with pytest.raises(KeyError) as error:
        override(tiny.get_config(), f"{old}=2")
    assert error.value.args[0] == f"{old} is now {new}"


def test_config_of_an_older_version_is_read():
    config = tiny.get_config()
    saved = json.loads(json.dumps(to_dict(config)))
    for old, new in RENAMED.items():
        *path, name = new.split(".")
        section = saved
        for key in path:
            section = section[key]
        section[old.rpartition(".")[2]] = section.pop(name)
    older = json.loads(json.dumps(saved))
    assert "pieces" in older["parallel"] and "n_groups_kept" in older["model"]["moe"]
    assert differences(config, saved) == []
    assert from_dict(Config, with_new_names(saved)) == config
    assert saved == older


def test_older_config_without_experts_is_read():
    values = {"model": {"moe": None}, "parallel": {"capacity": 2.0}}
    assert with_new_names(values) == {"model": {"moe": None}, "parallel": {"capacity_factor": 2.0}}


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LossConfig().bias_update_speed = 0.0


@pytest.mark.parametrize("name", preset_names())
def test_presets_load(name):
    config = load_preset(name)
    assert isinstance(config, Config) and config.name == name


@pytest.mark.parametrize(
    "name, message",
    [
        ("dsv3_671", "did you mean 'dsv3_671b'"),
        ("tinny", "did you mean 'tiny'"),
        ("qqqqqq", "known: dsv3_16b, dsv3_671b"),
        ("__init__", "unknown config"),
    ],
)
def test_unknown_preset(name, message):
    with pytest.raises(KeyError) as error:
        load_preset(name)
    assert message in error.value.args[0]


def test_nearest_lists_what_is_there():
    assert did_you_mean("xyz", ["beta", "alpha"]) == "known: alpha, beta"
