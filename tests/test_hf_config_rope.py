"""config.json's rotary embedding: two spellings, YaRN's defaults, and what is refused."""

import dataclasses

import pytest
from reference.official_config import CONFIG, FIELDS, PLAIN, read, with_yarn, without

from dsv3_jax.weights.hf_config import model_config

ROPE_5 = {"rope_theta": 50_000.0, "rope_type": "yarn"} | FIELDS["rope_scaling"]


def in_rope(**changes) -> dict:
    return {"rope_scaling": FIELDS["rope_scaling"] | changes}


@pytest.mark.parametrize("empty", [None, {}, {"type": "default"}, {"rope_type": "default"}])
def test_plain_rope(empty):
    want = dataclasses.replace(CONFIG, attention=PLAIN)
    assert read(rope_scaling=empty) == want
    fields = without("rope_theta", "rope_scaling")
    new = fields | {"rope_parameters": {"rope_theta": 50_000, **(empty or {})}}
    assert model_config(new, "x") == want


def test_spelling_of_transformers_5():
    fields = without("rope_theta", "rope_scaling")
    assert model_config(fields | {"rope_parameters": ROPE_5}, "x") == CONFIG
    # As 5.23 saves what it read in the released spelling, and with both spellings side by side.
    both_types = ROPE_5 | {"type": "yarn", "rope_type": "yarn"}
    assert model_config(fields | {"rope_parameters": both_types}, "x") == CONFIG
    assert read(rope_parameters=ROPE_5) == CONFIG


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rope_theta": 4e4}, r"rope_theta=50000.0 but rope_parameters.rope_theta=40000.0"),
        ({"factor": 41}, r"rope_scaling=.*40.0.* but rope_parameters=.*41.0"),
        ({"rope_type": "default"}, r"rope_parameters: (rope_)?type="),
    ],
)
def test_spellings_must_agree(changes, words):
    with pytest.raises(ValueError, match=rf"x\.json: {words}"):
        read(rope_parameters=ROPE_5 | changes)


def test_plain_beside_yarn_is_refused():
    with pytest.raises(ValueError, match=r"rope_scaling=.* but rope_parameters=None"):
        read(rope_parameters={"rope_type": "default", "rope_theta": 50_000})


@pytest.mark.parametrize("blank", [None, 0])
def test_betas_default_as_in_transformers(blank):
    assert read(**in_rope(beta_fast=blank)) == with_yarn(beta_fast=32.0)
    assert read(**in_rope(beta_slow=blank)) == with_yarn(beta_slow=1.0)
    rope = without("beta_fast", "beta_slow", fields=FIELDS["rope_scaling"])
    assert read(rope_scaling=rope) == with_yarn(beta_fast=32.0, beta_slow=1.0)


def test_original_length_defaults_to_the_longest():
    rope = without("original_max_position_embeddings", fields=FIELDS["rope_scaling"])
    want = with_yarn(original_length=2560)
    assert read(rope_scaling=rope, max_position_embeddings=2560) == want
    with pytest.raises(KeyError, match="rope_scaling: original_max_position_embeddings is missing"):
        read(rope_scaling=rope)
    with pytest.raises(ValueError, match="original_max_position_embeddings='2560' must be"):
        read(rope_scaling=rope, max_position_embeddings="2560")


@pytest.mark.parametrize(
    "mscales",
    [{}, {"mscale": 1}, {"mscale_all_dim": 0}, {"mscale": 1.0, "mscale_all_dim": None}],
)
def test_without_mscales_the_rotation_has_the_temperature(mscales):
    rope = without("mscale", "mscale_all_dim", fields=FIELDS["rope_scaling"])
    want = with_yarn(mscale=1.0, mscale_all_dim=0.0)
    assert read(rope_scaling=rope | mscales) == want


@pytest.mark.parametrize(
    "mscales", [{"mscale": 0.7}, {"mscale_all_dim": 1.0}, {"mscale": 0, "mscale_all_dim": 0}]
)
def test_mscales_with_two_meanings_are_refused(mscales):
    rope = without("mscale", "mscale_all_dim", fields=FIELDS["rope_scaling"])
    with pytest.raises(ValueError, match=r"rope_scaling: mscale=.* and mscale_all_dim=.*"):
        read(rope_scaling=rope | mscales)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"type": "linear"}, "type='linear' must be 'yarn' or 'default'"),
        ({"type": None}, "type=None must be 'yarn' or 'default'"),
        ({"rope_type": "default"}, "type='yarn' must be 'yarn' or 'default'; got"),
        ({"type": "default"}, "of type 'default': field beta_fast=31 is not understood"),
        ({"factor": "40"}, "factor='40' must be a finite number"),
        ({"factor": None}, "factor=None must be a finite number"),
        ({"original_max_position_embeddings": 6.4}, "original_max_position_embeddings=6.4 must be"),
        ({"mscale": "1"}, "mscale='1' must be a finite number"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be a finite number"),
        ({"attention_factor": 1.2}, r"attention_factor=1.2 must be None \("),
        ({"truncate": False}, r"truncate=False must be True \("),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 must be 1.0 \("),
        ({"beta_fats": 32}, "field beta_fats=32 is not understood.*did you mean 'beta_fast'"),
    ],
)
def test_bad_yarn_fields(changes, words):
    with pytest.raises(ValueError, match=rf"x\.json: rope_scaling:? {words}"):
        read(**in_rope(**changes))


def test_missing_yarn_factor():
    rope = without("factor", fields=FIELDS["rope_scaling"])
    with pytest.raises(KeyError, match=r"x\.json: rope_scaling: factor is missing"):
        read(rope_scaling=rope)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters", "quantization_config"])
@pytest.mark.parametrize("bad", ["yarn", [1], 40])
def test_inner_fields_are_objects(name, bad):
    with pytest.raises(ValueError, match=rf"x\.json: {name}: .* must be a JSON object"):
        read(**{name: bad})
