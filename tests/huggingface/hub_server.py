"""A small Hugging Face hub on the loopback interface, with the routes that its client uses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "c" * 40


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub:
    """``repositories``: bytes of files by name, by "models/OWNER/NAME" or "datasets/OWNER/NAME".
    ``requests``: what was asked, as "GET /path"."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    """Answers the client from the ``hub`` of its server."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, code, body=b"", **headers) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        length = headers.get("Content_Length", len(content))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self) -> None:
        self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    def do_GET(self) -> None:
        hub, path = self.server.hub, unquote(self.path.partition("?")[0])
        hub.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/(models|datasets)/(.+?)/tree/([^/]+)", path):
            files = hub.repositories[f"{found[1]}/{found[2]}"]
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": oid(content)}
                for name, content in files.items()
            ]
            self.answer(200, listed)
        elif found := re.fullmatch(r"/api/(models|datasets)/(.+?)(?:/revision/([^/]+))?", path):
            self.describe(f"{found[1]}/{found[2]}", found[3] or "main")
        elif found := re.fullmatch(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)", path):
            self.send_file(f"{(found[1] or 'models/')}{found[2]}", found[4])
        else:
            self.missing()

    do_HEAD = do_GET

    def describe(self, repository, revision) -> None:
        if repository not in self.server.hub.repositories:
            self.missing()
            return
        if revision not in ("main", "v1", COMMIT):
            self.answer(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
            return
        files = [{"rfilename": name} for name in sorted(self.server.hub.repositories[repository])]
        name = repository.partition("/")[2]
        self.answer(200, {"id": name, "sha": COMMIT, "siblings": files, "private": False})

    def send_file(self, repository, name) -> None:
        content = self.server.hub.repositories.get(repository, {}).get(name)
        if content is None:
            self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound")
            return
        headers = {"ETag": f'"{oid(content)}"', "X_Repo_Commit": COMMIT}
        self.answer(200, content, Content_Length=str(len(content)), **headers)

    def do_POST(self) -> None:
        hub, path = self.server.hub, self.path.partition("?")[0]
        hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            hub.repositories.setdefault(f"models/{name}", {})
            hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.answer(200, {"url": f"{hub.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/(models/.+)/preupload/main", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif found := re.fullmatch(r"/api/(models/.+)/commit/main", path):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.repositories[found[1]][line["value"]["path"]] = content
            url = f"{hub.url}/{found[1].partition('/')[2]}/commit/{COMMIT}"
            self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self.missing()


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
