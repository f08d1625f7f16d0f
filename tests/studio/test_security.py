"""Access control, tested with real requests to a real server."""

import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from lora_diffusion.cli import main
from lora_diffusion.config.studio import StudioConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.security import check_exposure
from tests.helpers.server_end import close_quietly

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from lora_diffusion_studio.app import serve

    folder = tmp_path_factory.mktemp("safe")
    (folder / "secret.txt").write_text("hidden words")
    config = StudioConfig(library=sample_data_folder() / "adapters", output=folder / "out", bases=("tiny-sd",))
    messages: list[str] = []
    app = serve(Studio(config), block=False, report=messages.append)
    yield urlsplit(messages[0].split()[5]).netloc
    close_quietly(app)


def ask(address: str, path: str, method: str = "GET", body: str = "", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request(method, path, body or None, {"Host": address, **headers})
    response = connection.getresponse()
    return response.status, response.read()


def test_local_requests_are_served(address: str) -> None:
    status, page = ask(address, "/")
    assert status == 200
    assert b"LoRA studio" in page


def test_other_host_names_are_refused(address: str) -> None:
    assert ask(address, "/", Host="evil.example")[0] == 400


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join"])
def test_requests_of_other_sites_are_refused(address: str, path: str) -> None:
    form = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert ask(address, path, "POST", form, Origin="http://evil.example", **kind)[0] == 403
    if path.endswith("upload"):
        assert ask(address, path, "POST", form, Origin=f"http://{address}", **kind)[0] == 200


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/monitoring", "/redoc"])
def test_unused_routes_are_closed(address: str, path: str) -> None:
    status, body = ask(address, path)
    assert status in (403, 404) or b"LoRA studio" in body


@pytest.mark.parametrize(
    "wanted",
    ["/etc/passwd", "../secret.txt", "..%2fsecret.txt", "pyproject.toml", "//host/share/x", "http://127.0.0.1:1/x"],
)
def test_files_outside_the_output_folder_are_not_served(address: str, wanted: str) -> None:
    status, body = ask(address, f"/gradio_api/file={quote(wanted, safe='/%:')}")
    assert status in (400, 403, 404)
    assert b"hidden words" not in body
    assert b"root:" not in body


@pytest.mark.parametrize(("host", "share"), [("0.0.0.0", False), ("192.168.1.5", False), ("127.0.0.1", True)])
def test_access_from_other_machines_requires_a_password(host: str, share: bool) -> None:
    for password in ("", "short"):
        with pytest.raises(ConfigError, match="give --password"):
            check_exposure(host, share=share, password=password)
    check_exposure(host, share=share, password="long enough")


def test_command_requires_a_password_and_an_existing_base(capsys: Any, tmp_path: Path) -> None:
    assert main(["ui", "--host", "0.0.0.0", "--output", str(tmp_path / "out")]) == 2
    assert "give --password" in capsys.readouterr().err
    assert main(["ui", "--base", "nowhere", "--output", str(tmp_path / "out")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_no_endpoints_without_the_api_flag(address: str) -> None:
    from gradio_client import Client

    found: Any = Client(f"http://{address}", verbose=False).view_api(return_format="dict", print_info=False)
    assert found["named_endpoints"] == {}
