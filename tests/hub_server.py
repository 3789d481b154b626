"""A Hugging Face Hub small enough for a test: repositories in memory, the endpoints that the real client uses."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Holds `repos[repo_id][revision] -> {path: bytes}`; revisions in order, the last one is main."""

    def __init__(self):
        self.repos = {}
        self.blobs = {}
        self.commits = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            thread.join()

    def files(self, repo_id):
        return list(self.repos[repo_id].values())[-1]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def missing(self, code):
        self.reply({"error": code}, 404, X_Error_Code=code)

    def do_POST(self):
        path, body, hub = unquote(urlsplit(self.path).path), self.body(), self.hub
        if path == "/api/repos/create":
            request = json.loads(body)
            repo_id = f"{request.get('organization') or 'user'}/{request['name']}"
            if repo_id in hub.repos:
                return self.reply({"error": "exists", "url": f"{hub.url}/{repo_id}"}, 409)
            hub.repos[repo_id] = {}
            return self.reply({"url": f"{hub.url}/{repo_id}", "name": repo_id, "id": repo_id})
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return self.reply(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return self.reply(
                {
                    "transfer": "basic",
                    "objects": [
                        {**item, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}} for item in objects
                    ],
                }
            )
        if "/commit/" in path:
            repo_id = "/".join(path.split("/")[3:5])
            files = dict(hub.files(repo_id)) if hub.repos[repo_id] else {}
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "deletedFile":
                    del files[value["path"]]
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                elif entry["key"] == "header":
                    hub.commits.append((repo_id, value["summary"]))
            revision = hashlib.sha1(f"{repo_id}{len(hub.commits)}".encode()).hexdigest()
            hub.repos[repo_id][revision] = files
            url = f"{hub.url}/{repo_id}/commit/{revision}"
            return self.reply({"commitUrl": url, "commitOid": revision, "success": True})
        return self.reply({"error": path}, 501)

    def do_PUT(self):
        content = self.body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.blobs[oid] = content
        self.reply()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        if api:
            parts = parts[2:]
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        if repo_id not in self.hub.repos:
            return self.missing("RepoNotFound")
        revision, files = list(self.hub.repos[repo_id].items() or [("0" * 40, {})])[-1]
        if api and (not rest or rest[0] == "revision"):
            siblings = [{"rfilename": name} for name in files]
            return self.reply({"id": repo_id, "modelId": repo_id, "sha": revision, "siblings": siblings, "tags": []})
        if api and rest[0] == "tree":
            tree = [{"type": "file", "path": n, "size": len(c), "oid": revision} for n, c in files.items()]
            return self.reply(tree)
        if not api and rest[0] == "resolve":
            name = "/".join(rest[2:])
            if name not in files:
                return self.reply({"error": name}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=revision)
            content = files[name]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            size = str(len(content))
            return self.reply(content, X_Repo_Commit=revision, ETag=etag, X_Linked_ETag=etag, X_Linked_Size=size)
        return self.missing("EntryNotFound")

    do_HEAD = do_GET
