"""What every test shares. The environment is set first, before any library reads it."""

import os
import sys
import tempfile
from pathlib import Path


# Nothing may leave this machine, and no file or token of the user's be read: an own, empty home for the Hub's client,
# a dead address for its server, no network. `hub_server` opens the way to a loopback server for one test.
_HF_HOME = tempfile.TemporaryDirectory(prefix="trl_flow-tests-")
os.environ.update(
    {
        "HF_HOME": _HF_HOME.name,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_XET": "1",  # the loopback server speaks the older protocol
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The models are so small that more threads only wait for each other, and each core has its own pytest worker
        "OMP_NUM_THREADS": "1",
    }
)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "CI"):  # CI makes TRL skip the code that sends telemetry
    os.environ.pop(_name, None)
# Helpers that tests import (`tiny_models`, `hub_server`)
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import StableDiffusion3Pipeline  # noqa: E402
from hub_server import HubServer  # noqa: E402
from reward_server import ServerParent  # noqa: E402
from tiny_models import tiny_sd3_pipeline  # noqa: E402


torch.set_num_threads(1)  # torch may have been imported by a plugin, before the variable above


@pytest.fixture(scope="session")
def tiny_sd3_path(tmp_path_factory) -> str:
    """A folder with a complete tiny Stable Diffusion 3 pipeline, for `DiffusionPipeline.from_pretrained(path)`."""
    path = tmp_path_factory.mktemp("models") / "tiny-sd3"
    tiny_sd3_pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture
def tiny_sd3(tiny_sd3_path) -> StableDiffusion3Pipeline:
    """A freshly loaded pipeline from `tiny_sd3_path`, for the test to change as it likes."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def reduced(monkeypatch, tmp_path, tiny_sd3_path):
    """An empty working folder, in which trainers are tiny."""
    from reduced_trainers import TRAINERS, Reduced

    import trl_flow.trainer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Reduced, "tiny_path", tiny_sd3_path)
    for trainer in TRAINERS:
        monkeypatch.setattr(trl_flow.trainer, trainer.__name__, trainer)
    return tmp_path


@pytest.fixture
def hub_server(monkeypatch, tmp_path):
    """
    A Hub on the loopback interface, to which every call of huggingface_hub in this process goes during the test.

    For subprocesses pass `env={**os.environ, **hub_server.environment}`.
    """
    with HubServer() as server:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
        monkeypatch.setattr(
            f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        # Clients that are kept, with the address of the time when they were made
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def server_parent(tmp_path_factory):
    """Starts reward servers quickly; see `serve_rewards`."""
    parent = ServerParent(tmp_path_factory.mktemp("servers"))
    yield parent
    parent.close()


@pytest.fixture
def serve_rewards(server_parent):
    """
    A function that starts a reward server: `serve_rewards("--max-images", "4", rewards="jpeg_compressibility")`.

    Servers that are still running when the test ends are killed.
    """
    servers = []

    def serve(*options, **settings):
        servers.append(server_parent.start(*options, **settings))
        return servers[-1]

    yield serve
    for server in servers:
        if not server.ended():
            server.kill()
