"""Training data: folders, images, captions, buckets, crops and batches."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from lora_diffusion.config.train import CaptionConfig, DataConfig
from lora_diffusion.data.buckets import Bucket, bucket_sizes, nearest_bucket
from lora_diffusion.data.captions import augment_caption
from lora_diffusion.data.folder import Example, data_hash, read_dataset
from lora_diffusion.data.images import read_picture, read_size
from lora_diffusion.data.sampler import plan_batches
from lora_diffusion.data.splits import split_validation
from lora_diffusion.data.transforms import make_view, make_view_key
from lora_diffusion.errors import DatasetError
from tests.helpers.picture_folders import write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures", "a {}\n wall\n")


def read(folder: Path, **changes: object) -> tuple[Example, ...]:
    return read_dataset(DataConfig.model_validate({"folder": folder, **changes}))


def test_captions_are_whole_files_with_whitespace_normalized(folder: Path) -> None:
    (folder / "0.txt").rename(folder / "0.caption")
    assert [example.caption for example in read(folder)] == [
        "a red wall",
        "a blue wall",
        "a green wall",
        "a white wall",
    ]


def test_kohya_folders_set_repeats_and_captions(tmp_path: Path) -> None:
    for name in ("10_sks dog", "2_dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    (tmp_path / "2_dog" / "a.txt").write_text("a dog asleep")
    assert [(example.repeats, example.caption) for example in read(tmp_path)] == [(10, "sks dog"), (2, "a dog asleep")]


def test_hugging_face_folders_have_captions_in_metadata_jsonl(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()
    rows = [f'{{"file_name": "{i}.png", "text": "number {i}"}}\n' for i in range(4)]
    (folder / "metadata.jsonl").write_text("".join(rows))
    assert [example.caption for example in read(folder)] == [f"number {i}" for i in range(4)]
    for text, message in (
        ("".join(rows[:3]), "3.png: is not in metadata.jsonl"),
        ("".join([*rows, '{"file_name": "9.png", "text": "x"}']), "line 5 names 9.png, which does not exist"),
        ("nonsense", "line 1 is not valid"),
    ):
        (folder / "metadata.jsonl").write_text(text)
        with pytest.raises(DatasetError, match=message):
            read(folder)


def test_an_instance_prompt_replaces_missing_captions(folder: Path) -> None:
    (folder / "2.txt").unlink()
    with pytest.raises(DatasetError, match=r"2\.png: has no caption"):
        read(folder)
    assert read(folder, instance_prompt="photo of sks dog")[2].caption == "photo of sks dog"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lost.txt", "a lost one", r"lost\.txt: caption without an image"),
        ("0.caption", "something else", "have different captions"),
        ("1.txt", "", r"1\.txt: is empty"),
        ("x.gif", "", "unsupported image format"),
        ("0.jpg", "", "two images share the caption"),
        ("lost.mask.png", "", "mask without an image"),
    ],
)
def test_no_file_is_ignored_silently(name: str, content: str, message: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(DatasetError, match=message):
        read(folder)


def test_a_missing_mask_is_named(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"0\.png: has no mask; add 0\.mask\.png"):
        read(folder, masks="file")
    for i in range(4):
        Image.new("L", (40, 48), 255).save(folder / f"{i}.mask.png")
    assert [example.mask for example in read(folder, masks="file")] == [folder / f"{i}.mask.png" for i in range(4)]


def test_the_hash_covers_images_captions_and_repeats(folder: Path) -> None:
    hashes = {data_hash(read(folder))}
    (folder / "3.txt").write_text("another caption")
    hashes.add(data_hash(read(folder)))
    Image.new("RGB", (40, 48), "black").save(folder / "3.png")
    hashes.add(data_hash(read(folder)))
    hashes.add(data_hash([Example(picture=e.picture, caption=e.caption, repeats=2) for e in read(folder)]))
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 65535 // 2, (127, 127, 127)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, color: object, expected: tuple[int, ...]) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (16, 16), color).save(path)  # type: ignore[arg-type]
    tensor = (view_pixels(path, Bucket(16, 16)) + 1) * 127.5
    assert tensor.shape == (3, 16, 16)
    assert tensor[:, 8, 8].tolist() == pytest.approx(expected, abs=2)


def view_pixels(path: Path, bucket: Bucket) -> torch.Tensor:
    config = DataConfig(folder=path.parent)
    return make_view(Example(picture=path, caption="x"), bucket, config, seed=0, variant=0).pixels


def swapped_profile() -> bytes:
    """Return an sRGB profile with red and blue swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [("RGB", (255, 0, 0), (0, 0, 255)), ("RGBA", (0, 0, 255, 255), (255, 0, 0)), ("P", 0, (0, 0, 255))],
)
def test_color_profiles_are_converted_to_srgb(
    mode: str, color: object, expected: tuple[int, ...], tmp_path: Path
) -> None:
    picture = Image.new(mode, (8, 8), color)  # type: ignore[arg-type]
    if mode == "P":
        picture.putpalette([255, 0, 0])
    picture.save(tmp_path / "a.png", icc_profile=swapped_profile())
    found = read_picture(tmp_path / "a.png").getpixel((4, 4))
    assert found == pytest.approx(expected, abs=3)
    picture.save(tmp_path / "b.png", icc_profile=b"broken")
    assert read_picture(tmp_path / "b.png").getpixel((4, 4)) == picture.convert("RGB").getpixel((4, 4))


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10), "black")
    picture.paste((255, 255, 255), (0, 0, 10, 10))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    assert read_size(tmp_path / "a.png") == (10, 20)
    pixels = view_pixels(tmp_path / "a.png", Bucket(8, 16))
    assert float(pixels[:, 0].mean()) > 0.9
    assert float(pixels[:, -1].mean()) < -0.9


def test_animated_images_are_refused(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(DatasetError, match=r"a\.webp: has 2 frames"):
        read_size(tmp_path / "a.webp")


@given(st.sampled_from([64, 512, 768, 1024]), st.sampled_from([8, 32, 64]), st.floats(1, 4))
def test_buckets_have_about_the_same_area_and_a_bounded_aspect(resolution: int, step: int, aspect: float) -> None:
    buckets = bucket_sizes(resolution, step, aspect)
    assert Bucket(resolution, resolution) in buckets
    assert {Bucket(b.height, b.width) for b in buckets} == set(buckets)
    for bucket in buckets:
        assert bucket.width % step == bucket.height % step == 0
        assert 1 / aspect <= bucket.aspect <= aspect
        assert bucket.width * bucket.height <= resolution**2
        assert (bucket.width + step) * (bucket.height + step) > resolution**2


@given(st.integers(10, 4000), st.integers(10, 4000))
def test_the_nearest_bucket_has_the_nearest_aspect(width: int, height: int) -> None:
    buckets = bucket_sizes(512, 64, 2.0)
    found = nearest_bucket(buckets, width, height)
    distances = [max(b.aspect * height / width, width / height / b.aspect) for b in buckets]
    assert max(found.aspect * height / width, width / height / found.aspect) <= min(distances) * (1 + 1e-6)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from([Bucket(8, 8), Bucket(8, 16), Bucket(16, 8)]), st.integers(1, 3)), min_size=1),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_every_example_is_sampled_in_proportion_to_its_repeats(
    examples: list[tuple[Bucket, int]], per_step: int, seed: int
) -> None:
    sizes, repeats = [size for size, _ in examples], [count for _, count in examples]
    steps = 4 * sum(repeats)
    batches = plan_batches(sizes, repeats, per_step=per_step, steps=steps, seed=seed)
    assert batches[:7] == plan_batches(sizes, repeats, per_step=per_step, steps=min(7, steps), seed=seed)[:7]
    assert all(len({sizes[i] for i in batch}) == 1 and len(batch) == per_step for batch in batches)
    for bucket in set(sizes):
        members = [i for i, size in enumerate(sizes) if size == bucket]
        share = sum(repeats[i] for i in members) / sum(repeats)
        taken = sum(sizes[batch[0]] == bucket for batch in batches)
        assert abs(taken - share * steps) <= len(set(sizes))
        shown = [i for batch in batches for i in batch if sizes[i] == bucket]
        one_pass = sum(repeats[i] for i in members)
        for start in range(0, len(shown) - one_pass + 1, one_pass):
            assert sorted(shown[start : start + one_pass]) == sorted(i for i in members for _ in range(repeats[i]))


def test_views_depend_on_seed_and_variant_and_have_distinct_keys(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (60, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "a.png")
    example, bucket = Example(picture=tmp_path / "a.png", caption="x"), Bucket(16, 16)
    config = DataConfig(folder=tmp_path, crop="random", crop_zoom=1.5, flip=True, color_jitter=0.2)
    made = {
        (seed, variant): (
            make_view(example, bucket, config, seed=seed, variant=variant),
            make_view_key(example, bucket, config, seed=seed, variant=variant),
        )
        for seed in (0, 7)
        for variant in (0, 1, 2)
    }
    assert len({key for _, key in made.values()}) == len(made)
    for (seed, variant), (shown, key) in made.items():
        again = make_view(example, bucket, config, seed=seed, variant=variant)
        assert torch.equal(again.pixels, shown.pixels)
        assert make_view_key(example, bucket, config, seed=seed, variant=variant) == key
    plain = DataConfig(folder=tmp_path)
    keys = {make_view_key(example, bucket, plain, seed=seed, variant=variant) for seed in (0, 7) for variant in (0, 1)}
    assert len(keys) == 1, "without random settings there is one cache entry"
    mirrored = DataConfig(folder=tmp_path, flip=True)
    straight, turned = (make_view(example, bucket, mirrored, seed=0, variant=variant).pixels for variant in (0, 1))
    assert torch.equal(straight.flip(2), turned)


@pytest.mark.parametrize("masks", ["file", "alpha"])
def test_a_mask_is_cropped_and_mirrored_with_its_image(masks: str, tmp_path: Path) -> None:
    """A white square on black is its own mask, so the pixels and the mask of a view must agree."""
    shape = Image.new("L", (60, 40), 0)
    shape.paste(255, (5, 5, 25, 25))
    picture = Image.merge("RGBA", [shape] * 4) if masks == "alpha" else shape.convert("RGB")
    picture.save(tmp_path / "a.png")
    shape.save(tmp_path / "a.mask.png")
    mask = tmp_path / ("a.png" if masks == "alpha" else "a.mask.png")
    config = DataConfig.model_validate(
        {"folder": tmp_path, "masks": masks, "mask_floor": 0.25, "flip": True, "crop": "random", "crop_zoom": 1.3}
    )
    shown = make_view(
        Example(picture=tmp_path / "a.png", caption="x", mask=mask), Bucket(32, 32), config, seed=3, variant=1
    )
    assert shown.mask is not None
    assert (float(shown.mask.min()), float(shown.mask.max())) == (0.25, 1.0)
    white = shown.pixels[0] > 0.99
    if masks == "file":
        assert (white == (shown.mask > 0.9)).float().mean() > 0.9


def augment(caption: str, seed: int = 0, triggers: tuple[str, ...] = (), **changes: object) -> str:
    config = CaptionConfig.model_validate({"dropout": 0.0, **changes})
    return augment_caption(caption, config, triggers, torch.Generator().manual_seed(seed))


def test_a_caption_is_unchanged_by_default() -> None:
    assert augment("a cat,on a mat") == "a cat,on a mat"
    assert (
        augment("a cat", triggers=("sks", "tok"), template="photo of {trigger}, {caption}") == "photo of sks tok, a cat"
    )


@given(st.integers(0, 200), st.integers(0, 4))
def test_shuffling_keeps_the_first_tags_and_loses_none(seed: int, keep: int) -> None:
    parts = ["sks", "a cat", "red", "on a mat", "night"]
    found = augment(", ".join(parts), seed, shuffle=True, keep_tokens=keep).split(", ")
    assert found[:keep] == parts[:keep]
    assert sorted(found) == sorted(parts)


def test_dropout_has_the_configured_frequency() -> None:
    texts = [augment("sks, a, b, c", seed, tag_dropout=0.3, keep_tokens=1) for seed in range(600)]
    assert all(text.startswith("sks") for text in texts)
    share = sum(text.count(",") for text in texts) / 1800
    assert share == pytest.approx(0.7, abs=4 * (0.21 / 1800) ** 0.5)
    empty = sum(augment("a cat", seed, dropout=0.25) == "" for seed in range(600)) / 600
    assert empty == pytest.approx(0.25, abs=4 * (0.1875 / 600) ** 0.5)


def test_the_validation_split_depends_on_content(folder: Path) -> None:
    train, validation = split_validation(read(folder), 0.25, seed=1)
    assert (len(train), len(validation)) == (3, 1)
    (chosen,) = validation
    chosen.picture.rename(folder / "z.png")
    chosen.picture.with_suffix(".txt").rename(folder / "z.txt")
    assert split_validation(read(folder), 0.25, seed=1)[1][0].picture.name == "z.png"
    with pytest.raises(DatasetError, match="a validation split needs at least two images"):
        split_validation(train[:1], 0.5, seed=0)
