"""A Hugging Face Hub in memory, on loopback: as much of its protocol as pushing and pulling needs."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

RESOLVE = re.compile(r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(
    r"/api/(model|dataset|space)s/([^/]+/[^/]+?)(?:/(revision|tree|preupload|commit|branch|paths-info)/(.*))?"
)
LFS = re.compile(r"/(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "other"}


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)  # sha -> {path: content}
    branches: dict = field(default_factory=dict)  # name -> sha

    def commit(self, branch, files):
        sha = hashlib.sha1(f"{len(self.commits)} {id(self)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def find(self, revision):
        sha = self.branches.get(revision, revision)
        return sha, self.commits.get(sha)


class Hub(ThreadingHTTPServer):
    """`repositories[kind, id]`; `token` may do everything; a request whose path has `broken` in it fails."""

    token = "hf_right"
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.blobs, self.requests, self.broken = {}, {}, [], None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers.setdefault("Content_Length", len(body))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code=None, message=None, **headers):
        if code:
            headers["X_Error_Code"] = code
        if message:
            headers["X_Error_Message"] = message
        self.reply(status, {"error": message or code}, **headers)

    def handle_any(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.place = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, self.place))
        if self.server.broken and self.server.broken in self.place:
            return self.refuse(400, message="the connection broke")
        given = self.headers.get("Authorization")
        self.owner = given == f"Bearer {self.server.token}"
        if given and not self.owner:
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if self.place == "/api/validate-yaml":
            return self.validate_card()
        if self.place == "/api/repos/create":
            return self.create()
        if self.place.startswith("/blob/"):
            self.server.blobs[self.place.removeprefix("/blob/")] = self.body
            return self.reply(200)
        if match := LFS.fullmatch(self.place):
            return self.batch()
        if match := RESOLVE.fullmatch(self.place):
            kind, name, revision, path = match.groups()
            return self.resolve(kind.rstrip("s/") if kind else "model", name, revision, path)
        if match := API.fullmatch(self.place):
            return self.api(*match.groups())
        return self.refuse(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def repository(self, kind, name):
        """The repository, or None after refusing."""
        found = self.server.repositories.get((kind, name))
        if found is None or (found.private and not self.owner):
            # The Hub does not tell a stranger which names exist.
            return self.refuse(404 if self.owner else 401, "RepoNotFound", "Repository not found")
        if self.command in ("POST", "PUT") and not self.owner and "paths-info" not in self.place:
            return self.refuse(401, message="Invalid username or password.")
        return found

    def create(self):
        given = json.loads(self.body)
        if not self.owner:
            return self.refuse(401, message="Invalid username or password.")
        name = f"{given.get('organization') or 'me'}/{given['name']}"
        kind = given.get("type") or "model"
        if kind == "space" and given.get("sdk") not in ("gradio", "docker", "static"):
            return self.refuse(400, message='"sdk" must be one of gradio, docker, static')
        url = f"{self.server.url}/{'' if kind == 'model' else f'{kind}s/'}{name}"
        if (kind, name) in self.server.repositories:
            return self.reply(409, {"error": "exists", "url": url})
        repository = Repository(private=bool(given.get("private") or given.get("visibility") == "private"))
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.repositories[kind, name] = repository
        return self.reply(200, {"url": url, "name": name})

    def validate_card(self):
        import yaml

        content = json.loads(self.body)["content"]
        data = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        errors = []
        if (license := data.get("license", "mit")) not in LICENSES:
            errors.append({"message": f'"license" must be one of {sorted(LICENSES)}, got {license!r}'})
        for entry in data.get("model-index", []):
            for result in entry["results"]:
                if not {"type", "name"} <= result["dataset"].keys() or not result["metrics"]:
                    errors.append({"message": '"model-index" lacks a dataset or a metric'})
        return self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def batch(self):
        objects = []
        for entry in json.loads(self.body)["objects"]:
            if entry["oid"] not in self.server.blobs:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/blob/{entry['oid']}"}}
            objects.append(entry)
        self.reply(200, {"objects": objects, "transfer": "basic"})

    def resolve(self, kind, name, revision, path):
        if (repository := self.repository(kind, name)) is None:
            return
        sha, files = repository.find(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if repository.gated and not self.owner:
            return self.refuse(401, "GatedRepo", f"Access to model {name} is restricted.", X_Repo_Commit=sha)
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        content = files[path]
        etag = hashlib.sha256(content).hexdigest()
        self.reply(200, content, X_Repo_Commit=sha, ETag=f'"{etag}"', Content_Type="application/octet-stream")

    def api(self, kind, name, verb, rest):
        if (repository := self.repository(kind, name)) is None:
            return
        rest = rest or "main"
        if verb == "branch":
            repository.branches.setdefault(rest, repository.branches["main"])
            return self.reply(200, {})
        if verb == "preupload":
            files = json.loads(self.body)["files"]
            for file in files:
                large = file["path"].endswith((".safetensors", ".parquet", ".png"))
                file |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            return self.reply(200, {"files": files})
        if verb == "commit":
            return self.commit(repository, kind, name, rest)
        revision, _, folder = rest.partition("/")
        sha, files = repository.find(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if verb == "tree":
            listed = [path for path in files if not folder or path.startswith(f"{folder}/")]
            if folder and not listed:
                return self.refuse(404, "EntryNotFound", f"{folder} does not exist on {revision}", X_Repo_Commit=sha)
            return self.reply(200, self.describe(files, listed))
        if verb == "paths-info":
            asked = json.loads(self.body)["paths"]
            return self.reply(200, self.describe(files, [path for path in asked if path in files]))
        siblings = [{"rfilename": path} for path in files]
        self.reply(200, {"id": name, "sha": sha, "siblings": siblings, "private": repository.private, "tags": []})

    def describe(self, files, paths):
        described = []
        for path in paths:
            oid = hashlib.sha1(files[path]).hexdigest()
            described.append({"type": "file", "path": path, "size": len(files[path]), "oid": oid})
        return described

    def commit(self, repository, kind, name, branch):
        files = dict(repository.commits[repository.branches[branch]])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        sha = repository.commit(branch, files)
        url = f"{self.server.url}/{'' if kind == 'model' else f'{kind}s/'}{name}/commit/{sha}"
        self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


@contextmanager
def running_hub():
    """A [`Hub`] that answers while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
