"""A stand-in for the Hugging Face hub on loopback: as much of its HTTP interface as a push and a download use.

Repositories are lists of commits in memory, each a mapping of paths to bytes; what a request did not say with the token
``TOKEN`` it may not write, and may not see of a private repository.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_stand_in"


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha -> files
    revisions: dict[str, str] = field(default_factory=dict)  # branch or tag -> sha

    def commit(self, files: dict[str, bytes]) -> str:
        merged = {**self.commits.get(self.revisions.get("main", ""), {}), **files}
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(merged)}".encode()).hexdigest()
        self.commits[sha] = merged
        self.revisions["main"] = sha
        return sha


class Hub:
    """``url`` answers while the block runs; with ``refuse_commits`` no commit is accepted."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.refuse_commits = False
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on requests get no answer, as without a network."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.0"  # a connection a request, so that none outlives ``stop``

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"POST {path}")
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b"".join(self._chunks())
        if path == "/api/validate-yaml":
            return self._validate(json.loads(content)["content"])
        if not self._known():
            return self._error(401, "", "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            fields = json.loads(content)
            name = f"{fields.get('organization') or 'me'}/{fields['name']}"
            exists = name in self.hub.repositories
            visible = fields.get("visibility") or ("private" if fields.get("private") else "public")
            self.hub.repositories.setdefault(name, Repository(private=visible == "private"))
            if exists:
                return self._error(409, "", "You already created this model repo", url=f"{self.hub.url}/{name}")
            return self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        found = re.fullmatch(r"/api/models/(.+)/(preupload|commit)/([^/]+)", path)
        if not found or found[1] not in self.hub.repositories:
            return self._error(404, "RepoNotFound", "Repository not found")
        if found[2] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(content)["files"]
            ]
            return self._json({"files": files})
        if self.hub.refuse_commits:
            return self._error(403, "", "Forbidden: you must use a write token to upload to a repository.")
        lines = [json.loads(line) for line in content.splitlines() if line.strip()]
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        sha = self.hub.repositories[found[1]].commit(added)
        return self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{found[1]}/commit/{sha}"})

    def _get(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        found = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+))?(?:/)?", path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        name, revision = (file[1], file[2]) if file else (found[1], found[3]) if found else ("", "")
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._known()):
            return self._error(401, "RepoNotFound", "Repository not found")
        sha = repository.revisions.get(revision or "main", revision)
        if sha not in repository.commits:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[sha]
        if file:
            if file[3] not in files:
                return self._error(404, "EntryNotFound", "Entry not found")
            headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(files[file[3]])}"'}
            return self._send(200, files[file[3]] if body else b"", headers, length=len(files[file[3]]))
        if found and found[2] == "tree":
            entries = [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in sorted(files.items())]
            return self._json(entries)
        siblings = [{"rfilename": p} for p in sorted(files)]
        return self._json(
            {"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings}
        )

    def _validate(self, card: str) -> None:
        """As the hub does: the YAML at the top has to be some, and a model-index complete."""
        _, top, _ = card.split("---\n", 2)
        data = yaml.safe_load(top)
        for entry in data.get("model-index", []):
            for result in entry["results"]:
                assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"], result
                assert all(metric["type"] and metric["value"] is not None for metric in result["metrics"]), result
        self._json({"errors": [], "warnings": []})

    def _known(self) -> bool:
        return self.headers.get("Authorization", self.headers.get("authorization")) == f"Bearer {TOKEN}"

    def _chunks(self) -> Any:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _json(self, payload: Any) -> None:
        self._send(200, json.dumps(payload).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, **more: str) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message, **more}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
