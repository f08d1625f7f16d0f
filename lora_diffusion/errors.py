"""What can go wrong, as a tree of exceptions that a caller can catch.

    LoRADiffusionError
    ├── ConfigError            a setting, a command-line value or a recipe that cannot be used
    ├── AdapterFormatError     a file that is no adapter, or one that is not understood in full
    ├── FamilyMismatchError    an adapter and a base that do not belong together
    ├── BaseModelError         a base that cannot be found, or is not Stable Diffusion
    ├── DatasetError           pictures or captions that cannot be trained on
    ├── TrainingError          a run that must not go on
    ├── SamplingError          a picture that came to nothing
    └── OutputError            a path that cannot be written

Every message says what is wrong, where, what was expected and what to do.
"""


class LoRADiffusionError(Exception):
    """Anything this library refuses to do, with one sentence that says why."""


class ConfigError(LoRADiffusionError, ValueError):
    """A setting, a command-line value or a recipe that cannot be used."""


class AdapterFormatError(LoRADiffusionError, ValueError):
    """A file that is no adapter, or one that is not understood in full."""


class FamilyMismatchError(LoRADiffusionError, ValueError):
    """An adapter and a base that do not belong together."""


class BaseModelError(LoRADiffusionError, ValueError):
    """A base that cannot be found, or is not Stable Diffusion."""


class DatasetError(LoRADiffusionError, ValueError):
    """Pictures or captions that cannot be trained on."""


class TrainingError(LoRADiffusionError, RuntimeError):
    """A run that must not go on, such as one whose loss is no longer a number."""


class SamplingError(LoRADiffusionError, RuntimeError):
    """A picture that came to nothing."""


class OutputError(LoRADiffusionError, OSError):
    """A path that cannot be written."""
