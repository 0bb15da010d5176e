"""The command `trl-flow serve-rewards`."""

import argparse
import functools
import ipaddress
import os
import signal
import socket
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from trl_flow.serving.limits import Limits


DESCRIPTION = """\
Serve reward functions over HTTP, for RemoteReward in trainings on other machines or in other environments.

  trl-flow serve-rewards --rewards pickscore,hpsv2 --port 8000
  TRL_FLOW_REWARD_TOKEN=... trl-flow serve-rewards --rewards my_rewards.brightness --host 0.0.0.0

Prints its address on one line when the models are loaded. SIGTERM and Ctrl-C let running requests finish.
Endpoints: POST /score, GET /rewards, GET /metrics (Prometheus), GET /health (needs no token).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `trl-flow serve-rewards`."""
    add = parser.add_argument
    rewards = "names, or import paths such as my_rewards.brightness (also from this folder), separated by commas"
    add("--rewards", required=True, metavar="NAMES", help=rewards)
    address = "address to listen on (default: %(default)s); one that other machines can reach takes a token"
    add("--host", default="127.0.0.1", help=address)
    port = "default: %(default)s; 0 takes a free one, and the line that is printed tells which"
    add("--port", type=int, default=8000, help=port)
    # None for the token itself: others on the machine see the options of a process
    token = "file with the token that clients must send; default: the environment variable TRL_FLOW_REWARD_TOKEN"
    add("--token-file", type=Path, metavar="PATH", help=token)
    grace = "seconds that running requests are given when the server is told to end (default: %(default)s)"
    add("--grace", type=int, default=30, metavar="N", help=grace)
    model = parser.add_argument_group("models", "for the reward functions that have one")
    model.add_argument("--device", help="such as cuda:1; default: the accelerator if there is one")
    model.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: each function's own")
    workers = "processes that score, each with models of its own, on the GPUs in turn (default: 1, this one)"
    model.add_argument("--workers", type=int, default=1, metavar="N", help=workers)
    model.add_argument("--batch-size", type=int, metavar="N", help="images at a time; default: each function's own")
    limits = parser.add_argument_group("limits", "requests beyond them are refused, and the server keeps running")
    for field in fields(Limits):
        kind, option = type(field.default), "--" + field.name.replace("_", "-")
        text = f"{field.metadata['help']} (default: {field.default})"
        limits.add_argument(option, type=kind, default=field.default, metavar="N", help=text)


def run(arguments: argparse.Namespace) -> int:
    """
    Serves until SIGTERM or Ctrl-C. Returns the exit code: 0 after SIGTERM, 1 if the models could not be loaded.

    Raises:
        ValueError, TypeError, OSError: if the options cannot be followed.
        ImportError: if the extra `serve` is not installed, or what a reward function needs.
    """
    from trl_flow.rewards.base import check_whole_number
    from trl_flow.rewards.checks import reward_names

    uvicorn = _import_server()
    from trl_flow.serving.app import create_app
    from trl_flow.serving.connection import protocol
    from trl_flow.serving.workers import pool

    limits = Limits(**{field.name: getattr(arguments, field.name) for field in fields(Limits)})
    check_whole_number("--grace", arguments.grace, 0)
    token = _read_token(arguments.token_file)
    if token is None and not _is_loopback(arguments.host):
        raise ValueError(
            f"--host {arguments.host} can be reached from other machines, and there is no token: anyone could use "
            "this server. Set TRL_FLOW_REWARD_TOKEN or give --token-file, and the same to the clients."
        )
    named = [name.strip() for name in arguments.rewards.split(",") if name.strip()]
    check_whole_number("--workers", arguments.workers, 1)
    if arguments.workers > limits.max_waiting:
        idle = f"--workers is {arguments.workers}, but --max-waiting lets in {limits.max_waiting} requests at a time"
        raise ValueError(f"{idle}: some would never work. Give --max-waiting {2 * arguments.workers} or so.")
    options = arguments.device, arguments.dtype, arguments.batch_size
    rewards = _rewards(named, *options)
    make_rewards = functools.partial(_rewards, named, *options)
    started = () if arguments.workers == 1 else pool(make_rewards, limits.max_pixels, arguments.workers, options[0])

    listening = _listen(arguments.host, arguments.port)
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    failures: list[BaseException] = []

    def on_ready() -> None:
        # By the names that clients ask for
        print(f"trl-flow serve-rewards: {url} is ready with {', '.join(reward_names(rewards))}", flush=True)

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(rewards, limits=limits, token=token, pool=started, on_ready=on_ready, on_failure=on_failure)
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=protocol(limits.upload_timeout), ws="none", log_level="warning", access_log=False,
            server_header=False,
            timeout_graceful_shutdown=arguments.grace,
            # Longer than clients keep a connection, so that none is closed just when it is used again
            timeout_keep_alive=30,
        )
    )  # fmt: skip
    # uvicorn ends its work on SIGTERM and then raises the signal again for the handler that was there before, which by
    # default kills the process: its exit code would be that of a crash
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        server.run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
        listening.close()
    if failures:
        print(f"trl-flow serve-rewards: error: {failures[0]}", file=sys.stderr)
    return 1 if failures else 0


def _import_server() -> Any:
    from trl_flow.rewards.base import require

    packages = ("fastapi", "python_multipart", "prometheus_client", "uvicorn")
    return require(*packages, reward="A reward server", extra="serve")


def _read_token(path: Path | None) -> str | None:
    from trl_flow.rewards.remote import TOKEN_VARIABLE, checked_token

    if path is not None:
        return checked_token(path.read_text(encoding="utf-8"), f"The token in the file {os.fspath(path)!r}")
    return checked_token(os.environ.get(TOKEN_VARIABLE), f"The token in the environment variable {TOKEN_VARIABLE}")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}, but must be a whole number from 0 to 65535.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise OSError(f"{host}, port {port}, cannot be listened on: {error.strerror or error}.") from error
    # Connections inherit it. asyncio sets it only where it made the socket itself, and without it each answer waits
    # some 40 ms for the client to acknowledge its headers
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _rewards(names: list[str], *options: Any) -> list[Any]:
    """The reward functions of these names, with the options of [`_configure`]. The processes of a pool call it too."""
    from trl_flow.rewards.named import named_rewards

    rewards = named_rewards(names, "--rewards")
    for reward in rewards:
        _configure(reward, *options)
    return rewards


def _configure(reward: Any, device: str | None, dtype: str | None, batch_size: int | None) -> None:
    """Sets the options of a reward function that has a model, before it loads it."""
    import torch

    from trl_flow.rewards.base import check_whole_number, model_of

    if batch_size is not None:
        check_whole_number("--batch-size", batch_size, 1)
    try:
        device = None if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device is {device!r}, which torch does not know: {error}") from error
    options = {"device": device, "dtype": dtype and getattr(torch, dtype), "batch_size": batch_size}
    for name, value in options.items():
        if value is not None and (model := model_of(reward)) is not None:
            setattr(model, name, value)
