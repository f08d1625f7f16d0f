"""The studio in headless Chromium, against a real server with the embedded base model."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_diffusion.config.studio import StudioConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.library.recipe import read_recipe
from lora_diffusion_studio.backend.studio import Studio
from tests.helpers.server_end import close_quietly, collect_quietly

CHROMIUM = shutil.which("chromium")
WIDTHS = {"desktop": (1400, 1200), "phone": (390, 844)}
STEPS = 2
"""Denoising steps, where the image itself does not matter."""
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no chromium; apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning"),
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    from lora_diffusion_studio.app import serve

    output = tmp_path_factory.mktemp("studio") / "out"
    messages: list[str] = []
    config = StudioConfig(output=output)
    app = serve(Studio(config), block=False, report=messages.append)
    yield messages[0].split()[5], output
    close_quietly(app)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()
    collect_quietly()


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    """Yield one browser context for all tests, which therefore load the scripts of the page from its cache."""
    opened = browser.new_context(color_scheme="light")
    yield opened
    opened.close()


@pytest.fixture
def page(context: Any, served: tuple[str, Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    """Open a new page, which is a new session of the studio."""
    width, height = WIDTHS[getattr(request, "param", "desktop")]
    opened = context.new_page()
    opened.set_viewport_size({"width": width, "height": height})
    opened.set_default_timeout(25_000)
    opened.foreign_requests = []
    opened.page_errors = []
    opened.on("request", lambda sent: opened.foreign_requests.append(sent.url) if is_foreign(sent.url) else None)
    opened.on("pageerror", lambda error: opened.page_errors.append(str(error)))
    opened.goto(served[0])
    opened.get_by_role("button", name="Generate").wait_for()
    set_steps(opened, STEPS)
    yield opened
    assert opened.foreign_requests == []
    assert opened.page_errors == []
    opened.close()


def is_foreign(url: str) -> bool:
    return not re.match(r"(data|blob):|https?://(127\.0\.0\.1|localhost)[:/]", url)


def add_adapters(page: Any, *names: str) -> None:
    """Add adapters to the blend."""
    page.get_by_label("Adapters").first.click()
    for name in names:
        page.get_by_role("option", name=re.compile(f"^{name} ")).click()
    page.keyboard.press("Escape")
    for name in names:
        page.get_by_role("checkbox", name=name, exact=True).wait_for()


def fill_prompt(page: Any, prompt: str) -> None:
    page.locator("#prompt textarea").fill(prompt)


def set_steps(page: Any, count: int) -> None:
    page.get_by_label("Steps").first.fill(str(count))


def weight_of(page: Any, name: str) -> Any:
    """Return the number field of an adapter's weight slider."""
    slot = page.locator(".adapter-slot", has=page.get_by_role("checkbox", name=name, exact=True)).first
    return slot.get_by_label("Weight", exact=False).first


def wait_for_image(page: Any, output: Path, before: int) -> Path:
    """Wait until an image is saved, and return its path."""
    page.locator("#status", has_text=re.compile(r"\.png in ")).wait_for()
    images = sorted(output.glob("*.png"))
    assert len(images) == before + 1
    return images[-1]


@pytest.mark.parametrize("page", WIDTHS, indirect=True)
def test_two_adapters_are_blended_and_shown(page: Any, served: tuple[str, Path]) -> None:
    before = len(list(served[1].glob("*.png")))
    add_adapters(page, "neon", "gloop")
    page.get_by_label("Seed", exact=True).fill("3")
    weight_of(page, "neon").fill("0.6")
    fill_prompt(page, "a gloop character in the snow, in zwx style")
    page.keyboard.press("Control+Enter")
    made = wait_for_image(page, served[1], before)
    recipe = read_recipe(made)
    assert [(entry.name, entry.weight) for entry in recipe.adapters] == [("neon", 0.6), ("gloop", 1.0)]
    assert recipe.settings
    assert recipe.settings.seed == 3
    shown = page.locator("button.image-frame img, .fit-image img").first
    shown.wait_for()
    with Image.open(made) as image:
        assert image.size == (64, 64)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_dark_is_dark_and_light_is_light(page: Any) -> None:
    grounds: dict[str, int] = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.reload()
        page.get_by_role("button", name="Generate").wait_for()
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        grounds[scheme] = sum(int(part) for part in re.findall(r"\d+", color)[:3])
    assert grounds["dark"] < 200 < 600 < grounds["light"]
    add_adapters(page, "neon")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_adapter_is_searched_and_added_from_the_gallery(page: Any) -> None:
    cards = page.locator(".thumbnails").first.get_by_role("button")
    assert cards.count() == 5
    page.get_by_label("Search").fill("zwx")
    page.wait_for_function("document.querySelector('.thumbnails').querySelectorAll('button').length === 1")
    cards.first.click()
    page.get_by_role("checkbox", name="neon", exact=True).wait_for()
    page.locator(".adapter-slot .thumbnail img").first.wait_for()
    page.get_by_label("Search").fill("no such adapter")
    page.wait_for_function("document.querySelector('.thumbnails').querySelectorAll('button').length === 0")


def test_adapter_is_limited_to_a_painted_region(page: Any, served: tuple[str, Path]) -> None:
    before = len(list(served[1].glob("*.png")))
    add_adapters(page, "neon")
    fill_prompt(page, "a house")
    page.get_by_role("button", name="Advanced").first.click()
    page.get_by_role("button", name="Regions (limit").click()
    page.get_by_role("button", name="Limit to the painted region").click()
    page.get_by_text("the mask is empty").wait_for()
    canvas = page.locator("canvas").locator("visible=true").first
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    box = canvas.bounding_box()
    page.get_by_role("button", name="Brush").click()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 30, y)
    page.mouse.down()
    page.mouse.move(x + 30, y, steps=8)
    page.mouse.up()
    page.get_by_role("button", name="Limit to the painted region").click()
    page.wait_for_function(
        "[...document.querySelectorAll('input, textarea')].some((field) => field.value.startsWith('mask='))"
    )
    page.get_by_role("button", name="Generate").click()
    region = read_recipe(wait_for_image(page, served[1], before)).adapters[0].region
    assert region
    assert Path(region.mask).is_relative_to((served[1] / "masks").resolve())


def test_changed_weight_generates_and_is_compared_with_the_base(page: Any, served: tuple[str, Path]) -> None:
    before = len(list(served[1].glob("*.png")))
    add_adapters(page, "neon")
    fill_prompt(page, "a house, in zwx style")
    page.get_by_role("button", name="Compare with base model").click()
    page.get_by_text("there is no image to compare yet").wait_for()
    page.get_by_label("Generate when a weight changes").check()
    weight_of(page, "neon").fill("0.4")
    page.locator("#prompt textarea").click()
    made = wait_for_image(page, served[1], before)
    assert read_recipe(made).adapters[0].weight == 0.4
    page.get_by_role("button", name="Compare with base model").click()
    page.get_by_text("Left: base model.").wait_for()
    assert read_recipe(made.with_name(f"{int(made.stem) + 1:05d}.png")).adapters == ()


def test_a_preset_is_exported_and_imported(page: Any, tmp_path: Path) -> None:
    open_tab(page, "Presets")
    page.locator(".thumbnails button", has_text="watercolour-zuki").click()
    page.get_by_text("zuki:").first.wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export preset").or_(
            page.get_by_role("link", name="Export preset")
        ).first.click()
    download.value.save_as(tmp_path / "taken.json")
    page.locator("input[type=file][accept='.json']").set_input_files(tmp_path / "taken.json")
    page.get_by_text("Preset imported as taken").wait_for()
    page.locator(".thumbnails button", has_text="taken").wait_for()


def test_variation_keeps_the_seed_and_shows_its_own(page: Any, served: tuple[str, Path]) -> None:
    before = len(list(served[1].glob("*.png")))
    fill_prompt(page, "a red house")
    page.get_by_role("radio", name="Variation").check()
    page.get_by_role("button", name="Generate").click()
    settings = read_recipe(wait_for_image(page, served[1], before)).settings
    assert settings
    assert (settings.seed, settings.variation) == (0, 0.2)
    page.get_by_role("button", name="Size, number of images").click()
    assert page.get_by_label("Variation seed").input_value() == str(settings.variation_seed)


def test_invalid_size_and_foreign_image_are_refused(page: Any, tmp_path: Path) -> None:
    fill_prompt(page, "a red house")
    page.get_by_role("button", name="Size, number of images").click()
    page.get_by_label("Width").fill("30000")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("the studio accepts at most 2048").wait_for()
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "foreign.png")
    page.get_by_text("foreign.png: carries no recipe").wait_for()


def test_trigger_word_is_added_to_the_prompt_and_empty_prompt_is_refused(page: Any) -> None:
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("the prompt is empty; describe the image").wait_for()
    add_adapters(page, "ink")
    page.locator(".trigger-words").get_by_text("sks").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'sks'")


def test_a_generation_is_stopped(page: Any, served: tuple[str, Path]) -> None:
    before = len(list(served[1].glob("*.png")))
    set_steps(page, 200)
    fill_prompt(page, "a red house")
    page.get_by_role("button", name="Generate").click()
    page.locator("#status", has_text=re.compile(r"Step \d+ of 200")).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("#status", has_text="Stopped").wait_for()
    set_steps(page, STEPS)
    page.get_by_role("button", name="Generate").click()
    wait_for_image(page, served[1], before)


def test_settings_are_loaded_from_an_image(page: Any, served: tuple[str, Path]) -> None:
    before = len(list(served[1].glob("*.png")))
    add_adapters(page, "watercolour")
    fill_prompt(page, "a blue house, in ohwx style")
    page.get_by_label("Seed", exact=True).fill("11")
    page.get_by_role("button", name="Generate").click()
    made = wait_for_image(page, served[1], before)
    page.reload()
    page.get_by_role("button", name="Generate").wait_for()
    page.locator("input[type=file]").first.set_input_files(made)
    page.get_by_role("checkbox", name="watercolour", exact=True).wait_for()
    assert page.locator("#prompt textarea").input_value() == "a blue house, in ohwx style"
    assert page.get_by_label("Seed", exact=True).input_value() == "11"
    page.get_by_role("button", name="Generate").click()
    again = wait_for_image(page, served[1], before + 1)
    with Image.open(made) as first, Image.open(again) as second:
        assert first.tobytes() == second.tobytes()


def test_two_sessions_do_not_mix(page: Any, served: tuple[str, Path], browser: Any) -> None:
    """Two pages at once: each gets the image of its own prompt."""
    context = browser.new_context()
    other = context.new_page()
    other.set_default_timeout(60_000)
    other.goto(served[0])
    other.get_by_role("button", name="Generate").wait_for()
    set_steps(other, STEPS)
    add_adapters(page, "neon")
    add_adapters(other, "ink")
    fill_prompt(page, "a red house, in zwx style")
    fill_prompt(other, "a blue cat, in sks style")
    before = set(served[1].glob("*.png"))
    for each in (page, other):
        each.get_by_role("button", name="Generate").click()
    for each in (page, other):
        each.locator("#status", has_text=re.compile(r"\.png in ")).wait_for()
    made = [read_recipe(path) for path in set(served[1].glob("*.png")) - before]
    asked = {(recipe.settings.prompt, recipe.adapters[0].name) for recipe in made if recipe.settings}
    assert asked == {("a red house, in zwx style", "neon"), ("a blue cat, in sks style", "ink")}
    context.close()


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def test_a_preset_is_saved_and_loaded_again(page: Any) -> None:
    add_adapters(page, "zuki")
    fill_prompt(page, "a zuki on the beach")
    open_tab(page, "Presets")
    page.get_by_label("Preset name").fill("Zuki again")
    page.get_by_role("button", name="Save current blend as preset").click()
    page.get_by_text("Preset saved as Zuki again").wait_for()
    page.reload()
    open_tab(page, "Presets")
    page.locator(".thumbnails button", has_text="Zuki again").click()
    page.get_by_text("zuki:1").wait_for()
    page.get_by_role("button", name="Load preset").click()
    page.get_by_text("Preset loaded into the Blend tab").wait_for()
    open_tab(page, "Blend")
    page.get_by_role("checkbox", name="zuki", exact=True).wait_for()
    assert page.locator("#prompt textarea").input_value() == "a zuki on the beach"


def test_blend_is_merged(page: Any, served: tuple[str, Path]) -> None:
    add_adapters(page, "neon")
    open_tab(page, "Merge")
    page.get_by_label("Output name").fill("neon base")
    page.get_by_role("button", name="Preview merge").click()
    page.get_by_text("expected rounding error").wait_for()
    page.get_by_role("button", name="Merge", exact=True).click()
    page.get_by_text("Saved neon base").wait_for()
    assert (served[1] / "merged" / "neon base" / "model_index.json").is_file()


def test_adapter_is_trained_and_added_to_the_blend(page: Any) -> None:
    open_tab(page, "Train")
    page.get_by_label("Run name").fill("tiny ink")
    source = sample_data_folder() / "styles" / "ink"
    page.locator("input[type=file][multiple]").first.set_input_files(sorted(source.glob("0[0-3].*")))
    page.get_by_text("03.png").locator("visible=true").first.wait_for()
    page.get_by_label("Trigger word").fill("sks")
    page.get_by_role("button", name="Check dataset").click()
    page.get_by_text("4 samples per epoch").wait_for()
    page.get_by_label("Training steps").fill("4")
    page.get_by_role("button", name="Start training").click()
    page.get_by_text("Finished: step 4 of 4").wait_for(timeout=150_000)
    page.get_by_role("button", name="Add to library").click()
    page.get_by_text("to the library. Select it").wait_for()
    open_tab(page, "Blend")
    add_adapters(page, "tiny ink")


def test_grid_is_generated(page: Any) -> None:
    add_adapters(page, "neon")
    fill_prompt(page, "a house")
    open_tab(page, "Compare")
    page.get_by_label("X values").fill("0, 1")
    page.get_by_label("Y values").fill("0")
    page.get_by_role("button", name="Generate grid").click()
    page.get_by_text("Saved grids/").wait_for()


def test_every_control_has_a_label(page: Any) -> None:
    for name in ("Blend", "Compare", "Presets", "Merge", "Train", "Adapters"):
        open_tab(page, name)
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("input, textarea, select")].filter(e => e.offsetParent
            && e.type !== "file" && !e.labels?.length && !e.ariaLabel && !e.closest("label, [aria-label]"))
            .map(e => e.outerHTML.slice(0, 120))"""
        )
        assert unnamed == [], name


def test_closed_page_does_not_block_others(page: Any, served: tuple[str, Path], browser: Any) -> None:
    context = browser.new_context()
    leaver = context.new_page()
    leaver.set_default_timeout(25_000)
    leaver.goto(served[0])
    leaver.get_by_role("button", name="Generate").wait_for()
    set_steps(leaver, 200)
    fill_prompt(leaver, "a house that nobody waits for")
    leaver.get_by_role("button", name="Generate").click()
    leaver.locator("#status", has_text=re.compile(r"Step \d+ of 200")).wait_for()
    context.close()
    before = len(list(served[1].glob("*.png")))
    fill_prompt(page, "a red house")
    page.get_by_role("button", name="Generate").click()
    assert read_recipe(wait_for_image(page, served[1], before)).settings
