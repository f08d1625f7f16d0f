"""Whether adapters go together, and whether they fit a base."""

import math
from collections.abc import Mapping

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend
from lora_diffusion.architectures.families import family_title
from lora_diffusion.config.preset import Composition
from lora_diffusion.errors import ConfigError, FamilyMismatchError


def validate_composition(composition: Composition, count: int, *, regions: bool) -> None:
    """Raise ConfigError for a mode in which that many adapters, some with regions, cannot come together."""
    mode = composition.mode
    if mode == "k-lora" and count != 2:
        raise ConfigError(f"k-lora chooses between two adapters, the subject first; this blend has {count}")
    if mode == "np-lora" and count < 2:
        raise ConfigError(f"np-lora needs a subject and, after it, at least one style; this blend has {count}")
    if mode != "sum" and regions:
        raise ConfigError(f"regions are blended by their masks, so that {mode} has no meaning with them; use sum")


def check_fits(
    blend: Blend, *, base_name: str, family: str, paths: frozenset[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise FamilyMismatchError unless everything in every adapter finds a tensor of its shape in the base.

    `paths` are the module paths of the base's family, `shapes` the parameters (`<module path>.weight` or `.bias`) that
    the blend would change.
    """
    for entry in blend.entries:
        adapter = entry.adapter
        check_family(adapter.metadata.family, entry.name, base_name=base_name, family=family)
        wanted = expected_shapes(adapter)
        unknown = [name for name in wanted if name.rpartition(".")[0] not in paths or name not in shapes]
        if unknown:
            raise FamilyMismatchError(
                f"{entry.name}: {len(unknown)} of {len(wanted)} layers match no module of {base_name} "
                f"({family_title(family)}; first: {unknown[0]}); use the base that it was trained on"
            )
        for name, shape in wanted.items():
            if not is_same_weight(shape, shapes[name]):
                raise FamilyMismatchError(
                    f"{entry.name}: {name} is for a weight of shape {shape}, but {base_name} has {shapes[name]} there; "
                    "use the base that it was trained on"
                )


def check_family(own: str, name: str, *, base_name: str, family: str) -> None:
    """Raise FamilyMismatchError if an adapter's family is known and not the base's."""
    if own and own != family:
        raise FamilyMismatchError(
            f"{name} is an adapter for {family_title(own)}, but {base_name} is {family_title(family)}; "
            "use a base of its family"
        )


def expected_shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The parameters that an adapter changes, `<module path>.weight` and `.bias`, with the shapes it expects."""
    weights = {f"{path}.weight": layer.weight_shape for path, layer in adapter.layers.items()}
    return weights | {f"{path}.bias": tuple(bias.shape) for path, bias in adapter.biases.items()}


def is_same_weight(layer: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a layer's delta is that of the weight, be it with the kernel flattened or a 1x1 kernel left out."""
    return layer == weight or (layer[:1] == weight[:1] and math.prod(layer) == math.prod(weight) and len(weight) > 1)
