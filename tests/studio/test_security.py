"""The studio as a server: who may ask, from where, and for which files. Real requests to a real server."""

import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from PIL import Image

from lora_diffusion.cli import main
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError
from lora_diffusion_studio.api import parse_row
from lora_diffusion_studio.backend.studio import ImageSaved, Studio, StudioPaths
from lora_diffusion_studio.security import check_exposure
from lora_diffusion_studio.view_models.blend_form import BlendForm
from tests.helpers.server_end import close_quietly

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from lora_diffusion_studio.app import serve

    folder = tmp_path_factory.mktemp("safe")
    (folder / "secret.txt").write_text("hidden words")
    places = StudioPaths(library=sample_data_folder() / "adapters", output=folder / "out", bases=("tiny-sd",))
    said: list[str] = []
    app = serve(Studio(places), block=False, say=said.append)
    yield urlsplit(said[0].split()[5]).netloc
    close_quietly(app)


def ask(address: str, path: str, method: str = "GET", body: str = "", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request(method, path, body or None, {"Host": address, **headers})
    response = connection.getresponse()
    return response.status, response.read()


def test_its_owner_is_served(address: str) -> None:
    status, page = ask(address, "/")
    assert status == 200
    assert b"LoRA studio" in page


def test_another_name_for_this_machine_is_refused(address: str) -> None:
    assert ask(address, "/", Host="evil.example")[0] == 400


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join"])
def test_a_page_of_another_site_can_send_nothing(address: str, path: str) -> None:
    form = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert ask(address, path, "POST", form, Origin="http://evil.example", **kind)[0] == 403
    if path.endswith("upload"):
        assert ask(address, path, "POST", form, Origin=f"http://{address}", **kind)[0] == 200


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/monitoring", "/redoc"])
def test_what_nobody_needs_is_off(address: str, path: str) -> None:
    status, body = ask(address, path)
    assert status in (403, 404) or b"LoRA studio" in body


@pytest.mark.parametrize(
    "wanted",
    ["/etc/passwd", "../secret.txt", "..%2fsecret.txt", "pyproject.toml", "//host/share/x", "http://127.0.0.1:1/x"],
)
def test_no_other_file_is_served(address: str, wanted: str) -> None:
    status, body = ask(address, f"/gradio_api/file={quote(wanted, safe='/%:')}")
    assert status in (400, 403, 404)
    assert b"hidden words" not in body
    assert b"root:" not in body


@pytest.mark.parametrize(("host", "share"), [("0.0.0.0", False), ("192.168.1.5", False), ("127.0.0.1", True)])
def test_nobody_else_is_let_in_without_a_password(host: str, share: bool) -> None:
    for password in ("", "short"):
        with pytest.raises(ConfigError, match="give --password"):
            check_exposure(host, share=share, password=password)
    check_exposure(host, share=share, password="long enough")


def test_the_command_refuses_to_be_open_by_mistake(capsys: Any, tmp_path: Path) -> None:
    assert main(["ui", "--host", "0.0.0.0", "--output", str(tmp_path / "out")]) == 2
    assert "give --password" in capsys.readouterr().err
    assert main(["ui", "--base", "nowhere", "--output", str(tmp_path / "out")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_programs_find_nothing_unless_asked(address: str) -> None:
    from gradio_client import Client

    found: Any = Client(f"http://{address}", verbose=False).view_api(return_format="dict", print_info=False)
    assert found["named_endpoints"] == {}


def test_programs_get_the_pictures_of_the_library(tmp_path: Path) -> None:
    """Two clients at once, each with its own picture, bit for bit as when it is alone."""
    from gradio_client import Client

    from lora_diffusion_studio.app import serve

    places = StudioPaths(library=sample_data_folder() / "adapters", output=tmp_path / "out", bases=("tiny-sd",))
    studio, said = Studio(places), list[str]()
    app = serve(studio, api=True, block=False, say=said.append)
    clients = [Client(said[0].split()[5], verbose=False) for _ in range(2)]
    assert {card["name"] for card in clients[0].predict(api_name="/adapters")} >= {"neon.safetensors"}
    asked = [("a red house, in zwx style", "neon:0.7"), ("a blue cat, in sks style", "ink:0.9:start=0.2")]
    jobs = [
        client.submit(prompt=prompt, adapters=[adapter], steps=4, api_name="/generate")
        for client, (prompt, adapter) in zip(clients, asked, strict=True)
    ]
    pictures = [Path(job.result()["pictures"][0]) for job in jobs]
    with pytest.raises(Exception, match="the prompt is empty"):
        clients[0].predict(prompt=" ", adapters=[], api_name="/generate")
    close_quietly(app)
    for (prompt, adapter), picture in zip(asked, pictures, strict=True):
        form = BlendForm(
            rows=(parse_row(adapter),),
            settings={"prompt": prompt, "num_inference_steps": 4, "seed": 0, "guidance_scale": 4.0},
        )
        alone = next(event.path for event in studio.render(form) if isinstance(event, ImageSaved))
        with Image.open(alone) as ours, Image.open(picture) as theirs:
            assert ours.tobytes() == theirs.tobytes()
