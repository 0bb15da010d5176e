"""A small Hugging Face Hub on the loopback interface: enough of its HTTP API for the real client to push and load."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png", ".jpg")


class HubServer:
    """
    A context manager; while it is open the Hub answers at `url`.

    Attributes:
        url (`str`): address, `http://127.0.0.1:port`.
        user, token (`str`): the one account and its token; other tokens are refused with 401.
        repos (`dict[str, dict[str, bytes]]`): files of each repository's main branch; those of another are
            under `owner/name@branch`.
        private (`dict[str, bool]`): whether a repository was made private.
        commits (`list[tuple[str, str]]`): repository and title of each commit, in order.
        requests (`list[tuple[str, str]]`): method and path of each request, in order.
        environment (`dict[str, str]`): environment variables that lead a subprocess here.
    """

    def __init__(self, user: str = "tester", token: str = "hf_loopback"):
        self.user, self.token = user, token
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, str]] = []
        self.requests: list[tuple[str, str]] = []
        self._blobs: dict[str, bytes] = {}  # large files by sha256, before and after they are committed
        self._failures: list[tuple[str, int, str]] = []
        self._lock = threading.Lock()

    def fail(self, path: str, status: int, message: str = "on purpose") -> None:
        """From now on, requests whose path matches the regular expression `path` are answered with an error."""
        self._failures.append((path, status, message))

    def heal(self) -> None:
        """Undoes `fail`."""
        self._failures.clear()

    def tag(self, repo_id: str, name: str) -> None:
        """Gives the main branch, as it is, another name."""
        self.repos[f"{repo_id}@{name}"] = self.repos[repo_id]

    def revision(self, repo_id: str) -> str:
        """The commit that a repository, or a branch of it, is at: a hash of its files."""
        digest = hashlib.sha1(repo_id.partition("@")[0].encode())
        for path, content in sorted(self.repos[repo_id].items()):
            digest.update(path.encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": self.token}

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    # (method, path) -> what answers; the groups are its arguments
    routes = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "create_branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(\w{64})", "lfs_upload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "repo_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", "tree"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("HEAD", r"/api/telemetry/.*", "telemetry"),
    ]
    public = ("lfs_upload", "telemetry")  # the address of an upload is itself the permission

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        with self.hub._lock:
            self.hub.requests.append((self.command, path))
            for pattern, status, message in self.hub._failures:
                if re.search(pattern, path):
                    return self._error(status, message)
            for method, pattern, name in self.routes:
                match = re.fullmatch(pattern, path)
                if method == self.command and match:
                    if name not in self.public and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                        return self._error(401, "Invalid username or password.")
                    return getattr(self, name)(body, *match.groups())
            self._error(404, f"This server does not speak {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    # ---- What the Hub answers ----

    def whoami(self, body: bytes) -> None:
        self._json({"type": "user", "name": self.hub.user, "auth": {"accessToken": {"role": "write"}}})

    def create_repo(self, body: bytes) -> None:
        request = json.loads(body)
        owner = request.get("organization") or self.hub.user
        repo_id = f"{owner}/{request['name']}"
        if owner != self.hub.user:
            return self._error(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": url}, status=409)
        self.hub.repos[repo_id] = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        self.hub.private[repo_id] = request.get("visibility") == "private"
        self._json({"url": url, "name": repo_id})

    def validate_card(self, body: bytes) -> None:
        match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", json.loads(body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, status=400)
        if not isinstance(metadata, dict):
            return self._json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        errors = [
            {"message": f'"{name}" must be a string'}
            for name in ("license", "library_name", "pipeline_tag")
            if not isinstance(metadata.get(name, ""), str)
        ]
        self._json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def create_branch(self, body: bytes, repo_id: str, branch: str) -> None:
        if repo_id not in self.hub.repos:
            return self._no_repo()
        if branch == "main" or f"{repo_id}@{branch}" in self.hub.repos:
            return self._error(409, "Reference already exists")
        self.hub.repos[f"{repo_id}@{branch}"] = dict(self.hub.repos[repo_id])
        self._json({})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if (at := self._at(repo_id, revision)) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": self._oid(self.hub.repos[at].get(file["path"]), file["path"]),
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        if repo_id not in self.hub.repos:
            return self._no_repo()
        objects = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self.hub._blobs:
                entry = {**entry, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "The content does not match its sha256")
        self.hub._blobs[oid] = body
        self._json({})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        if (at := self._at(repo_id, revision)) is None:
            return
        # Nothing is changed until the whole commit is known to be good
        files, title = dict(self.hub.repos[at]), None
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub._blobs:
                    return self._error(400, f"{value['path']}: its content was never uploaded")
                files[value["path"]] = self.hub._blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
            else:
                return self._error(400, f"unknown operation {entry['key']}")
        self.hub.repos[at] = files
        self.hub.commits.append((at, title))
        revision = self.hub.revision(at)
        self._json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{revision}", "commitOid": revision})

    def repo_info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
        if (at := self._at(repo_id, revision)) is None:
            return
        siblings = [{"rfilename": path} for path in sorted(self.hub.repos[at])]
        self._json(
            {
                "_id": repo_id,
                "id": repo_id,
                "modelId": repo_id,
                "sha": self.hub.revision(at),
                "private": self.hub.private[repo_id],
                "siblings": siblings,
            }
        )

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        if (at := self._at(repo_id, revision)) is None:
            return
        files = self.hub.repos[at]
        self._json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(files.items())
            ]
        )

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        if (at := self._at(repo_id, revision)) is None:
            return
        content = self.hub.repos[at].get(path)
        if content is None:
            return self._error(404, "Entry not found", code="EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": self.hub.revision(at)}
        self._send(200, content, "application/octet-stream", headers)

    def telemetry(self, body: bytes) -> None:
        self._json({})

    # ---- HTTP ----

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @staticmethod
    def _oid(content: bytes | None, path: str) -> str | None:
        """What the client compares to see whether a file has changed: git's blob id, or the sha256 of a large file."""
        if content is None:
            return None
        if path.endswith(_LFS_SUFFIXES):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def _at(self, repo_id: str, revision: str | None) -> str | None:
        """Where the files of a revision are; `None` once it is answered that there is none."""
        if repo_id not in self.hub.repos:
            return self._no_repo()
        if revision in (None, "main") or re.fullmatch(r"[0-9a-f]{40}", revision):
            return repo_id
        if f"{repo_id}@{revision}" not in self.hub.repos:
            return self._error(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return f"{repo_id}@{revision}"

    def _no_repo(self) -> None:
        self._error(404, "Repository not found", code="RepoNotFound")

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), "application/json", headers)

    def _json(self, value: object, status: int = 200, content_type: str = "application/json") -> None:
        self._send(status, json.dumps(value).encode(), content_type, {})

    def _send(self, status: int, content: bytes, content_type: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Silent: `HubServer.requests` is the log."""
