"""Neuronpedia on loopback: answers in its form about features that it is given, and fails the way it is told."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

NAME = "tiny-model/{layer}-tiny-res"
"""What the server calls a layer's SAE."""


class Said(NamedTuple):
    """One answer."""

    status: int = 200
    content: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    never: bool = False
    """Nothing at all is said until the server is closed."""
    drips: bool = False
    """The status is said, then a byte of the body now and then, without an end."""


Script = Callable[[str, int], Said | None]
"""(path of a request, how many came before) -> what to say instead of the right answer; None: the right answer."""


def feature(index: int, *texts: object, **fields: Any) -> dict[str, Any]:
    """A feature as Neuronpedia tells of it, explanations among much else."""
    explained = [
        {"id": f"c{at}", "description": text, "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini"}
        for at, text in enumerate(texts)
    ]
    about = {"modelId": "tiny-model", "layer": "0-tiny-res", "index": str(index), "frac_nonzero": 0.001}
    shown = {"pos_str": [" sorry"], "neg_str": [" Sure"], "activations": [{"tokens": ["I"], "values": [3.5]}]}
    return {**about, **shown, "explanations": explained, **fields}


class Neuronpedia:
    """What the server knows, what it was asked, and how it is told to fail."""

    def __init__(self, features: Mapping[str, Any], script: Script) -> None:
        self.features = features
        """`model/source/index` -> the answer; what is not there it does not know."""
        self.script = script
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.connections: set[Any] = set()
        self.closed = threading.Event()
        self.url = ""

    def answer(self, path: str) -> Said:
        made = self.script(path, len(self.asked) - 1)
        if made is not None:
            return made
        known = self.features.get(path.removeprefix("/api/feature/"))
        body = {"message": "Feature not found"} if known is None else known
        return Said(404 if known is None else 200, json.dumps(body).encode())


@contextmanager
def neuronpedia(
    features: Mapping[str, Any] | None = None, script: Script = lambda _path, _before: None
) -> Iterator[Neuronpedia]:
    """A server that follows `script`, and where that is None, tells what it knows of `features`."""
    site = Neuronpedia({} if features is None else features, script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.asked.append(self.path)
            site.headers.append({name.lower(): value for name, value in self.headers.items()})
            site.connections.add(self.client_address)
            said = site.answer(self.path)
            if said.never:
                site.closed.wait()
                return
            self.send_response(said.status)
            for name, value in (("Content-Type", "application/json"), *said.headers):
                self.send_header(name, value)
            self.send_header("Content-Length", str(10**9 if said.drips else len(said.content)))
            self.end_headers()
            while said.drips and not site.closed.wait(0.02):
                self.wfile.write(b" ")
            self.wfile.write(said.content)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: the tests' output is no server log."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that waits no longer is none of our worries."""

    with Server(("127.0.0.1", 0), Handler) as server:
        site.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            site.closed.set()
            server.shutdown()
            thread.join()
