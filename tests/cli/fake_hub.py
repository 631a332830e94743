"""A hub of one machine: the requests that a push and a download make, answered from memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        self.server.asked.append(f"{self.command} {self.path}")

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self._answer({"error": "no such token"}, 401)
        if self.path.startswith("/api/repos/create"):
            self.server.created = json.loads(body)
            return self._answer({"url": f"{self.server.address}/me/run", "id": "me/run", "name": "me/run"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            return self._answer({"files": files})
        if "/commit/" in self.path:
            for line in body.splitlines():
                record = json.loads(line)
                if record["key"] == "file":
                    content = record["value"]["content"]
                    self.server.files[record["value"]["path"]] = base64.b64decode(content)
            about = {
                "commitUrl": f"{self.server.address}/me/run/commit/{SHA}",
                "commitOid": SHA,
                "success": True,
            }
            return self._answer(about)
        return self._answer({"error": "not here"}, 404)

    def do_GET(self) -> None:
        self._body()
        path = self.path.split("?")[0]
        if path.startswith("/api/models/me/run/tree/"):
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": "0"}
                for name, content in self.server.files.items()
            ]
            return self._answer(rows)
        if path.startswith("/api/models/me/run") and self.server.files:
            names = [{"rfilename": name} for name in self.server.files]
            return self._answer({"id": "me/run", "sha": SHA, "siblings": names, "private": False})
        if path.startswith("/me/run/resolve/"):
            name = path.split("/", 5)[5]
            if name in self.server.files:
                content = self.server.files[name]
                digest = hashlib.sha1(content).hexdigest()
                return self._answer(content, X_Repo_Commit=SHA, ETag=f'"{digest}"')
        return self._answer({"error": "not here"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@contextmanager
def fake_hub() -> Iterator[Any]:
    """Serve; what was uploaded is in ``files``, what was asked in ``asked``."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.files, server.asked, server.created = {}, [], {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
