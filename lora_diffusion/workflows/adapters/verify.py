"""Checks of an adapter file: format, family, dead layers, hash of the tensors, and compatibility with a base."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.compatibility import check_fits, expected_shapes
from lora_diffusion.architectures.families import family_title
from lora_diffusion.architectures.module_paths import changeable_paths
from lora_diffusion.core.tables import format_table
from lora_diffusion.errors import AdapterFormatError, LoRADiffusionError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.checkpoints.diffusers import find_parameters, read_layout
from lora_diffusion.formats.safetensors import read_header
from lora_diffusion.models.locate import find_base
from lora_diffusion.workflows.adapters.inspect import delta_norm, file_hashes

_HASH_KEY = "modelspec.hash_sha256"


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Result of one check."""

    name: str
    """What was checked."""
    passed: bool | None
    """Whether the check passed; None if it does not apply."""
    detail: str
    """What was found."""


def verify(
    path: str | os.PathLike[str], *, base: str | os.PathLike[str] = "", ignore: Sequence[str] = ()
) -> list[CheckResult]:
    """Check an adapter file. An invalid file is a failed check, not an exception.

    Args:
        path: The adapter file.
        base: Base to check the adapter against: `tiny-sd`, a folder or a hub id. Empty for no such check.
        ignore: Patterns of keys that the file may contain although they are not understood.
    """
    path = Path(path)
    try:
        adapter = load_adapter(path, ignore=ignore)
    except AdapterFormatError as error:
        return [CheckResult(name="readable and understood in full", passed=False, detail=str(error))]
    count = len(adapter.paths)
    contents = (
        f"{adapter.metadata.source_format}: {', '.join(adapter.kinds)}, {count} modules, {len(adapter.tokens)} tokens"
    )
    checks = [
        CheckResult(name="readable and understood in full", passed=True, detail=contents),
        _check_family_known(adapter),
        _check_assumptions(adapter),
        _check_not_zero(adapter),
        _check_payload(path),
    ]
    return [*checks, _check_base(adapter, os.fspath(base))] if base else checks


def _check_family_known(adapter: Adapter) -> CheckResult:
    """Check that the family is stated in the file or follows from its modules."""
    family = family_title(adapter.metadata.family)
    return CheckResult(
        name="family recognized", passed=bool(family), detail=family or "matches several known families or none"
    )


def _check_assumptions(adapter: Adapter) -> CheckResult:
    """Report what the reader assumed, such as a missing alpha. Such files are valid, so the check never fails."""
    notes = adapter.metadata.notes
    return CheckResult(
        name="nothing assumed", passed=None if notes else True, detail="; ".join(notes) or "all scales are stated"
    )


def _check_not_zero(adapter: Adapter) -> CheckResult:
    """Check that every layer has a nonzero delta, as trained layers do."""
    dead = [path for path, layer in adapter.layers.items() if delta_norm(layer) == 0]
    detail = f"{len(dead)} of {len(adapter.layers)} deltas are zero (first: {dead[0]})" if dead else "no delta is zero"
    return CheckResult(name="no dead layers", passed=not dead, detail=detail)


def _check_payload(path: Path) -> CheckResult:
    """Check that the tensors have the ModelSpec hash in the header."""
    name = "tensors match the hash in the header"
    if not path.is_file() or path.suffix != ".safetensors":
        return CheckResult(name=name, passed=None, detail="no safetensors header")
    stated = read_header(path).metadata.get(_HASH_KEY, "")
    if not stated:
        return CheckResult(name=name, passed=None, detail=f"the header has no {_HASH_KEY}")
    actual = file_hashes(path)["sshs_model_hash"]
    return CheckResult(name=name, passed=stated.removeprefix("0x") == actual, detail=stated)


def _check_base(adapter: Adapter, base: str) -> CheckResult:
    """Check that the base has a weight of the right shape for every layer; only headers of the base are read."""
    name = f"fits {base}"
    try:
        folder = find_base(base)
        family, layout = read_layout(folder)
        check_fits(
            Blend(entries=(WeightedAdapter(adapter=adapter),)),
            base_name=base,
            family=family.name,
            paths=frozenset(changeable_paths(layout)),
            shapes={key: info.shape for key, info in find_parameters(folder, expected_shapes(adapter)).items()},
        )
    except LoRADiffusionError as error:
        return CheckResult(name=name, passed=False, detail=str(error))
    return CheckResult(name=name, passed=True, detail=f"{len(adapter.paths)} modules matched")


def describe_checks(checks: Sequence[CheckResult]) -> str:
    """Format one line of text for each check."""
    labels = {True: "ok", False: "FAILED", None: "note"}
    rows = [(labels[check.passed], f"{check.name}: {check.detail}") for check in checks]
    return format_table([], rows, left=(0, 1))
