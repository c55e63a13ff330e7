"""A collection arrives whole and checked or not at all, and what is there is not asked for again."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from refusalscope.inputs import fetch as fetching

FILES = {"splits/one.json": b"[1]", "splits/two.json": b"[2, 2]", "raw/three.csv": b"a\xff\n"}


class Site:
    """What a loopback server serves, and what it was asked for."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.removeprefix("/data/")
                site.asked.append(path)
                content = site.files.get(path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/data"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The fake collection `small`, served on an ephemeral port."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    made = Site()
    checksums = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}
    monkeypatch.setattr(fetching, "sources", lambda: {"small": {"url": made.url + "/", "sha256": checksums}})
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def fetch(folder: Path, name: str = "small", url: str | None = None) -> list[tuple[int, int]]:
    """Fetch, and return the steps that were reported."""
    steps: list[tuple[int, int]] = []
    fetching.fetch(name, folder, url=url, progress=lambda _what, done, total: steps.append((done, total)))
    return steps


def found(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_file_arrives(site: Site, tmp_path: Path) -> None:
    assert fetch(tmp_path / "new" / "folder") == [(0, 3), (1, 3), (2, 3)]
    assert found(tmp_path / "new" / "folder") == FILES


def test_a_mirror_may_serve_the_files(site: Site, tmp_path: Path) -> None:
    fetching.sources()["small"]["url"] = "http://127.0.0.1:9/nowhere"
    fetch(tmp_path, url=site.url)
    assert found(tmp_path) == FILES


def test_what_is_there_and_right_is_not_asked_for_again(site: Site, tmp_path: Path) -> None:
    fetch(tmp_path)
    (tmp_path / "splits/two.json").write_bytes(b"altered")
    (tmp_path / "raw/three.csv").unlink()
    site.asked.clear()
    fetch(tmp_path)
    assert site.asked == ["splits/two.json", "raw/three.csv"]
    assert found(tmp_path) == FILES


def test_altered_content_is_not_kept(site: Site, tmp_path: Path) -> None:
    site.files["splits/two.json"] = b"[2, 2] and more"
    with pytest.raises(ValueError, match=r"/splits/two\.json has sha256 [0-9a-f]{12}, expected [0-9a-f]{12}: not kept"):
        fetch(tmp_path)
    assert set(found(tmp_path)) == {"splits/one.json"}
    site.files, site.asked = dict(FILES), []
    fetch(tmp_path)
    assert site.asked == ["splits/two.json", "raw/three.csv"]


def test_a_missing_file_is_one_line(site: Site, tmp_path: Path) -> None:
    del site.files["splits/two.json"]
    with pytest.raises(ValueError, match=r"^cannot download http.*/splits/two\.json: .*404.*$") as caught:
        fetch(tmp_path)
    assert "\n" not in str(caught.value)
    assert set(found(tmp_path)) == {"splits/one.json"}


@pytest.mark.parametrize("url", ["no-scheme/data", "http://[::1/data", "http://127.0.0.1:port/data", "ftp://127.0.0.1"])
def test_an_unusable_address_is_one_line(url: str, site: Site, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot download") as caught:
        fetch(tmp_path, url=url)
    assert "\n" not in str(caught.value)


def test_nobody_listening_is_one_line(site: Site, tmp_path: Path) -> None:
    site.server.shutdown()
    site.server.server_close()
    with pytest.raises(ValueError, match=r"cannot download .*/splits/one\.json: "):
        fetch(tmp_path)
    assert found(tmp_path) == {}


def test_an_unknown_collection_names_the_known(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown collection 'large': there are \['small'\]"):
        fetch(tmp_path, name="large")


def test_the_real_collections_are_pinned() -> None:
    for source in fetching.sources().values():
        assert source["revision"] in source["url"]
        assert source["url"].startswith("https://")
        assert all(len(checksum) == 64 for checksum in source["sha256"].values())
        assert all(not Path(path).is_absolute() and ".." not in Path(path).parts for path in source["sha256"])
