"""A small hub on localhost: as much of the Hugging Face hub's API as huggingface_hub and datasets use to read.

Models and data sets are served from local folders, one commit each, and every request is logged.
"""

import hashlib
import json
import os
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?"
)
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub:
    """`requests`: the (method, path) of every request. `delays`: file name -> seconds before it is sent, for tests of waiting."""

    def __init__(self):
        self.repos, self.gated, self.requests, self.delays = {}, set(), [], {}
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self})
        )
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, kind, name, folder, gated=False):
        """Serve `folder` as the `kind` ("models" or "datasets") of that OWNER/NAME; gated: its files are refused."""
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        commit = hashlib.sha1(
            repr([(file, oid(data)) for file, data in files.items()]).encode()
        ).hexdigest()
        self.repos[kind, name] = commit, files
        (self.gated.add if gated else self.gated.discard)((kind, name))

    def downloads(self):
        """The files sent: paths of the GET requests for files."""
        return [
            unquote(path)
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    def env(self, home, url=None):
        """Environment of a process that shall talk to this hub (or to `url`) and keep its cache in `home`."""
        return {
            "HF_ENDPOINT": url or self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": f"{home}/hub",
            "HF_DATASETS_CACHE": f"{home}/datasets",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_TOKEN": "",
            "NO_PROXY": "*",
            "no_proxy": "*",
        }

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
        url, length = urlsplit(self.path), int(self.headers.get("Content-Length") or 0)
        path, query = (
            unquote(url.path),
            parse_qs(self.rfile.read(length).decode() if length else url.query),
        )
        if api := API.fullmatch(path):
            return self.answer_api(*api.groups(), query)
        if file := FILE.fullmatch(path):
            return self.answer_file("datasets" if file[1] else "models", *file.groups()[1:])
        self.fail(404, "NotFound")

    do_HEAD = do_POST = do_GET

    def answer_api(self, kind, name, what, revision, under, query):
        if (kind, name) not in self.hub.repos:
            return self.fail(404, "RepoNotFound")
        commit, files = self.hub.repos[kind, name]
        if revision not in (None, "main", commit):
            return self.fail(404, "RevisionNotFound")
        if what in (None, "revision"):
            siblings = [{"rfilename": file} for file in files]
            return self.send(
                json.dumps(
                    {"id": name, "sha": commit, "private": False, "siblings": siblings}
                ).encode()
            )
        rows = {
            file: {"type": "file", "path": file, "size": len(data), "oid": oid(data)}
            for file, data in files.items()
        }
        for file in files:
            for folder in map(str, list(Path(file).parents)[:-1]):
                rows[folder] = {
                    "type": "directory",
                    "path": folder,
                    "size": 0,
                    "oid": hashlib.sha1(folder.encode()).hexdigest(),
                }
        if what == "paths-info":
            return self.send(
                json.dumps([rows[path] for path in query.get("paths", []) if path in rows]).encode()
            )
        deep, under = query.get("recursive", ["false"])[0].lower() == "true", under or ""
        inside = [
            row
            for path, row in rows.items()
            if os.path.dirname(path) == under or deep and path.startswith(under and under + "/")
        ]
        self.send(json.dumps(inside).encode()) if inside or not under else self.fail(
            404, "EntryNotFound"
        )

    def answer_file(self, kind, name, revision, file):
        if (kind, name) not in self.hub.repos:
            return self.fail(404, "RepoNotFound")
        if (kind, name) in self.hub.gated:
            return self.fail(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        commit, files = self.hub.repos[kind, name]
        if revision not in ("main", commit) or file not in files:
            return self.fail(
                404, "EntryNotFound" if revision in ("main", commit) else "RevisionNotFound"
            )
        if self.command == "GET":
            time.sleep(self.hub.delays.get(os.path.basename(file), 0))
        self.send(
            files[file],
            {
                "ETag": f'"{oid(files[file])}"',
                "X-Repo-Commit": commit,
                "Content-Type": "application/octet-stream",
            },
        )

    def send(self, data, headers=None, status=200):
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status, code):
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def log_message(self, *_):
        pass
