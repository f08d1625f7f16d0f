"""Reports and model cards: texts of users are escaped, and a variable that a template lacks is an error."""

import json
from dataclasses import replace

import pytest
from jinja2 import UndefinedError

from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.core.templates import render_template
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.workflows.adapters.hub_card import format_hub_card


def test_html_templates_escape_their_values() -> None:
    hostile = "</li><script>alert('x')</script>"
    values = dict.fromkeys(("name", "finished", "curves", "samples", "ranks", "all_settings"), hostile)
    lists = {key: [hostile] for key in ("outcome", "prompts")}
    rows = {key: [(hostile, hostile)] for key in ("changed_settings", "run")}
    page = render_template("lora_diffusion.workflows", "report.html.j2", **values, **lists, **rows)
    assert "<script>" not in page
    assert page.count("&lt;/li&gt;&lt;script&gt;alert(&#39;x&#39;)") == 13


def test_missing_variables_are_errors() -> None:
    with pytest.raises(UndefinedError, match="'name' is undefined"):
        render_template("lora_diffusion.workflows", "report.html.j2")


def test_model_card_quotes_trigger_words_for_yaml_and_does_not_escape_html() -> None:
    neon = load_adapter(sample_data_folder() / "adapters" / "neon.safetensors")
    words = ('a "quoted" <word>', "naïve")
    metadata = neon.metadata.model_copy(update={"trigger_words": words, "description": "Lines & light.", "name": "N"})
    card = format_hub_card(replace(neon, metadata=metadata), "n.v2.safetensors")
    front, _, text = card.removeprefix("---\n").partition("\n---\n")
    prompt = next(line for line in front.splitlines() if line.startswith("instance_prompt: "))
    assert json.loads(prompt.removeprefix("instance_prompt: ")) == ", ".join(words)
    assert "naïve" in prompt
    assert text.startswith("\n# N\n\nLines & light.\n\n| | |\n|---|---|\n| kind | ")
    assert text.endswith('```python\npipe.load_lora_weights("n.v2", weight_name="n.v2.safetensors")\n```\n')
