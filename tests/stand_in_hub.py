"""
A stand-in for the model and dataset hub, over HTTP on the loopback: what huggingface_hub and datasets ask for, no more.

A folder ROOT/models/ORG/NAME or ROOT/datasets/ORG/NAME is a repository with one revision, `main`. Some repositories can
be made to fail: gated ones let nobody in, lost ones have no revision `main`, broken ones end downloads half-way.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse


class Hub:
    """What the server serves and how. asked: (method, path) of every request so far."""

    def __init__(self, root: Path):
        self.root, self.gated, self.lost, self.broken, self.asked = root, set(), set(), set(), []

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()

    def files(self, kind: str, repo: str) -> dict[str, Path]:
        folder = self.root / kind / repo
        return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}

    def entries(self, kind: str, repo: str, under: str = "", recursive: bool = True) -> list[dict]:
        """Files and folders below `under`, in the form of the hub's trees."""
        files, folders = [], set()
        for name, path in self.files(kind, repo).items():
            if under and not name.startswith(f"{under}/"):
                continue
            rest = name[len(under) + 1 if under else 0 :].split("/")
            for depth in range(1, len(rest) if recursive else min(len(rest), 2)):
                folders.add("/".join([*([under] if under else []), *rest[:depth]]))
            if recursive or len(rest) == 1:
                files.append({"type": "file", "oid": oid(path), "size": path.stat().st_size, "path": name})
        return [{"type": "directory", "oid": "0" * 40, "size": 0, "path": f} for f in sorted(folders)] + files


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def reply(self, code: int, body: bytes = b"", headers: dict | None = None, promised: int | None = None):
        self.send_response(code)
        for name, value in {"Content-Length": len(body) if promised is None else promised, **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value):
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: int, kind: str, message: str):
        self.reply(code, b"", {"X-Error-Code": kind, "X-Error-Message": message})

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        url = urlparse(self.path)
        self.hub.asked.append((self.command, unquote(self.path)))
        parts = unquote(url.path).strip("/").split("/")
        if parts[0] == "api":
            return self.api(parts[1:], parse_qs(url.query), body)
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        if "resolve" not in parts:
            return self.refuse(404, "EntryNotFound", "no such page")
        at = parts.index("resolve")
        repo, revision, name = "/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :])
        if self.admitted(kind, repo, revision):
            self.file(kind, repo, name)

    def admitted(self, kind: str, repo: str, revision: str) -> bool:
        """Whether the client may read the repository; if not, it has been told so."""
        if not self.hub.files(kind, repo):
            self.refuse(401, "RepoNotFound", "Invalid username or password.")
        elif repo in self.hub.gated:
            code = 403 if "Authorization" in self.headers else 401
            self.refuse(code, "GatedRepo", f"Access to {repo} is restricted.")
        elif revision not in ("main", self.hub.commit(repo)) or repo in self.hub.lost:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def file(self, kind: str, repo: str, name: str):
        path = self.hub.files(kind, repo).get(name)
        if path is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        body, headers = path.read_bytes(), {"ETag": f'"{oid(path)}"', "X-Repo-Commit": self.hub.commit(repo)}
        headers["Accept-Ranges"] = "bytes"
        if repo in self.hub.broken and self.command == "GET" and len(body) > 1000:
            self.reply(200, body[: len(body) // 2], headers, promised=len(body))
            self.close_connection = True
            return None
        wanted = self.headers.get("Range", "")
        if not wanted.startswith("bytes="):
            return self.reply(200, body, headers)
        first, _, last = wanted[6:].partition("-")
        first, last = int(first), min(int(last or len(body) - 1), len(body) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        return self.reply(206, body[first : last + 1], headers)

    def api(self, parts: list[str], query: dict, body: str):
        kind, parts = parts[0], parts[1:]
        if kind not in ("models", "datasets"):
            return self.refuse(404, "EntryNotFound", "no such page")
        verbs = [verb for verb in ("revision", "tree", "paths-info", "refs") if verb in parts]
        at = parts.index(verbs[0]) if verbs else len(parts)
        repo, verb, rest = "/".join(parts[:at]), verbs[0] if verbs else "revision", parts[at + 1 :]
        if repo in self.hub.gated and verb == "revision":  # who may not download may still see that there is one
            return self.json(self.info(kind, repo))
        if not self.admitted(kind, repo, rest[0] if rest else "main"):
            return None
        if verb == "revision":
            return self.json(self.info(kind, repo))
        if verb == "tree":
            under, recursive = "/".join(rest[1:]), query.get("recursive", ["false"])[0].lower() == "true"
            found = self.hub.entries(kind, repo, under, recursive)
            known = {entry["path"] for entry in self.hub.entries(kind, repo)}
            if under and not found and under not in known:
                return self.refuse(404, "EntryNotFound", f"{under} does not exist")
            return self.json(found)
        if verb == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            everything = {entry["path"]: entry for entry in self.hub.entries(kind, repo)}
            return self.json([everything[path] for path in wanted if path in everything])
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.hub.commit(repo)}
        return self.json({"branches": [branch], "tags": [], "converts": []})

    def info(self, kind: str, repo: str) -> dict:
        siblings = [{"rfilename": name} for name in self.hub.files(kind, repo)]
        return {"_id": "0", "id": repo, "sha": self.hub.commit(repo), "siblings": siblings, "tags": [],
                "private": False, "gated": repo in self.hub.gated, "downloads": 0, "likes": 0}  # fmt: skip


@contextmanager
def serving(root: Path):
    """Yields the Hub of the folder, its address in `address`."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
