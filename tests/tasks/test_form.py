"""The form as Prefect's UI gets it: labels, help, choices, and no field that would be drawn as JSON."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from scail.config import PROFILES
from tasks.forecast import full_clip_seconds
from tasks.form import RenderOptions

FIELDS = RenderOptions.model_json_schema()["properties"]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_label_and_help_and_is_drawn_as_one_thing(name):
    field = FIELDS[name]
    drawn = field["items"] if field["type"] == "array" else field

    assert field["title"][0].isupper()
    assert "_" not in field["title"]
    assert len(field["description"]) > 30
    assert drawn["type"] in {"string", "integer", "number", "boolean"}
    assert field["type"] != "array" or drawn["enum"]  # a list to tick, not a text to type
    assert "anyOf" not in field


def test_the_profile_is_a_choice_with_its_expected_time():
    assert FIELDS["profile"]["enum"] == list(PROFILES)
    lines = FIELDS["profile"]["description"].splitlines()
    for name, profile in PROFILES.items():
        minutes = full_clip_seconds(profile) / 60
        [line] = [line for line in lines if line.startswith(f"- {name}: ")]
        assert f"about {minutes:.0f} min a clip" in line or f"about {60 * minutes:.0f} s a clip" in line


def test_statuses_of_rows_that_have_their_clip_cannot_be_chosen():
    assert {"failed", "invalid"} <= set(FIELDS["only_status"]["items"]["enum"])
    assert not {"rendered", "skipped"} & set(FIELDS["only_status"]["items"]["enum"])


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"profile": "fastest"}, "expected one of"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"steps": 4}, "steps"),
    ],
)
def test_what_the_form_does_not_know_is_refused(wrong, expected):
    with pytest.raises(ValidationError, match=expected):
        RenderOptions(**wrong)


def test_the_profile_that_the_operator_set_is_the_default(monkeypatch):
    monkeypatch.setenv("SCAIL_PROFILE", "fast")

    assert RenderOptions().profile == "fast"
