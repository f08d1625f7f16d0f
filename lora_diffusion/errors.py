"""Exceptions that this library raises.

    LoRADiffusionError
    ├── ConfigError            an invalid setting, command-line value, prompt or recipe
    ├── AdapterFormatError     a file that is not a valid adapter, or not fully understood
    ├── FamilyMismatchError    an adapter and a base model that are incompatible
    ├── BaseModelError         a base model that cannot be found or is not Stable Diffusion
    ├── DatasetError           images or captions that cannot be trained on
    ├── TrainingError          a training run that cannot continue
    ├── SamplingError          an image that could not be generated
    └── OutputError            an output path that cannot be written

Every message says what is wrong, where, what was expected and what to do.
"""


class LoRADiffusionError(Exception):
    """Base class of all errors that this library raises on purpose."""


class ConfigError(LoRADiffusionError, ValueError):
    """An invalid setting, command-line value, prompt or recipe."""


class AdapterFormatError(LoRADiffusionError, ValueError):
    """A file that is not a valid adapter, or whose keys are not all understood."""


class FamilyMismatchError(LoRADiffusionError, ValueError):
    """An adapter and a base model that are incompatible: other family, modules or shapes."""


class BaseModelError(LoRADiffusionError, ValueError):
    """A base model that cannot be found or is not Stable Diffusion."""


class DatasetError(LoRADiffusionError, ValueError):
    """Images or captions that cannot be trained on."""


class TrainingError(LoRADiffusionError, RuntimeError):
    """A training run that cannot continue, for example because its loss is NaN."""


class SamplingError(LoRADiffusionError, RuntimeError):
    """An image that could not be generated."""


class OutputError(LoRADiffusionError, OSError):
    """An output path that cannot be written."""
