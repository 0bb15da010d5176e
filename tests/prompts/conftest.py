import hashlib
import json

import hub_server as hub_module
import pytest


def _dataset_tree(self, body: bytes, repo_id: str, folder: str | None) -> None:
    """One level of a repository, as the Hub lists it."""
    if repo_id not in self.hub.repos:
        return self._no_repo()
    prefix = f"{folder}/" if folder else ""
    found: dict[str, dict] = {}
    for path, content in sorted(self.hub.repos[repo_id].items()):
        if path.startswith(prefix):
            name, _, deeper = path.removeprefix(prefix).partition("/")
            found[name] = {"type": "file", "path": prefix + name, "size": len(content), "oid": _blob_id(content)}
            if deeper:
                found[name] = {"type": "directory", "path": prefix + name, "oid": _blob_id(name.encode())}
    if folder and not found:
        return self._error(404, f"{folder} does not exist", code="EntryNotFound")
    self._json(list(found.values()))


def _dataset_paths(self, body: bytes, repo_id: str) -> None:
    files = self.hub.repos[repo_id]
    wanted = json.loads(body)["paths"]
    self._json(
        [
            {"type": "file", "path": path, "size": len(files[path]), "oid": _blob_id(files[path])}
            for path in wanted
            if path in files
        ]
    )


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def dataset_hub(hub_server, monkeypatch, tmp_path):
    """`hub_server`, which serves its repositories as data sets too: `hub_server.repos[repo_id] = {path: content}`."""
    handler = hub_module._Handler
    repo, rev = r"/api/datasets/([^/]+/[^/]+)", r"[^/]+"
    routes = [
        ("GET", rf"{repo}(?:/revision/{rev})?", "repo_info"),
        ("GET", rf"{repo}/tree/{rev}(?:/(.+?))?/?", "dataset_tree"),
        ("POST", rf"{repo}/paths-info/{rev}", "dataset_paths"),
        ("GET", r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("HEAD", r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    ]
    monkeypatch.setattr(handler, "routes", [*routes, *handler.routes])
    monkeypatch.setattr(handler, "dataset_tree", _dataset_tree, raising=False)
    monkeypatch.setattr(handler, "dataset_paths", _dataset_paths, raising=False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub_server.url)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
    for repo_id in ("ymhao/HPDv2", "sayakpaul/drawbench", "CodeGoat24/UniGenBench", "tester/prompts"):
        hub_server.private[repo_id] = False
    return hub_server
