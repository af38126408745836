"""What the environment may say, and how it is misread."""

import pytest
from pydantic import ValidationError

from scail.quality import Limit, QualityLimits
from tasks.settings import Settings


def test_the_limits_of_quality_are_those_of_the_code_unless_the_environment_differs(monkeypatch):
    assert Settings().quality.limits() == QualityLimits()

    monkeypatch.setenv("SCAIL_QUALITY_FLICKER", "1, 2.5")

    assert Settings().quality.limits() == QualityLimits()._replace(flicker=Limit(1.0, 2.5))


@pytest.mark.parametrize("value", ["3", "3,4,5", "a,b", ""])
def test_a_limit_that_is_not_two_numbers_is_refused_before_anything_runs(monkeypatch, value):
    monkeypatch.setenv("SCAIL_QUALITY_FLICKER", value)

    with pytest.raises(ValidationError, match="flicker"):
        Settings()
