"""Paths in each form that a user may pass, and the public functions of a package that take one."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


class PathLike:
    """A path that is neither a string nor a `Path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


SPELLINGS: tuple[Callable[[Path], Any], ...] = (str, Path, PathLike)


def functions_with_paths(package: ModuleType) -> set[str]:
    """Name the public functions and methods of a package that take a path.

    Fails if one of them is annotated with `Path`, which excludes strings.
    """
    annotations = {
        name: [str(parameter.annotation) for parameter in inspect.signature(function).parameters.values()]
        for name, function in _public_functions(package).items()
    }
    only_path = [name for name, kinds in annotations.items() if any(_excludes_strings(kind) for kind in kinds)]
    assert only_path == [], only_path
    return {name for name, kinds in annotations.items() if any("PathLike" in kind for kind in kinds)}


def _excludes_strings(annotation: str) -> bool:
    return annotation.removesuffix(" | None") in ("Path", "pathlib.Path", "pathlib._local.Path", str(Path))


def _public_functions(package: ModuleType) -> dict[str, Callable[..., Any]]:
    prefix = f"{package.__name__}."
    functions: dict[str, Callable[..., Any]] = {}
    for info in pkgutil.walk_packages(package.__path__, prefix):
        module = importlib.import_module(info.name)
        owned = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == info.name}
        classes = {name: value for name, value in owned.items() if inspect.isclass(value)}
        methods = {f"{name}.{key}": value for name, each in classes.items() for key, value in vars(each).items()}
        for name, value in {**owned, **methods}.items():
            public = not any(part.startswith("_") for part in name.split("."))
            if inspect.isfunction(value) and public:
                functions[f"{info.name.removeprefix(prefix)}.{name}"] = value
    return functions
