"""Fixtures for tests of patches."""

from collections.abc import Iterator

import pytest
from torch import Tensor

from lora_diffusion.models.load import Base
from tests.helpers.blends import parameters, same


@pytest.fixture
def before(sd: Base) -> Iterator[dict[str, Tensor]]:
    """Yield the base's parameters, and check afterwards that none of them has changed."""
    original = parameters(sd)
    yield original
    assert same(original, parameters(sd))
