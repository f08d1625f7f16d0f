"""File names that users choose."""

import pytest

from lora_diffusion.errors import ConfigError
from lora_diffusion_studio.backend.config import check_file_name


@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/b", "", " ", ".hidden", "a" * 61, "nul\0", "c:\\x"])
def test_names_that_are_not_file_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a valid name|the name is empty"):
        check_file_name(name)
    assert check_file_name(" My blend (2) ") == "My blend (2)"
