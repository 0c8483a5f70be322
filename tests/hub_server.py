"""A small hub on localhost: as much of the Hugging Face hub's API as snapshot_download uses.

Models and data sets are served from local folders, one commit each; every request is kept.
"""

import hashlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub:
    """requests: the (method, path) of all. delays: file name -> seconds before it is sent. files:
    path -> bytes of what is sent besides, as by any server."""

    def __init__(self):
        self.repos, self.gated, self.requests, self.delays, self.files = {}, set(), [], {}, {}
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, kind, name, folder, gated=False):
        """Serve `folder` as the `kind` ("models" or "datasets") of that OWNER/NAME; gated: its
        files are refused."""
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        commit = hashlib.sha1(repr(files).encode()).hexdigest()
        self.repos[kind, name] = commit, files
        (self.gated.add if gated else self.gated.discard)((kind, name))

    def downloads(self):
        """The files sent: paths of the GET requests for files."""
        return [unquote(p) for method, p in self.requests if method == "GET" and "/resolve/" in p]

    def env(self, home, url=None):
        """Environment of a process that talks to this hub (or to `url`) and has HF_HOME `home`."""
        off = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        on = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY")
        caches = {"HF_HUB_CACHE": f"{home}/hub", "HF_DATASETS_CACHE": f"{home}/datasets"}
        proxies = {"NO_PROXY": "*", "no_proxy": "*"}
        server = {"HF_ENDPOINT": url or self.url, "HF_HOME": str(home), "HF_TOKEN": ""}
        return server | caches | proxies | dict.fromkeys(off, "0") | dict.fromkeys(on, "1")

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def oid(data):
    """git's blob id."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.hub.requests.append((self.command, self.path))
        path = unquote(urlsplit(self.path).path)
        if self.command == "GET":
            time.sleep(self.hub.delays.get(Path(path).name, 0))
        if path in self.hub.files:
            self.send(self.hub.files[path])
        elif api := API.fullmatch(path):
            self.answer(*api.groups())
        elif file := FILE.fullmatch(path):
            self.answer("datasets" if file[1] else "models", file[2], "file", *file.groups()[2:])
        else:
            self.fail(404, "NotFound")

    do_HEAD = do_GET

    def answer(self, kind, name, what, revision, file=None):
        if (kind, name) not in self.hub.repos:
            return self.fail(404, "RepoNotFound")
        commit, files = self.hub.repos[kind, name]
        if revision not in (None, "main", commit):
            return self.fail(404, "RevisionNotFound")
        if what == "tree":
            size = {path: dict(size=len(data), oid=oid(data)) for path, data in files.items()}
            rows = [{"type": "file", "path": path} | more for path, more in size.items()]
            return self.send(json.dumps(rows).encode())
        if what != "file":
            names = [{"rfilename": path} for path in files]
            about = {"id": name, "sha": commit, "private": False, "siblings": names}
            return self.send(json.dumps(about).encode())
        if (kind, name) in self.hub.gated:
            return self.fail(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        if file not in files:
            return self.fail(404, "EntryNotFound")
        self.send(files[file], {"ETag": f'"{oid(files[file])}"', "X-Repo-Commit": commit})

    def send(self, data, headers=None, status=200):
        self.send_response(status)
        about = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for key, value in (about | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status, code):
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def log_message(self, *_):
        pass
