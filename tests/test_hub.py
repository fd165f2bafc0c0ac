"""A name is asked for on the hub once, and what can only be on this disk, or cannot be asked for, is said at once."""

import http.server
import socket
import threading

import pytest
from huggingface_hub import constants

from lora_lightning import LoRAError
from lora_lightning.backbones.locate import refuse_not_there


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    """The hub is at this port of this machine, and its cache is empty."""

    def place(port):
        endpoint = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        path = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + path)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    return place


@pytest.fixture
def closed():
    """A port on which nothing answers."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def says_no():
    """A hub that has no model; the paths that it was asked for."""
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(401)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], asked
        server.shutdown()


@pytest.mark.parametrize("kind", ["model", "tokenizer", "set"])
def test_a_hub_that_cannot_be_reached_is_said_with_what_to_do(kind, hub_at, closed):
    hub_at(closed)
    with pytest.raises(LoRAError, match=rf"no {kind} 'org/bert': there is no such folder here, and the hub cannot be"):
        refuse_not_there(kind, "org/bert")


def test_a_hub_that_answers_is_asked_once_and_left_to_the_loader(hub_at, says_no):
    port, asked = says_no
    hub_at(port)
    refuse_not_there("model", "org/bert")
    refuse_not_there("set", "org/rows")
    assert asked == ["/org/bert/resolve/main/config.json", "/datasets/org/rows/resolve/main/README.md"]


def test_what_the_cache_or_the_disk_holds_is_asked_of_nobody(hub_at, closed, tmp_path):
    hub_at(closed)
    (tmp_path / "cache" / "models--org--bert").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    refuse_not_there("model", "org/bert")
    refuse_not_there("model", "mine")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./modles/bert", r"'./modles/bert': there is no such folder; did you mean 'models/bert'\?"),
        ("models/x/brt", r"there is no such folder$"),
        ("models/brt", r"no such folder here \(did you mean 'models/bert'\?\), nor .* HF_HUB_OFFLINE is set"),
    ],
)
def test_a_folder_that_is_not_there_is_told_without_the_hub(name, said, tmp_path):
    (tmp_path / "models" / "bert").mkdir(parents=True)
    with pytest.raises(LoRAError, match=said):
        refuse_not_there("model", name)
