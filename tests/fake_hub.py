"""A Hugging Face hub on this machine: repositories as dicts of files, the few calls that uploads and downloads make.

Started by itself it prints its address; nothing here knows persona_lens.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40


class FakeHub:
    """Serves on a port of its own inside a `with`; `files` are by (repository, path), `seen` every request."""

    def __init__(self, token="hf_fake", *, refuse=None):
        self.token, self.refuse = token, refuse
        self.files, self.seen, self.private = {}, [], {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format, *arguments):
                pass

            def do_HEAD(self):
                hub.answer(self, b"")

            def do_GET(self):
                hub.answer(self, b"")

            def do_POST(self):
                hub.answer(self, self.rfile.read(int(self.headers.get("content-length", 0))))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request, body):
        path = unquote(urlsplit(request.path).path)
        self.seen.append((request.command, path, request.headers.get("authorization")))
        if self.refuse or (
            request.command == "POST" and request.headers.get("authorization") != f"Bearer {self.token}"
        ):
            _reply(request, self.refuse or 401, {"error": "refused"})
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.private[name] = wanted.get("private") or wanted.get("visibility") == "private"
            _reply(request, 200, {"url": f"{self.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            _reply(request, 200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            _reply(request, 200, {"files": modes})
        elif "/commit/" in path:
            self._commit(request, path, body)
        elif path.startswith("/api/models/"):
            self._listing(request, path)
        else:
            self._file(request, path)

    def _commit(self, request, path, body):
        repo = "/".join(path.split("/")[3:5])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[repo, entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        _reply(request, 200, {"commitUrl": f"{self.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def _listing(self, request, path):
        repo = "/".join(path.split("/")[3:5])
        names = [name for owner, name in self.files if owner == repo]
        if not names:
            _reply(request, 404, {"error": "no such repository"})
        elif "/tree/" in path:
            sizes = {name: len(self.files[repo, name]) for name in names}
            _reply(request, 200, [{"type": "file", "path": n, "size": size, "oid": "0"} for n, size in sizes.items()])
        else:
            _reply(request, 200, {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})

    def _file(self, request, path):
        owner, name, _, _, *rest = path.split("/")[1:]
        content = self.files.get((f"{owner}/{name}", "/".join(rest)))
        if content is None:
            _reply(request, 404, {"error": "no such file"})
            return
        etag = {"etag": f'"{hashlib.sha1(content).hexdigest()}"', "x-repo-commit": COMMIT}
        _reply(request, 200, content, etag)


def _reply(request, status, content, headers=None):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request.send_response(status)
    kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
    for name, value in ({"content-type": kind, "content-length": str(len(body))} | (headers or {})).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
