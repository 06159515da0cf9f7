"""A hub on this machine's loopback address that the real `huggingface_hub` client talks to, and that writes down what it is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "maker/model"


class Hub(ThreadingHTTPServer):
    """Serves a folder's files as one repository. `fetched`: names of files whose content was sent. `listing`: may it be listed?"""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.fetched, self.unknown, self.listing = folder, [], [], True

    def files(self) -> dict[str, Path]:
        return {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*")) if path.is_file()}

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process whose hub this is."""
        kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN")}
        return {**kept, "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class _Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, with_content: bool):
        path, files = unquote(urlparse(self.path).path), self.server.files()
        if self.server.listing and re.fullmatch(rf"/api/models/{REPOSITORY}(/revision/(main|{COMMIT}))?", path):
            siblings = [{"rfilename": name, "size": file.stat().st_size} for name, file in files.items()]
            return self._send(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "tags": []}).encode(), with_content)
        if self.server.listing and re.fullmatch(rf"/api/models/{REPOSITORY}/tree/(main|{COMMIT})", path):
            tree = [{"type": "file", "path": name, "size": file.stat().st_size, "oid": _digest(file)[:40]} for name, file in files.items()]
            return self._send(json.dumps(tree).encode(), with_content)
        found = re.fullmatch(rf"/{REPOSITORY}/resolve/(main|{COMMIT})/(.+)", path)
        if found and found[2] in files:
            if with_content:
                self.server.fetched.append(found[2])
            headers = {"ETag": f'"{_digest(files[found[2]])}"', "X-Repo-Commit": COMMIT}
            return self._send(files[found[2]].read_bytes(), with_content, headers)
        self.server.unknown.append(path)
        more = {"X-Error-Code": "EntryNotFound" if found else "RepoNotFound", "X-Repo-Commit": COMMIT}
        return self._send(b"{}", with_content, more, 404)

    def _send(self, content: bytes, with_content: bool, headers: dict | None = None, status: int = 200):
        whole = len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and status == 200:
            first, last = int(asked[1]), min(int(asked[2] or whole - 1), whole - 1)
            content, status = content[first:last + 1], 206
            headers = {**(headers or {}), "Content-Range": f"bytes {first}-{last}/{whole}"}
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *args):
        """Quiet."""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def serving(folder: Path):
    """The hub, answering until the block ends."""
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
