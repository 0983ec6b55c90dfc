"""An existing server around merged models and adapters: `transformers serve`, on this machine only.

The command does the same in a terminal: ``transformers serve --host 127.0.0.1 --port 8000``.

Source: transformers' command `transformers serve`.
Taught in: notebook 07, section 7.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from transformers.cli.serve import Serve

from helpers import models
from helpers.atomic import beside

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PATIENCE = 60.0  # seconds until the server has to answer


class ServingError(RuntimeError):
    """A folder that cannot be served, or a request that the server refused."""


def servable(base: Path | str, adapter: Path | str, folder: Path | str) -> Path:
    """A folder that `transformers serve` accepts for an adapter; the base's bytes are linked.

    The server takes a model's folder. It finds an adapter in there and puts it on, but not if
    the folder has nothing else: it reads `config.json` before it looks who the base is. So the
    new folder has the base's configuration, weights and tokenizer, and the adapter beside them.

    Args:
        base: folder of the base model, with its tokenizer.
        adapter: folder that `save_pretrained` of a PeftModel wrote.
        folder: a new one.

    Raises:
        ServingError: a file is missing in one of the two, or the new folder exists.

    Source: transformers, `cli.serving.model_manager` and `integrations.peft.maybe_load_adapters`.
    Taught in: notebook 07, section 7.
    """
    base, adapter, folder = Path(base), Path(adapter), Path(folder)
    _need(base, ("config.json",), "a base model's folder has it")
    _need(adapter, ADAPTER_FILES, "save_pretrained of a PeftModel writes it")
    if not list(base.glob("*.safetensors")):
        raise ServingError(f"{base} has no weights as safetensors; save the base with them.")
    if folder.exists():
        raise ServingError(f"{folder} exists; give a folder that does not.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = beside(folder, f"{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for file in base.iterdir():
        if file.is_file() and file.name not in ADAPTER_FILES:
            _link(file, part / file.name)
    for name in ADAPTER_FILES:
        _link(adapter / name, part / name)
    os.replace(part, folder)
    return folder


def _need(folder: Path, names: tuple[str, ...], who: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise ServingError(f"{folder} has no {name}; {who}.")


def _link(source: Path, target: Path) -> None:
    """A symbolic link; a hard link where the system allows no other (Windows)."""
    source = source.resolve()
    try:
        target.symlink_to(source)
    except OSError:
        os.link(source, target)


@contextmanager
def server() -> Iterator[str]:
    """`transformers serve` on a free port of this machine while the block runs; yields its address.

    Models are named in the requests, loaded at the first one and kept for five minutes. Nobody
    else can reach it: it listens on the loopback address.

    Raises:
        ServingError: it does not answer within a minute.

    Source: transformers, "Serving". Taught in: notebook 07, section 7.
    """
    port = _free_port()
    with _quiet():
        running = Serve(
            host="127.0.0.1",
            port=port,
            device=models.device().type,
            log_level="error",
            non_blocking=True,
        )
        _quieten_uvicorn()
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address)
            yield address
        finally:
            running.kill_server()


def ask(address: str, model: Path | str, question: str, *, tokens: int = 16) -> str:
    """One chat question over HTTP, as any client of that kind of server sends it.

    Args:
        address: such as "http://127.0.0.1:8000".
        model: the folder to answer with; the server loads it when it is new.
        tokens: at most so many are written, each the most likely one.

    Raises:
        ServingError: the server refused; names the model and the status.

    Taught in: notebook 07, section 7.
    """
    body = {
        "model": str(model),
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": False,
    }
    try:
        answer = _http(f"{address}/v1/chat/completions", body)
    except urllib.error.HTTPError as error:
        raise ServingError(
            f"the server answered {error.code} for {Path(model).name}: it needs a folder with "
            "config.json, weights and a tokenizer; serving.servable makes one for an adapter."
        ) from error
    except (OSError, ValueError, HTTPException) as error:  # nobody listens, or the address is none
        raise ServingError(f"no server answers at {address!r} ({error}).") from error
    return answer["choices"][0]["message"]["content"].strip()


def _http(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    # no proxy: the request must not leave this machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=PATIENCE) as reply:
        return json.loads(reply.read())


def _wait(address: str) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            _http(f"{address}/health")
            return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    raise ServingError(f"the server at {address} did not answer within {PATIENCE:.0f} s.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _quiet() -> Iterator[None]:
    """What the server sets globally comes back: transformers' level of logging."""
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        yield
    finally:
        logger.setLevel(level)


def _quieten_uvicorn() -> None:
    """Its line for every request would land in whichever cell runs just then."""
    for name in ("uvicorn", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
