"""How near pictures are to a style: against true renderings of the same scenes, with a term for lines and fine detail.

A plain distance between mean colors takes a solid fill for an outlined tube, and noise for a texture. Three groups of
features are compared here, each in units of its own spread over true renderings:

* palette: what a coarse color histogram holds;
* detail: edge energy at three scales, and how much of it are thin lines rather than borders of areas;
* texture: channel correlations of the reader's first two stages (Gram matrices, [arXiv:1508.06576]).

A picture's distance is the mean of the three, and at least that of its worst group by half, so that no group can make
up for another. Pictures whose subject cannot be read count as far away as the base's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from train_scripts.tiny_judge.reader import PictureReader, stack_pictures

HISTOGRAM_LEVELS = 4
GROUPS = ("palette", "detail", "texture")


def palette_features(pictures: Tensor) -> Tensor:
    """(n, 64) shares of coarse colors, softly binned, and square-rooted so that small areas count."""
    levels = torch.linspace(-1, 1, HISTOGRAM_LEVELS)
    near = (1 - (pictures[:, :, None] - levels[:, None, None]).abs() * (HISTOGRAM_LEVELS - 1) / 2).clamp(min=0)
    red, green, blue = near[:, 0], near[:, 1], near[:, 2]
    joint = torch.einsum("nahw,nbhw,nchw->nabc", red, green, blue).flatten(1)
    return (joint / joint.sum(dim=1, keepdim=True)).sqrt()


def detail_features(pictures: Tensor) -> Tensor:
    """(n, 10) edge energies and line shares, in logarithms."""
    gray = pictures.mean(dim=1, keepdim=True)
    values: list[Tensor] = []
    for factor in (1, 2, 4):
        scaled = functional.avg_pool2d(gray, factor) if factor > 1 else gray
        smooth = functional.avg_pool2d(functional.pad(scaled, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        across = (scaled[..., 2:] - scaled[..., :-2]).abs()[..., 1:-1, :]
        ridge = (scaled[..., 2:] + scaled[..., :-2] - 2 * scaled[..., 1:-1]).abs()[..., 1:-1, :]
        values += [(scaled - smooth).abs().mean(dim=(1, 2, 3)), across.mean(dim=(1, 2, 3)), ridge.mean(dim=(1, 2, 3))]
    saturated = (pictures.amax(dim=1) - pictures.amin(dim=1)).mean(dim=(1, 2))
    return torch.log(torch.stack([*values, saturated], dim=1) + 0.01)


@torch.no_grad()
def texture_features(reader: PictureReader, pictures: Tensor) -> Tensor:
    """(n, d) Gram matrices of the reader's first two stages."""
    parts = []
    for maps in reader.feature_maps(pictures)[:2]:
        flat = maps.flatten(2)
        gram = flat @ flat.transpose(1, 2) / flat.shape[-1]
        parts.append(gram.flatten(1).sqrt())
    return torch.cat(parts, dim=1)


def measure_features(reader: PictureReader, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    """All feature groups of pictures, each (n, d)."""
    chunks = [stack_pictures(pictures[start : start + 32]) for start in range(0, len(pictures), 32)]
    return {
        "palette": torch.cat([palette_features(chunk) for chunk in chunks]),
        "detail": torch.cat([detail_features(chunk) for chunk in chunks]),
        "texture": torch.cat([texture_features(reader, chunk) for chunk in chunks]),
    }


@dataclass(frozen=True)
class StyleReference:
    """True renderings of some scenes in a style and in the flat style, as features.

    Attributes:
        styled: Mean features of the true styled renderings of each scene, group -> (scenes, d).
        scale: Distance between flat and styled renderings, by which each group is divided.
        floor: Mean distance of single true renderings from the mean of the others of their scene.
    """

    styled: dict[str, Tensor]
    scale: dict[str, float]
    floor: float

    def distances(self, reader: PictureReader, pictures: Sequence[Image.Image]) -> Tensor:
        """(scenes,) distance of one picture per scene; 0 is the styled mean, about 1 the flat style."""
        features = measure_features(reader, pictures)
        return combine_groups([group_distance(features[name], self.styled[name]) / self.scale[name] for name in GROUPS])


def group_distance(features: Tensor, target: Tensor) -> Tensor:
    return (features - target).norm(dim=1)


def combine_groups(distances: Sequence[Tensor]) -> Tensor:
    """The mean over groups, but at least half of the worst."""
    stacked = torch.stack(list(distances))
    return torch.maximum(stacked.mean(dim=0), stacked.amax(dim=0) / 2)


def build_reference(
    reader: PictureReader,
    styled: Sequence[Sequence[Image.Image]],
    flat: Sequence[Sequence[Image.Image]],
) -> StyleReference:
    """Reference from several true renderings of each scene.

    Args:
        reader: The network whose first stages give the texture features.
        styled: For each scene at least two renderings in the style, with different seeds.
        flat: For each scene as many renderings in the flat style.
    """
    count = len(styled[0])
    styled_features = measure_features(reader, [p for row in styled for p in row])
    flat_features = measure_features(reader, [p for row in flat for p in row])
    means = {name: values.view(len(styled), count, -1).mean(dim=1) for name, values in styled_features.items()}
    scale, floors = {}, []
    for name in GROUPS:
        flat_rows = flat_features[name].view(len(flat), count, -1)
        scale[name] = float((flat_rows - means[name][:, None]).norm(dim=2).mean())
        rows = styled_features[name].view(len(styled), count, -1)
        others = (rows.sum(dim=1, keepdim=True) - rows) / (count - 1)
        floors.append((rows - others).norm(dim=2).mean(dim=1) / scale[name])
    return StyleReference(styled=means, scale=scale, floor=float(combine_groups(floors).mean()))


def style_progress(
    reference: StyleReference,
    reader: PictureReader,
    pictures: Sequence[Image.Image],
    base: Sequence[Image.Image],
    readable: Sequence[bool],
) -> float:
    """How much of the way from the base's pictures to true renderings is covered; 1 is all of it.

    Args:
        reference: True renderings of the same scenes.
        reader: The network behind the texture features.
        pictures: One picture per scene, made with the style.
        base: One picture per scene, made without it.
        readable: Whether each picture's subject is read; others count as not moved at all.
    """  # fmt: skip
    far = reference.distances(reader, base)
    near = reference.distances(reader, pictures)
    kept = torch.where(torch.tensor(list(readable)), near, torch.maximum(near, far))
    return float((far.mean() - kept.mean()) / (far.mean() - reference.floor))


@torch.no_grad()
def embed_pictures(reader: PictureReader, pictures: Sequence[Image.Image]) -> np.ndarray:
    """(n, 256) features of the reader's trunk, for diversity and Fréchet distance."""
    parts = [
        reader.embed(reader.feature_maps(stack_pictures(pictures[start : start + 32]))[-1])
        for start in range(0, len(pictures), 32)
    ]
    return torch.cat(parts).double().numpy()


def pairwise_distance(features: np.ndarray) -> float:
    """Mean Euclidean distance between all pairs of rows: how much samples of one prompt vary."""
    gaps = np.linalg.norm(features[:, None] - features[None], axis=-1)
    return float(gaps[np.triu_indices(len(features), 1)].mean())


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features [arXiv:1706.08500]."""
    (mean_a, cov_a), (mean_b, cov_b) = ((f.mean(axis=0), np.cov(f, rowvar=False)) for f in (first, second))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
