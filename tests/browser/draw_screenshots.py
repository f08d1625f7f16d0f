"""Save the README's screenshots of the studio, one for each tab, to `sample_data/studio`.

PYTHONPATH=. python tests/browser/draw_screenshots.py
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from lora_diffusion.config.studio import StudioConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion_studio.app import serve
from lora_diffusion_studio.backend.studio import Studio
from tests.browser.test_studio_browser import CHROMIUM, open_tab

FOLDER = sample_data_folder() / "studio"


def blend(page: Any) -> None:
    open_tab(page, "Presets")
    page.get_by_label("Preset", exact=True).first.click()
    page.get_by_role("option", name="neon-gloop (built-in)").click()
    page.get_by_role("button", name="Load preset").click()
    page.get_by_text("Preset loaded into the Blend tab").wait_for()
    open_tab(page, "Blend")
    for seed in (2, 5, 7):
        page.get_by_label("Seed", exact=True).fill(str(seed))
        page.get_by_role("button", name="Generate").click()
        page.locator("#status", has_text=re.compile(f"0000{(2, 5, 7).index(seed)}.png in ")).wait_for()
    page.wait_for_timeout(1500)


def compare(page: Any) -> None:
    open_tab(page, "Compare")
    page.get_by_label("X values").fill("0, 0.3, 0.6, 0.9")
    page.get_by_label("Y values").fill("2, 5")
    page.get_by_role("button", name="Generate grid").click()
    page.get_by_text("Saved grids/").wait_for()
    page.wait_for_timeout(1500)


def presets(page: Any) -> None:
    open_tab(page, "Presets")
    page.get_by_label("Preset name").fill("Gloop at night")
    page.get_by_label("Description").fill("Mountains and stars")
    page.get_by_role("button", name="Save current blend as preset").click()
    page.get_by_text("Preset saved as Gloop at night").wait_for()
    page.wait_for_timeout(1500)


def merge(page: Any) -> None:
    open_tab(page, "Merge")
    page.get_by_label("Output name").fill("gloop in neon")
    page.get_by_role("button", name="Preview merge").click()
    page.get_by_text("expected rounding error").wait_for()


def train(page: Any) -> None:
    open_tab(page, "Train")
    page.get_by_label("Run name").fill("my ink")
    source = sample_data_folder() / "styles" / "ink"
    page.locator("input[type=file][multiple]").first.set_input_files(sorted(source.glob("0[0-5].*")))
    page.get_by_label("Trigger word").fill("sks")
    page.wait_for_timeout(2000)
    page.get_by_label("Training steps").fill("40")
    page.get_by_role("button", name="Start training").click()
    page.get_by_text("Finished: step 40 of 40").wait_for()
    page.wait_for_timeout(1500)


def adapters(page: Any) -> None:
    open_tab(page, "Adapters")
    page.get_by_label("Adapter", exact=True).click()
    page.get_by_role("option", name="neon (zwx)").click()
    page.get_by_role("button", name="Verify").click()
    page.get_by_text("no dead layers").wait_for()
    page.get_by_label("Adapters to plot").click()
    for name in ("neon (zwx)", "gloop (gloop)"):
        page.get_by_role("option", name=name).last.click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Plot spectra").click()
    page.locator(".plots img").nth(3).wait_for()
    page.wait_for_timeout(1500)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        output, messages = Path(scratch), list[str]()
        config = StudioConfig(output=output)
        app = serve(Studio(config), block=False, report=messages.append)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(messages[0].split()[5])
        page.get_by_role("button", name="Generate").wait_for()
        for number, tab in enumerate((blend, compare, presets, merge, train, adapters)):
            tab(page)
            path = FOLDER / f"{number + 1}-{tab.__name__}.png"
            page.screenshot(path=path, full_page=True)
            Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
            print(path)
        browser.close()
        app.close()


if __name__ == "__main__":
    main()
