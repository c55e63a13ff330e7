"""Judges' servers on loopback: a small one of ours that can be told how to fail, and a real `transformers serve`.

Ours speaks the OpenAI dialect with log-probabilities and schemas. It answers from what it was asked alone, so that two
runs hear the same whatever order their requests arrive in.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import httpx

Body = dict[str, Any]
MODEL = "a-judge"


class Said(NamedTuple):
    """One answer of a server."""

    status: int
    """0: it hangs up without a word."""
    content: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    length: int | None = None
    """What it claims its body to be long; None: what it is."""
    pause: float = 0.0
    """Seconds before it answers."""
    drip: float = 0.0
    """Seconds between one byte of its body and the next."""


Script = Callable[[Body, int], Said | None]
"""(body of a request, how often it came before) -> what to say instead of the right answer; None: the right answer."""


def says(word: str, share: float = 0.8) -> Callable[[Body], tuple[str, float]]:
    """An oracle that always says `word`, with that probability."""
    return lambda _body: (word, share)


def about(body: Body) -> str:
    """All that the request says."""
    return body["prompt"] if "prompt" in body else " ".join(message["content"] for message in body["messages"])


class JudgeServer:
    """What the server is, what it was asked, and how it is told to fail."""

    def __init__(self, oracle: Callable[[Body], tuple[str, float]], script: Script, **fields: bool) -> None:
        self.oracle = oracle
        self.script = script
        self.fields = fields
        """`logprobs`, `schemas`, `renamed` (max_completion_tokens alone), `strict` (other fields are a 400)."""
        self.health: list[int] = []
        """What /health says next; 200 once that is used up."""
        self.models: Body | None = {"data": [{"id": MODEL}]}
        self.lives: int | None = None
        """Requests that it answers before it dies; None: any number."""
        self.die: Callable[[], None] = lambda: None
        self.asked: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.seen: Counter[str] = Counter()
        self.url = ""

    def get(self, path: str) -> Said:
        if path == "/health":
            with self.lock:
                status = self.health.pop(0) if self.health else 200
            return Said(status, b"{}")
        if path == "/v1/models" and self.models is not None:
            return Said(200, json.dumps(self.models).encode())
        return Said(500, b"Internal Server Error")

    def post(self, path: str, body: Body, headers: dict[str, str]) -> Said:
        with self.lock:
            self.asked.append(body)
            self.headers.append(headers)
            before = self.seen[about(body)]
            self.seen[about(body)] += 1
            dead = self.lives is not None and len(self.asked) > self.lives
        if dead:
            self.die()
            return Said(0)
        refused = self._refused(body)
        return self.script(body, before) or refused or Said(200, json.dumps(self._answer(path, body)).encode())

    def _refused(self, body: Body) -> Said | None:
        known = {"model", "temperature", "prompt", "messages"}
        known |= {"max_completion_tokens"} if self.fields.get("renamed") else {"max_tokens"}
        known |= {"logprobs", "top_logprobs"} if self.fields.get("logprobs", True) else set()
        known |= {"response_format"} if self.fields.get("schemas", True) else set()
        unknown = sorted(set(body) - known)
        said = json.dumps({"error": {"message": f"unknown fields: {unknown}"}}).encode()
        return Said(400, said) if unknown and self.fields.get("strict") else None

    def _answer(self, path: str, body: Body) -> Body:
        word, share = self.oracle(body)
        chat = path.endswith("chat/completions")
        if self.fields.get("schemas", True) and body.get("response_format", {}).get("type") == "json_schema":
            word = json.dumps({"reason": "so it is", "answer": word})
        choice: Body = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": word}} if chat else {"text": word}
        if body.get("logprobs") and self.fields.get("logprobs", True):
            choice["logprobs"] = _as_chat(word, share) if chat else _as_completion(word, share)
        return {"id": "1", "object": "chat.completion", "model": MODEL, "choices": [choice]}


def _top(word: str, share: float) -> dict[str, float]:
    """The word in two spellings, which share its probability, and another word with the rest."""
    other = "no" if word == "yes" else "yes"
    shares = {word: share * 0.75, f" {word.title()}": share * 0.25, other: 1 - share}
    return {text: log(p) for text, p in shares.items()}


def _as_completion(word: str, share: float) -> Body:
    top = _top(word, share)
    return {"tokens": [word], "token_logprobs": [top[word]], "top_logprobs": [top], "text_offset": [0]}


def _as_chat(word: str, share: float) -> Body:
    """As a model that begins with an empty line."""
    blank: Body = {"token": "\n\n", "logprob": 0.0, "bytes": [10, 10], "top_logprobs": []}
    top = [{"token": text, "logprob": logprob, "bytes": None} for text, logprob in _top(word, share).items()]
    return {"content": [blank, {"token": word, "logprob": top[0]["logprob"], "bytes": None, "top_logprobs": top}]}


@contextmanager
def judge_server(
    oracle: Callable[[Body], tuple[str, float]] | None = None,
    script: Script = lambda _body, _before: None,
    port: int = 0,
    **fields: bool,
) -> Iterator[JudgeServer]:
    """A server that follows `script`, and where that is None, answers as `oracle` says."""
    judge = JudgeServer(oracle or says("yes"), script, **fields)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(judge.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._say(judge.post(self.path, body, dict(self.headers)))

        def _say(self, said: Said) -> None:
            time.sleep(said.pause)
            if said.status == 0:
                return
            self.send_response(said.status)
            for name, value in said.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(said.content) if said.length is None else said.length))
            self.end_headers()
            for part in said.content if said.drip else ():
                self.wfile.write(bytes([part]))
                time.sleep(said.drip)
            self.wfile.write(b"" if said.drip else said.content)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: the tests' output is no server log."""

    with _serving(Handler, port) as server:
        judge.url = f"http://127.0.0.1:{server.server_port}"
        judge.die = server.die
        yield judge


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def die(self) -> None:
        """Hear no more requests."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that waits no longer is none of our worries."""


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler], port: int) -> Iterator[_Server]:
    with _Server(("127.0.0.1", port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def transformers_serve(model: Path, said: Path) -> Iterator[str]:
    """The address of a real `transformers serve` process that serves the folder `model` under that very name.

    What it prints goes to the file `said`. It is ready when /health says so, and gone when this ends.
    """
    port = free_port()
    words = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *words]
    with said.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            # The bound is for a process that hangs, not for how long it may take.
            until = time.monotonic() + 300
            while not (ready := _healthy(f"http://127.0.0.1:{port}/health")) and process.poll() is None:
                if time.monotonic() > until:
                    break
                time.sleep(0.05)
            assert ready, said.read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    return False
