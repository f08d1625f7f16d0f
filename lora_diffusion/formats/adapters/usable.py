"""What no file may hold, whatever its dialect."""

from lora_diffusion.adapters.adapter import Adapter, named_tensors
from lora_diffusion.errors import AdapterFormatError


def refuse_unusable(adapter: Adapter, source: str) -> None:
    """Raise AdapterFormatError for an adapter that holds nothing, or NaN or infinity."""
    count = sum(1 for _ in named_tensors(adapter))
    if not count:
        raise AdapterFormatError(f"{source}: an adapter without layers; expected at least one pair of factors")
    broken = adapter.non_finite
    if broken:
        raise AdapterFormatError(
            f"{source}: {len(broken)} of {count} tensors hold NaN or infinity (first: {broken[0]}); "
            "the training that made it broke down, use an earlier file"
        )
