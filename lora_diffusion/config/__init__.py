"""Settings classes (pydantic), from which flags, file formats, help texts and validation derive."""
