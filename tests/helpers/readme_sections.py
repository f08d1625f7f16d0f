"""Parse a README into sections with their code blocks, and each block into the commands that a reader would run."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"```(\w*)\s*$")
HEADING = re.compile(r"#{1,6} (.+?)\s*$")
DIRECTIVE = re.compile(r"<!-- (\w+): (.+?) -->\s*$")
DIRECTIVES = ("skip", "append", "file")
LANGUAGES = ("bash", "console", "python", "toml", "text")
HEAVY = re.compile(
    r"lora-diffusion (train|generate|grid|blocks|route|distill)\b|^print\(train\(|\bgenerate\(base", re.MULTILINE
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced code block and the directive in the line above it."""

    language: str
    text: str
    line: int
    skip: str = ""
    """Why the block cannot run in a test."""
    append: str = ""
    """Arguments that a test appends to each command."""
    file: str = ""
    """File that the text of a `toml` block is written to."""

    @property
    def command_lines(self) -> list[str]:
        """The commands of a `bash` or `console` block, with continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line for line in lines if shlex.split(line, comments=True)]

    @property
    def commands(self) -> list[list[str]]:
        """The argument lists of the commands that run in a test."""
        if self.skip or self.language not in ("bash", "console"):
            return []
        return [shlex.split(line, comments=True) + shlex.split(self.append) for line in self.command_lines]

    @property
    def runs(self) -> bool:
        """Whether a test runs it."""
        return bool(self.commands) or (self.language == "python" and not self.skip)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what follows it, up to the next heading of any level."""

    readme: str
    """Path from the root of the repository, with forward slashes."""
    title: str
    blocks: tuple[Block, ...]

    @property
    def name(self) -> str:
        """The name of the section's test: `lora_diffusion/formats/README.md::Convert`."""
        return f"{self.readme}::{self.title}"

    @property
    def runs(self) -> bool:
        """Whether a test runs any of its blocks."""
        return any(block.runs for block in self.blocks)

    @property
    def is_slow(self) -> bool:
        """Whether it trains or samples."""
        return any(HEAVY.search(block.text) for block in self.blocks if block.runs)


def find_readmes(root: Path) -> list[Path]:
    """All READMEs of the repository, except those that scripts write and those in other folders, such as outputs."""
    folders = ("lora_diffusion", "sample_data", "tests", "train_scripts", "ui")
    found = [root / "README.md", *(path for folder in folders for path in sorted((root / folder).rglob("README.md")))]
    return [path for path in found if not path.parent.name.startswith("tiny-")]


def parse_sections(path: Path, root: Path) -> list[Section]:
    """The sections of a README, in order; text before the first heading is not allowed to hold code blocks.

    Raises ValueError for a block without an end or with an unknown directive or language.
    """
    readme = path.relative_to(root).as_posix()
    titles: list[str] = []
    blocks: list[list[Block]] = []
    for item in parse_lines(path.read_text(encoding="utf-8").splitlines(), readme):
        if isinstance(item, str):
            titles.append(item)
            blocks.append([])
        else:
            blocks[-1].append(item)
    return [Section(readme=readme, title=t, blocks=tuple(b)) for t, b in zip(titles, blocks, strict=True)]


def parse_lines(lines: list[str], source: str) -> Iterator[str | Block]:
    """Headings and code blocks in order."""
    above, index = "", 0
    while index < len(lines):
        line = lines[index]
        if fence := FENCE.match(line):
            start, index = index, index + 1
            while index < len(lines) and lines[index].rstrip() != "```":
                index += 1
            if index == len(lines):
                raise ValueError(f"{source}:{start + 1}: the code block has no end")
            yield new_block(fence[1], lines[start + 1 : index], above, f"{source}:{start + 1}", start + 1)
        elif heading := HEADING.match(line):
            yield heading[1]
        above, index = line, index + 1


def new_block(language: str, lines: list[str], above: str, place: str, line: int) -> Block:
    """The block, with the directive above it. Raises ValueError."""
    if language not in LANGUAGES:
        raise ValueError(f"{place}: a code block is marked {language!r}; expected one of {', '.join(LANGUAGES)}")
    directive = DIRECTIVE.match(above)
    if directive is None:
        if above.startswith("<!--"):
            raise ValueError(f"{place}: the comment above the code block is no directive: {above}")
        return Block(language=language, text="\n".join(lines) + "\n", line=line)
    if directive[1] not in DIRECTIVES:
        raise ValueError(f"{place}: unknown directive {directive[1]!r}; expected one of {', '.join(DIRECTIVES)}")
    return Block(language=language, text="\n".join(lines) + "\n", line=line, **{directive[1]: directive[2]})


def anchors(path: Path) -> set[str]:
    """The link targets that GitHub makes of a README's headings."""
    headings = [
        item for item in parse_lines(path.read_text(encoding="utf-8").splitlines(), str(path)) if isinstance(item, str)
    ]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    """The targets of all links and images outside of code blocks, without web addresses."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [target for target in re.findall(r"\]\(([^()\s]+)\)", text) if "://" not in target]
