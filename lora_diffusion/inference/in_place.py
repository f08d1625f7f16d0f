"""Apply blends to the weights of a loaded base model and restore the original weights bit for bit.

    W' = W + sum over adapters of coefficient * delta

Blended weights are always computed from a backup of the original weights W, never from the current ones. The result
therefore depends on the base and the blend only, not on earlier blends, and the original weights can be restored
exactly. Changing from one blend to another writes only the parameters whose terms differ.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, BlendSum, blend_sum, terms_equal
from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.adapters.compatibility import check_fits, expected_shapes
from lora_diffusion.adapters.deltas import cast_checked, check_range, compute_blended_bias, compute_blended_weight
from lora_diffusion.adapters.factor_stack import StackedFactors, split_stackable, stack_factors
from lora_diffusion.adapters.layers import Layer
from lora_diffusion.algebra.metrics.norms import frobenius_norm
from lora_diffusion.algebra.metrics.rounding_error import rounding_error
from lora_diffusion.architectures.module_paths import changeable_paths
from lora_diffusion.errors import AdapterFormatError, ConfigError
from lora_diffusion.formats.checkpoints.diffusers import find_parameters
from lora_diffusion.formats.safetensors import map_safetensors
from lora_diffusion.inference.open_patches import exclusive_patch
from lora_diffusion.models.load import Base, module_at

Backup = Literal["memory", "file"]
"""Where the original values of changed parameters come from: copies in memory, or the files of the base."""
_Terms = tuple[tuple[float, object], ...]


def weight_at(base: Base, path: str) -> Tensor:
    """Return the current weight of a module, without a copy.

    Raises:
        KeyError: If the base has no such weight.
    """
    return parameter_at(base, f"{path}.weight")


def parameter_at(base: Base, name: str) -> Tensor:
    """Return the current tensor of a parameter, without a copy.

    Args:
        base: Base model.
        name: `<module path>.weight` or `<module path>.bias`.

    Raises:
        KeyError: If the base has no such parameter.
    """
    path, _, leaf = name.rpartition(".")
    tensor = getattr(module_at(base, path), leaf, None)
    if not isinstance(tensor, Tensor):
        raise KeyError(name)
    return tensor.data


def live_shapes(base: Base, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the named parameters that the base has; for quantized weights, those before quantization."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        with suppress(KeyError):
            tensor = parameter_at(base, name)
            shapes[name] = weight_shape(module_at(base, path)) if leaf == "weight" else tuple(tensor.shape)
    return shapes


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a module's weight; for a quantized linear layer, the shape before quantization."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape)


def is_quantized(base: Base) -> bool:
    """Return whether any component has quantized linear layers, to whose weights no delta can be added."""
    linear = (module for model in base.adaptable_models for module in model.modules() if isinstance(module, nn.Linear))
    return any(not module.weight.dtype.is_floating_point for module in linear)


def validate_blend(base: Base, blend: Blend, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
    """Check that a blend can be applied to a base.

    Args:
        base: Base model.
        blend: Blend to check.
        shapes: See `check_base_fits`.

    Raises:
        AdapterFormatError: If a tensor of an adapter contains NaN or infinity.
        FamilyMismatchError: If a layer matches no module of the base, or one of another shape.
    """
    for entry in blend.entries:
        non_finite = entry.adapter.non_finite
        if non_finite:
            raise AdapterFormatError(
                f"{entry.name}: {non_finite[0]} contains NaN or infinity; remove the adapter from the blend"
            )
    check_base_fits(base, blend, shapes)


def check_base_fits(base: Base, blend: Blend, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
    """Check that every layer of every adapter matches a weight of the same shape in the base.

    Args:
        base: Base model.
        blend: Blend to check.
        shapes: Shapes of parameters of the base that are known from earlier checks; new ones are added.

    Raises:
        FamilyMismatchError: If a layer matches no module of the base, or one of another shape.
    """
    paths = frozenset(changeable_paths(base.layout))
    names = {name for entry in blend.entries for name in expected_shapes(entry.adapter)}
    shapes = {} if shapes is None else shapes
    shapes.update(live_shapes(base, (name for name in names - shapes.keys() if name.rpartition(".")[0] in paths)))
    check_fits(blend, base_name=base.name, family=base.family.name, paths=paths, shapes=shapes)


class WeightPatch:
    """Applies blends, one after another, to the weights of a base; opened and undone by `weight_patch`.

    To make changes of the blend fast, it keeps the original values of all parameters changed so far (through the
    backup), the terms that each parameter contains at present, and the stacked factors of the current blend.
    """

    def __init__(self, base: Base, original: Callable[[str, Tensor], Tensor]) -> None:
        """Create a patch that has not changed any weight.

        Args:
            base: Base model to change.
            original: Returns the original value of a parameter, given its name and its current tensor; see
                `memory_backup`.
        """
        self.base = base
        self.original = original
        self.applied: dict[str, _Terms] = {}
        """Terms in each changed parameter, by parameter name; empty if writing was interrupted."""
        self.live: dict[str, Tensor] = {}
        """Current tensors of the parameters accessed so far, by parameter name."""
        self.stacks: dict[str, tuple[tuple[Layer, ...], StackedFactors]] = {}
        """Stacked factors of the current blend and the layers they belong to, by module path."""
        self._validated: frozenset[Adapter] = frozenset()
        """Adapters of the current blend, which fit the base."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        """Shapes of the parameters that blends were validated against so far, by parameter name."""

    def apply(self, blend: Blend, denoising_step: DenoisingStep | None = None) -> None:
        """Replace the current blend.

        Args:
            blend: Blend to apply; an empty one restores the original weights.
            denoising_step: Step to evaluate the blend at, required if it has a schedule.

        Raises:
            FamilyMismatchError: If an adapter does not fit the base. The weights are unchanged.
            AdapterFormatError: If an adapter contains NaN or infinity. The weights are unchanged.
            ConfigError: If the blend needs regions or a step that is not given; the weights are unchanged. Or if a
                blended weight exceeds the range of the base's type; the original weights are restored.
        """
        self._validate(blend)
        self.write(blend_sum(blend, self.base.layout, denoising_step))

    def _validate(self, blend: Blend) -> None:
        new = tuple(entry for entry in blend.entries if entry.adapter not in self._validated)
        if new:
            validate_blend(self.base, Blend(entries=new), self._shapes)
        self._validated = frozenset(entry.adapter for entry in blend.entries)

    def write(self, deltas: BlendSum) -> None:
        """Set the weights to the original weights plus `deltas`, without validating the adapters.

        Only the parameters whose terms changed are written.

        Raises:
            ConfigError: If a blended weight exceeds the range of the base's type; the original weights are restored.
        """
        try:
            with full_precision(self.base):
                for name in [name for name in self.applied if not _has_parameter(deltas, name)]:
                    self.restore(name)
                for path, terms in deltas.layers.items():
                    self.write_weight(path, terms)
                for path, biases in deltas.biases.items():
                    self._write_bias(path, biases)
        except BaseException:
            self.undo()
            raise
        self.stacks = {path: stack for path, stack in self.stacks.items() if path in deltas.layers}

    def write_weight(self, path: str, terms: tuple[tuple[float, Layer], ...]) -> None:
        """Set the weight of a module to the original weight plus the deltas of weighted layers."""
        name = f"{path}.weight"
        if terms_equal(self.applied.get(name), terms):
            return
        live = self._live_tensor(name)
        original = self.original(name, live)
        self.applied[name] = ()
        in_place = live.dtype == torch.float32 and live.is_contiguous()
        stack = self._stacked_factors(path, terms, live)
        value = compute_blended_weight(original, terms, stack=stack, out=live if in_place else None)
        if not in_place:
            check_range(value, live.dtype, name)
            live.copy_(value)
        self.applied[name] = terms

    def _write_bias(self, path: str, terms: tuple[tuple[float, Tensor], ...]) -> None:
        name = f"{path}.bias"
        if terms_equal(self.applied.get(name), terms):
            return
        live = self._live_tensor(name)
        value = compute_blended_bias(self.original(name, live), terms)
        check_range(value, live.dtype, name)
        self.applied[name] = ()
        live.copy_(value)
        self.applied[name] = terms

    def _stacked_factors(
        self, path: str, terms: tuple[tuple[float, Layer], ...], live: Tensor
    ) -> StackedFactors | None:
        """Stack the factors of a module's LoRA layers, or reuse those of the last blend if the layers are the same."""
        layers = tuple(layer for _, layer in split_stackable(terms)[0])
        if not layers:
            return None
        cached = self.stacks.get(path)
        if cached is None or cached[0] != layers:
            cached = self.stacks[path] = (layers, stack_factors(layers, live.device))
        return cached[1]

    def _live_tensor(self, name: str) -> Tensor:
        if name not in self.live:
            self.live[name] = parameter_at(self.base, name)
        return self.live[name]

    def restore(self, name: str) -> None:
        """Copy the original value of a parameter back into the base."""
        live = self._live_tensor(name)
        live.copy_(self.original(name, live))
        del self.applied[name]

    def undo(self) -> None:
        """Restore all parameters; a KeyboardInterrupt during the restoration is raised after it is complete."""
        interrupted: BaseException | None = None
        while self.applied:
            try:
                with torch.no_grad():
                    for name in tuple(self.applied):
                        self.restore(name)
            except KeyboardInterrupt as error:
                interrupted = error
        self.stacks.clear()
        if interrupted:
            raise interrupted


def _has_parameter(deltas: BlendSum, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return path in (deltas.layers if leaf == "weight" else deltas.biases)


@contextmanager
def full_precision(base: Base) -> Generator[None]:
    """Disable gradients and autocast, which would compute float32 deltas in half precision."""
    with torch.no_grad(), torch.autocast(base.device.type, enabled=False):
        yield


def blend_rounding_error(base: Base, deltas: BlendSum) -> float:
    """Return the rounding error of blended weights in the base's type, relative to the blend's delta.

    In bfloat16, whose spacing can exceed a small delta, half of the change made by an adapter of low weight can be
    lost.

    Args:
        base: Base model with its original weights.
        deltas: Sum of deltas.

    Returns:
        The rounding error; 0 without deltas.
    """
    errors: list[float] = []
    norms: list[float] = []

    def add(name: str, original: Tensor, exact: Tensor) -> None:
        errors.append(frobenius_norm(cast_checked(exact, original.dtype, name).float() - exact))
        norms.append(frobenius_norm(exact - original.float()))

    with full_precision(base):
        for path, terms in deltas.layers.items():
            original = weight_at(base, path)
            add(f"{path}.weight", original, compute_blended_weight(original, terms))
        for path, biases in deltas.biases.items():
            original = parameter_at(base, f"{path}.bias")
            add(f"{path}.bias", original, compute_blended_bias(original, biases))
    return rounding_error(errors, norms)


def memory_backup() -> Callable[[str, Tensor], Tensor]:
    """Create a backup that copies each parameter in memory when it is first requested.

    Returns:
        A function that returns the original value of a parameter, given its name and its current tensor.
    """
    copies: dict[str, Tensor] = {}

    def get_original(name: str, live: Tensor) -> Tensor:
        if name not in copies:
            copies[name] = live.clone()
        return copies[name]

    return get_original


def _file_backup(base: Base) -> Callable[[str, Tensor], Tensor]:
    """Create a backup that reads original values from the memory-mapped files of the base.

    The returned function raises ConfigError if a parameter differs from the file when it is first requested: the
    weights have then been changed after loading, and the files cannot restore them.
    """
    paths = changeable_paths(base.layout)
    locations = find_parameters(base.folder, (f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")))
    files = {file: map_safetensors(file) for file in {location.file for location in locations.values()}}
    compared: set[str] = set()

    def get_original(name: str, live: Tensor) -> Tensor:
        location = locations[name]
        value = files[location.file][location.key].reshape(live.shape).to(live.device, live.dtype)
        if name not in compared and not torch.equal(value, live):
            raise ConfigError(
                f"{name}: differs from the value in {base.folder}, so it could not be restored from there; "
                "keep the backup in memory instead"
            )
        compared.add(name)
        return value

    return get_original


@contextmanager
def weight_patch(base: Base, *, backup: Backup = "memory") -> Generator[WeightPatch]:
    """Open a patch that applies blends to the weights; the original weights are restored when the context exits.

    Args:
        base: Base model.
        backup: Where the original values come from: `memory` copies each parameter that is changed, `file` reads them
            from the files of the base and needs no memory.

    Raises:
        ConfigError: If a weight patch is open on this base already, whose blended weights would be taken for the
            original ones, or if the base is quantized.
    """
    conflict = (
        f"{base.name}: a blend is applied to the weights of this base already; close that weight patch first, or load "
        "the base a second time"
    )
    with exclusive_patch(base, "weights", conflict):
        if is_quantized(base):
            raise ConfigError(
                f"{base.name}: deltas cannot be added to quantized weights; use `parallel_patch` or --parallel"
            )
        patch = WeightPatch(base, memory_backup() if backup == "memory" else _file_backup(base))
        try:
            yield patch
        finally:
            patch.undo()


@contextmanager
def blended_weights(
    base: Base, blend: Blend, denoising_step: DenoisingStep | None = None, *, backup: Backup = "memory"
) -> Generator[WeightPatch]:
    """Apply a blend to the weights; the original weights are restored when the context exits.

    Textual-inversion embeddings of the adapters are not applied; `models.textual_inversion.learned_tokens` does that.

    Args:
        base: Base model.
        blend: Blend to apply.
        denoising_step: Step to evaluate the blend at, required if it has a schedule.
        backup: Where the original values come from; see `weight_patch`.

    Raises:
        FamilyMismatchError: If an adapter does not fit the base.
        AdapterFormatError: If an adapter contains NaN or infinity.
        ConfigError: If the base cannot be patched, the blend needs regions or a step that is not given, or a blended
            weight exceeds the range of the base's type.
    """
    with weight_patch(base, backup=backup) as patch:
        patch.apply(blend, denoising_step)
        yield patch
