"""Put blends into a loaded base and take them out: in place, exact, reversible.

Every written value is computed from the base's own value, of which a copy is kept, and never from the current one: a
result depends on the base and the blend alone, and undo, which copies, restores the base bit for bit.
Going from one blend to the next touches only the parameters for which they differ.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, BlendSum, blend_sum, terms_equal
from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.adapters.compatibility import check_fits, expected_shapes
from lora_diffusion.adapters.deltas import cast_checked, check_range, compute_blended_bias, compute_blended_weight
from lora_diffusion.adapters.factor_stack import StackedFactors, split_stackable, stack_factors
from lora_diffusion.adapters.layers import Layer
from lora_diffusion.architectures.module_paths import changeable_paths
from lora_diffusion.errors import AdapterFormatError, ConfigError
from lora_diffusion.formats.checkpoints.diffusers import find_parameters
from lora_diffusion.formats.safetensors import map_safetensors
from lora_diffusion.models.load import Base, module_at

PATCHED: WeakSet[Base] = WeakSet()
"""Bases that have a patch open at this denoising_step."""
Backup = Literal["memory", "file"]
Terms = tuple[tuple[float, object], ...]


def weight_at(base: Base, path: str) -> Tensor:
    """The live weight of the module at `path`. Raises KeyError."""
    return parameter_at(base, f"{path}.weight")


def parameter_at(base: Base, name: str) -> Tensor:
    """The live tensor of a parameter, `<module path>.weight` or `.bias`. Raises KeyError if there is none."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(module_at(base, path), leaf, None)
    if not isinstance(tensor, Tensor):
        raise KeyError(name)
    return tensor.data


def live_shapes(base: Base, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of those parameters that the base has, quantized weights as they were before."""
    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        with suppress(KeyError):
            tensor = parameter_at(base, name)
            found[name] = weight_shape(module_at(base, path)) if leaf == "weight" else tuple(tensor.shape)
    return found


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight; of a quantized one, as it was before."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape)


def is_quantized(base: Base) -> bool:
    """Whether weights of any component are quantized, so that nothing can be added to them."""
    models = (getattr(base.pipe, component, None) for component in base.family.components)
    linear = (module for model in models if model for module in model.modules() if isinstance(module, nn.Linear))
    return any(not module.weight.dtype.is_floating_point for module in linear)


def validate_blend(base: Base, blend: Blend) -> None:
    """Raise AdapterFormatError for NaN, and FamilyMismatchError unless everything finds its place. Touches nothing."""
    for entry in blend.entries:
        broken = entry.adapter.non_finite
        if broken:
            raise AdapterFormatError(f"{entry.name}: {broken[0]} holds NaN or infinity; it is not used")
    check_base_fits(base, blend)


def check_base_fits(base: Base, blend: Blend) -> None:
    """Raise FamilyMismatchError unless every layer of every adapter finds a weight of its shape. Touches nothing."""
    paths = frozenset(changeable_paths(base.layout))
    wanted = {name for entry in blend.entries for name in expected_shapes(entry.adapter)}
    shapes = live_shapes(base, (name for name in wanted if name.rpartition(".")[0] in paths))
    check_fits(blend, base_name=base.name, family=base.family.name, paths=paths, shapes=shapes)


class WeightPatch:
    """A base whose weights hold one blend after another; `weight_patch` opens one and undoes it.

    Holds what makes switching cheap: the base's own values of every parameter touched so far (in memory, or mapped from
    its files), which terms each parameter has in it now, and the stacked factors of the blend that is applied.
    """

    def __init__(self, base: Base, original: Callable[[str, Tensor], Tensor]) -> None:
        self.base = base
        self.original = original
        """The base's own value of a parameter, given its name and the live tensor."""
        self.applied: dict[str, Terms] = {}
        """What each changed parameter holds; empty terms if a write was cut off."""
        self.live: dict[str, Tensor] = {}
        self.stacks: dict[str, tuple[tuple[Layer, ...], StackedFactors]] = {}
        self.checked: WeakSet[Adapter] = WeakSet()

    def apply(self, blend: Blend, denoising_step: DenoisingStep | None = None) -> None:
        """Make the weights those of the blend, whatever is in them now; at one denoising step if it has a schedule.

        Raises FamilyMismatchError, ConfigError, and AdapterFormatError for NaN, all before anything is touched; and
        ConfigError, with the base's own values back, if a blended weight is beyond the range of the base's type.
        """
        self.check(blend)
        self.write(blend_sum(blend, self.base.layout, denoising_step))

    def check(self, blend: Blend) -> None:
        """Raise what `apply` would; each adapter is looked at once."""
        new = tuple(entry for entry in blend.entries if entry.adapter not in self.checked)
        if not new:
            return
        validate_blend(self.base, Blend(entries=new))
        self.checked.update(entry.adapter for entry in new)

    def write(self, total: BlendSum) -> None:
        """Make the weights the base's plus these terms; touches only the parameters whose terms are others now.

        Raises ConfigError, with the base's own values back, for a value beyond the range of the base's type.
        """
        try:
            with full_precision(self.base):
                for name in [name for name in self.applied if not is_changed(total, name)]:
                    self.restore(name)
                for path, terms in total.layers.items():
                    self.write_weight(path, terms)
                for path, biases in total.biases.items():
                    self.write_bias(path, biases)
        except BaseException:
            self.undo()
            raise
        self.stacks = {path: kept for path, kept in self.stacks.items() if path in total.layers}

    def write_weight(self, path: str, terms: tuple[tuple[float, Layer], ...]) -> None:
        name = f"{path}.weight"
        if terms_equal(self.applied.get(name), terms):
            return
        live = self.live_tensor(name)
        own = self.original(name, live)
        self.applied[name] = ()
        in_place = live.dtype == torch.float32 and live.is_contiguous()
        value = compute_blended_weight(own, terms, stack=self.stack(path, terms, live), out=live if in_place else None)
        if not in_place:
            check_range(value, live.dtype, name)
            live.copy_(value)
        self.applied[name] = terms

    def write_bias(self, path: str, terms: tuple[tuple[float, Tensor], ...]) -> None:
        name = f"{path}.bias"
        if terms_equal(self.applied.get(name), terms):
            return
        live = self.live_tensor(name)
        value = compute_blended_bias(self.original(name, live), terms)
        check_range(value, live.dtype, name)
        self.applied[name] = ()
        live.copy_(value)
        self.applied[name] = terms

    def stack(self, path: str, terms: tuple[tuple[float, Layer], ...], live: Tensor) -> StackedFactors | None:
        """The module's factors side by side, from the last time if they are the same; None if none can be stacked."""
        layers = tuple(layer for _, layer in split_stackable(terms)[0])
        if not layers:
            return None
        kept = self.stacks.get(path)
        if kept is None or kept[0] != layers:
            kept = self.stacks[path] = (layers, stack_factors(layers, live.device))
        return kept[1]

    def live_tensor(self, name: str) -> Tensor:
        if name not in self.live:
            self.live[name] = parameter_at(self.base, name)
        return self.live[name]

    def restore(self, name: str) -> None:
        live = self.live_tensor(name)
        live.copy_(self.original(name, live))
        del self.applied[name]

    def undo(self) -> None:
        """Copy the base's own values back; a Ctrl-C meanwhile comes through when they are."""
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


@contextmanager
def full_precision(base: Base) -> Iterator[None]:
    """No gradients, and float32 as it says: autocast would compute the deltas in half precision."""
    with torch.no_grad(), torch.autocast(base.device.type, enabled=False):
        yield


def rounding_loss(base: Base, total: BlendSum) -> float:
    """What rounding to the base's type takes from these terms in its weights: norm of the loss over norm of the delta.

    bfloat16 can lose half of a gentle adapter, because its steps are wider than the delta.
    """
    lost = delta = 0.0
    with full_precision(base):
        for path, terms in total.layers.items():
            own = weight_at(base, path)
            exact = compute_blended_weight(own, terms)
            lost += float((cast_checked(exact, own.dtype, path).float() - exact).square().sum())
            delta += float((exact - own.float()).square().sum())
    return (lost / delta) ** 0.5 if delta else 0.0


def is_changed(total: BlendSum, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return path in (total.layers if leaf == "weight" else total.biases)


def memory_backup() -> Callable[[str, Tensor], Tensor]:
    """The base's own values from copies made when a parameter is first touched."""
    kept: dict[str, Tensor] = {}

    def get_original(name: str, live: Tensor) -> Tensor:
        if name not in kept:
            kept[name] = live.clone()
        return kept[name]

    return get_original


def file_backup(base: Base) -> Callable[[str, Tensor], Tensor]:
    """The base's own values from its files, mapped and not read into memory.

    Raises ConfigError when a parameter is first touched whose live value is not the file's: then the files are no
    backup, because the weights were changed after loading.
    """
    paths = changeable_paths(base.layout)
    places = find_parameters(base.folder, (f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")))
    files = {file: map_safetensors(file) for file in {place.file for place in places.values()}}
    compared: set[str] = set()

    def get_original(name: str, live: Tensor) -> Tensor:
        place = places[name]
        value = files[place.file][place.key].reshape(live.shape).to(live.device, live.dtype)
        if name not in compared and not torch.equal(value, live):
            raise ConfigError(f"{name}: is not what {base.folder} holds; keep the backup in memory instead")
        compared.add(name)
        return value

    return get_original


@contextmanager
def weight_patch(base: Base, *, backup: Backup = "memory") -> Iterator[WeightPatch]:
    """A patch on the base, to apply blends one after another; the base's own values are back afterwards, whatever
    happens inside.

    `backup` says where they come from: copies in memory, of the parameters touched, or the base's files, which costs no
    memory. Raises ConfigError if the base has a patch already, which would take the first one's weights for its own.
    """
    if base in PATCHED:
        raise ConfigError(
            f"{base.name} has a blend in its weights already; leave that one first, or load a second base"
        )
    if is_quantized(base):
        raise ConfigError(
            f"{base.name}: its weights are quantized, nothing can be added to them; keep a branch (exact)"
        )
    patch = WeightPatch(base, memory_backup() if backup == "memory" else file_backup(base))
    PATCHED.add(base)
    try:
        yield patch
    finally:
        try:
            patch.undo()
        finally:
            PATCHED.discard(base)


@contextmanager
def blended_weights(
    base: Base, blend: Blend, denoising_step: DenoisingStep | None = None, *, backup: Backup = "memory"
) -> Iterator[WeightPatch]:
    """The base with the blend in its weights; the base's own values are back afterwards, whatever happens inside.

    Learned words are not weights; `models.textual_inversion.learned_tokens` opens them beside this. Raises as
    `WeightPatch.apply` and `weight_patch` do.
    """
    with weight_patch(base, backup=backup) as patch:
        patch.apply(blend, denoising_step)
        yield patch
