"""What is pushed to a Hub of our own on this machine, and what a Hub that says no leaves behind."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tuner.errors import TunerError
from tuner.inference.export import push

FILES = {"README.md": b"# card\n", "adapter_config.json": b"{}\n"}


@dataclass
class Hub:
    """The part of the Hub's API that an upload of small files uses."""

    refuses: bool = False
    url: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, bytes]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/repos/create"):
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/someone/model", "name": "someone/model"}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            return {
                "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            }
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/someone/model/commit/0"}
        return {"sha": "0" * 40, "id": "someone/model", "siblings": [], "endpoints": []}


@pytest.fixture
def hub() -> Iterator[Hub]:
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            served.tokens.add(self.headers.get("Authorization"))
            document = {"error": "no"} if served.refuses else served.answer(self.path, body)
            self.send_response(403 if served.refuses else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        do_GET = do_POST = reply  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("public", [False, True])
def test_all_files_in_one_commit(hub: Hub, directory: Path, public: bool) -> None:
    address = push(directory, "someone/model", token="hf_secret", public=public, endpoint=hub.url)
    assert address == f"{hub.url}/someone/model"
    assert hub.commits == [FILES]
    assert [made.get("private", made.get("visibility") == "private") for made in hub.created] == [not public]
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_refusal_says_how_to_go_on(hub: Hub, directory: Path) -> None:
    hub.refuses = True
    with pytest.raises(TunerError, match="refused the upload") as refused:
        push(directory, "someone/model", token="hf_secret", public=False, endpoint=hub.url)
    assert f"hf upload someone/model {directory} ." in str(refused.value)
    assert "hf_secret" not in str(refused.value)
    assert refused.value.exit_code == 1
    assert {path.name for path in directory.iterdir()} == set(FILES)


def test_nobody_there(directory: Path) -> None:
    with pytest.raises(TunerError, match="refused the upload"):
        push(directory, "someone/model", token="t", public=False, endpoint="http://127.0.0.1:9")
