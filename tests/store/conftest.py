"""A hub that runs in the test and is asked by huggingface_hub itself."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from cmdgen.cli.app import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_accepted"


@dataclass
class Hub:
    """Repositories of the files of folders, by OWNER/NAME."""

    folders: dict[str, Path] = field(default_factory=dict)
    # files that a request was made for; all requests
    asked: list[str] = field(default_factory=list)
    requests: int = 0
    # repositories whose files need the token
    gated: set[str] = field(default_factory=set)
    # after so many bytes of a file the connection breaks, once; where the rest of it was asked for
    breaks: dict[str, int] = field(default_factory=dict)
    resumed: list[tuple[str, int]] = field(default_factory=list)
    # files that the hub fails to send; whose bytes it has sent
    refused: set[str] = field(default_factory=set)
    sent: list[str] = field(default_factory=list)
    # what every request, or every one for a file, is refused with
    status: int | None = None
    code: str | None = None
    files_alone: bool = False

    @property
    def folder(self) -> Path:
        return self.folders["acme/model"]

    @folder.setter
    def folder(self, folder: Path) -> None:
        self.folders["acme/model"] = folder

    def names(self, repo: str = "acme/model") -> list[str]:
        files = (path for path in self.folders[repo].rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.folders[repo])) for path in files)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"{}", sent: int | None = None, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:sent])

        def send_file(self, repo: str, file: str) -> None:
            served.asked.append(file)
            served.sent += [file] * (self.command == "GET")
            body = (served.folders[repo] / file).read_bytes()
            about = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
            if (part := self.headers.get("Range")) is None:
                sent = served.breaks.pop(file, None) if self.command == "GET" else None
                return self.answer(200, body, sent, **about)
            start = int(part.removeprefix("bytes=").rstrip("-"))
            served.resumed.append((file, start))
            about["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            return self.answer(206, body[start:], **about)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
            file = path.partition(f"/resolve/{COMMIT}/")[2]
            served.requests += 1
            opened = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if served.status and (file or not served.files_alone):
                self.answer(served.status, X_Error_Code=served.code or "")
            elif repo not in served.folders:
                self.answer(404, X_Error_Code="RepoNotFound")
            elif file and repo in served.gated and not opened:
                # who has no token at all is not known
                self.answer(403 if "Authorization" in self.headers else 401, X_Error_Code="GatedRepo")
            elif file in served.refused and self.command == "GET":
                self.answer(503)
            elif file:
                self.send_file(repo, file)
            elif "/tree/" in path:
                entries = [
                    {
                        "type": "file",
                        "path": name,
                        "oid": hashlib.sha1(name.encode()).hexdigest(),
                        "size": (served.folders[repo] / name).stat().st_size,
                    }
                    for name in served.names(repo)
                ]
                self.answer(200, json.dumps(entries).encode())
            elif "/revision/" in path and not path.endswith(("/main", COMMIT)):
                self.answer(404, X_Error_Code="RevisionNotFound")
            else:
                files = [
                    {"rfilename": name, "size": (served.folders[repo] / name).stat().st_size}
                    for name in served.names(repo)
                ]
                info = {"id": repo, "sha": COMMIT, "siblings": files}
                self.answer(200, json.dumps(info).encode())

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def models(capsys):
    """Runs a command in this process: its exit code, stdout, and the last line of stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["models", *arguments])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, [*err.splitlines(), ""][-2] if err else ""

    return run
