"""Check that adapters can be combined with each other and applied to a base model."""

import math
from collections.abc import Mapping

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend
from lora_diffusion.architectures.families import family_title
from lora_diffusion.config.preset import Composition
from lora_diffusion.errors import ConfigError, FamilyMismatchError


def validate_composition(composition: Composition, count: int, *, regions: bool) -> None:
    """Check that a composition mode supports the adapters of a blend.

    Args:
        composition: Mode and its settings.
        count: Number of adapters in the blend.
        regions: Whether any adapter is limited to a region of the image.

    Raises:
        ConfigError: If it does not.
    """
    mode = composition.mode
    if mode == "k-lora" and count != 2:
        raise ConfigError(f"k-lora needs exactly two adapters, the subject first; this blend has {count}")
    if mode == "np-lora" and count < 2:
        raise ConfigError(f"np-lora needs a subject followed by at least one style; this blend has {count}")
    if mode != "sum" and regions:
        raise ConfigError(f"the composition mode {mode} does not support regions; use sum")


def check_fits(
    blend: Blend, *, base_name: str, family: str, paths: frozenset[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that every layer and bias of a blend has a parameter of its shape in the base model.

    Args:
        blend: Blend to apply.
        base_name: Name of the base model for messages.
        family: Model family of the base.
        paths: Module paths of the base's family.
        shapes: Shapes of the base's parameters, by name (`<module path>.weight` or `<module path>.bias`).

    Raises:
        FamilyMismatchError: If an adapter belongs to another family, or a parameter is missing or has another shape.
    """
    for entry in blend.entries:
        adapter = entry.adapter
        check_family(adapter.metadata.family, entry.name, base_name=base_name, family=family)
        expected = expected_shapes(adapter)
        unknown = [name for name in expected if name.rpartition(".")[0] not in paths or name not in shapes]
        if unknown:
            raise FamilyMismatchError(
                f"{entry.name}: {len(unknown)} of {len(expected)} layers match no module of {base_name} "
                f"({family_title(family)}; first: {unknown[0]}); use the base that the adapter was trained on"
            )
        for name, shape in expected.items():
            if not is_same_weight(shape, shapes[name]):
                raise FamilyMismatchError(
                    f"{entry.name}: {name} has shape {shape}, but {shapes[name]} in {base_name}; "
                    "use the base that the adapter was trained on"
                )


def check_family(adapter_family: str, name: str, *, base_name: str, family: str) -> None:
    """Check that an adapter belongs to the model family of a base.

    Args:
        adapter_family: Family of the adapter; empty if unknown, which is accepted.
        name: Name of the adapter for messages.
        base_name: Name of the base for messages.
        family: Family of the base.

    Raises:
        FamilyMismatchError: If the families differ.
    """
    if adapter_family and adapter_family != family:
        raise FamilyMismatchError(
            f"{name} is an adapter for {family_title(adapter_family)}, but {base_name} is {family_title(family)}; "
            "use a base of the same family"
        )


def expected_shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that an adapter changes, by name: `<module path>.weight` or `.bias`."""
    weights = {f"{path}.weight": layer.weight_shape for path, layer in adapter.layers.items()}
    return weights | {f"{path}.bias": tuple(bias.shape) for path, bias in adapter.biases.items()}


def is_same_weight(layer: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Return whether a layer of one shape can update a weight of another.

    The shapes may differ in a flattened convolution kernel or an omitted 1x1 kernel.

    Args:
        layer: `weight_shape` of the layer.
        weight: Shape of the weight.
    """
    return layer == weight or (layer[:1] == weight[:1] and math.prod(layer) == math.prod(weight) and len(weight) > 1)
