"""Checks of an adapter file, each with its answer, for a command with an exit code."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.compatibility import check_fits, expected_shapes
from lora_diffusion.architectures.families import family_title
from lora_diffusion.architectures.module_paths import changeable_paths
from lora_diffusion.errors import AdapterFormatError, LoRADiffusionError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.checkpoints.diffusers import find_parameters, read_layout
from lora_diffusion.formats.safetensors import read_header
from lora_diffusion.models.locate import find_base
from lora_diffusion.workflows.adapters.inspect import delta_norm, file_hashes

_HASH_KEY = "modelspec.hash_sha256"


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The result of one check; `passed` is None if it does not apply."""

    name: str
    passed: bool | None
    detail: str


def verify(path: Path, *, base: str = "", ignore: Sequence[str] = ()) -> list[CheckResult]:
    """All checks of a file, and of how it fits `base` if one is given; never raises for a bad file."""
    try:
        adapter = load_adapter(path, ignore=ignore)
    except AdapterFormatError as error:
        return [CheckResult(name="readable and understood in full", passed=False, detail=str(error))]
    count = len(adapter.paths)
    said = (
        f"{adapter.metadata.source_format}: {', '.join(adapter.kinds)}, {count} modules, {len(adapter.tokens)} tokens"
    )
    checks = [
        CheckResult(name="readable and understood in full", passed=True, detail=said),
        _check_family_known(adapter),
        _check_assumptions(adapter),
        _check_not_zero(adapter),
        _check_payload(path),
    ]
    return [*checks, _check_base(adapter, base)] if base else checks


def _check_family_known(adapter: Adapter) -> CheckResult:
    family = family_title(adapter.metadata.family)
    return CheckResult(
        name="family recognized", passed=bool(family), detail=family or "fits several families, or none known"
    )


def _check_assumptions(adapter: Adapter) -> CheckResult:
    """Nothing had to be assumed; a file that leaves its alpha out is legal, so this never fails."""
    notes = adapter.metadata.notes
    return CheckResult(
        name="nothing assumed", passed=None if notes else True, detail="; ".join(notes) or "scales are all given"
    )


def _check_not_zero(adapter: Adapter) -> CheckResult:
    """Check that every layer has a nonzero delta, as trained layers do."""
    dead = [path for path, layer in adapter.layers.items() if delta_norm(layer) == 0]
    detail = (
        f"{len(dead)} of {len(adapter.layers)} add nothing (first: {dead[0]})" if dead else "every layer adds something"
    )
    return CheckResult(name="no dead layers", passed=not dead, detail=detail)


def _check_payload(path: Path) -> CheckResult:
    """The tensors are those that the header's ModelSpec hash names."""
    name = "tensors as hashed in the header"
    if not path.is_file() or path.suffix != ".safetensors":
        return CheckResult(name=name, passed=None, detail="no safetensors header")
    stated = read_header(path).metadata.get(_HASH_KEY, "")
    if not stated:
        return CheckResult(name=name, passed=None, detail=f"the header has no {_HASH_KEY}")
    actual = file_hashes(path)["sshs_model_hash"]
    return CheckResult(name=name, passed=stated.removeprefix("0x") == actual, detail=stated)


def _check_base(adapter: Adapter, base: str) -> CheckResult:
    """Every layer finds a weight of its shape in the base; reads the base's headers alone."""
    name = f"fits {base}"
    try:
        folder = find_base(base)
        family, shape = read_layout(folder)
        check_fits(
            Blend(entries=(WeightedAdapter(adapter=adapter),)),
            base_name=base,
            family=family.name,
            paths=frozenset(changeable_paths(shape)),
            shapes={name: found.shape for name, found in find_parameters(folder, expected_shapes(adapter)).items()},
        )
    except LoRADiffusionError as error:
        return CheckResult(name=name, passed=False, detail=str(error))
    return CheckResult(name=name, passed=True, detail=f"{len(adapter.paths)} modules matched")


def describe_checks(checks: Sequence[CheckResult]) -> str:
    """One line for each check."""
    words = {True: "ok", False: "FAILED", None: "note"}
    return "\n".join(f"{words[check.passed]:<8}{check.name}: {check.detail}" for check in checks)
