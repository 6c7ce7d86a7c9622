"""Checkpoints at URLs: read by ranges, few of them, from servers and stores that are not trusted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graftax as gx
from graftax.cli import run
from graftax.errors import FormatError, GraftaxError, PlanError, StorageError, UnsafeInputError, UsageError
from graftax.formats import Output, open_path, save
from graftax.formats.remote import file as remote_file
from graftax.formats.remote import http as remote_http
from graftax.formats.remote import retry as remote_retry
from graftax.formats.remote.file import RemoteFile
from graftax.formats.remote.url import parse, split_part
from graftax.tree.dtypes import spec_of

sys.path.insert(0, str(Path(__file__).parent))
from range_server import Site, serving

Arrays = dict[str, np.ndarray[Any, Any]]
RNG = np.random.default_rng(0)
LAYERS = 6


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape, np.float32)


def model() -> Arrays:
    out: Arrays = {"embed.weight": noise(300, 64)}
    for i in range(LAYERS):
        for name, shape in (("up", (256, 64)), ("down", (64, 256))):
            out |= {f"layers.{i}.{name}.weight": noise(*shape), f"layers.{i}.{name}.bias": noise(shape[0])}
        out |= {f"layers.{i}.norm.weight": noise(64), f"layers.{i}.norm.bias": noise(64)}
    return out


TORCH = model()


def written(folder: Path, name: str, arrays: Arrays = TORCH, **more: Any) -> Path:
    output = Output({k: spec_of(v) for k, v in arrays.items()}, list(arrays.items()), "torch", **more)
    return save(folder / name, output).path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("model"), "model.safetensors").read_bytes()


@pytest.fixture
def site(data: bytes) -> Iterator[Site]:
    """A server that has model.safetensors."""
    with serving(Site({"/model.safetensors": data})) as found:
        yield found


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between tries."""
    monkeypatch.setattr(remote_retry, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(remote_retry, "LONGEST_PAUSE", 0.01)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a model of a megabyte has all kinds of tensors: small, of a middle size, and large."""
    for name, size in (("HEAD", 1 << 13), ("BLOCK", 1 << 14), ("SMALL", 1 << 12), ("GROUP", 1 << 15)):
        monkeypatch.setattr(remote_file, name, size)
    for name, size in (("HELD", 1 << 17), ("PART", 1 << 14), ("STEP", 1 << 12)):
        monkeypatch.setattr(remote_file, name, size)


def same(found: Any, arrays: Arrays = TORCH) -> None:
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.read(name), array)


# ---------------------------------------------------------------- what is read


def test_a_file_at_an_address(site: Site):
    found = open_path(site.url("model.safetensors"))
    assert (found.side, found.storage.format, found.storage.files, found.label) == (
        "torch",
        "safetensors",
        (),
        f"{site.base}/model.safetensors",
    )
    assert site.requests("model.safetensors") == 1  # header and all
    same(found)


def test_opening_reads_the_header_alone(site: Site, small_units: None):
    open_path(site.url("model.safetensors"))
    assert site.requests() == 2  # and config.json, which is not there
    assert site.sent() == 1 << 13


@pytest.mark.usefixtures("small_units")
def test_every_part_of_every_tensor(site: Site):
    found = open_path(site.url("model.safetensors"))
    assert found.storage.span is not None
    rng = np.random.default_rng(1)
    for _ in range(150):
        name = str(rng.choice(list(TORCH)))
        raw = TORCH[name].reshape(-1).view(np.uint8)
        start, stop = sorted(rng.integers(0, raw.size + 1, 2))
        buffer = bytearray(int(stop - start))
        found.storage.span(name, int(start), memoryview(buffer))
        assert bytes(buffer) == raw[start:stop].tobytes(), (name, start, stop)


@pytest.mark.usefixtures("small_units")
def test_a_port_asks_for_every_byte_once(site: Site, tmp_path: Path):
    like, want = like_of(tmp_path)
    out = tmp_path / "out.safetensors"
    gx.port_file(site.url("model.safetensors"), like, out, max_memory="1MiB")
    for name, array in want.items():
        np.testing.assert_array_equal(open_path(out).read(name), array)
    size = len(site.files["/model.safetensors"])
    assert site.sent() <= size + (1 << 13)  # the first request brings more than the header
    # a header, config.json, and for each layer two matrices in four parts and the small ones beside them
    assert site.requests() <= 2 + LAYERS * (2 * 4 + 4) + 6


def test_a_port_of_a_small_model_is_a_few_requests(site: Site, tmp_path: Path):
    like, _ = like_of(tmp_path)
    gx.port_file(site.url("model.safetensors"), like, tmp_path / "out.safetensors")
    assert site.requests() == 3  # the start of the file, config.json, and the rest in one


def like_of(folder: Path) -> tuple[Path, Arrays]:
    """A Flax side of the model: (its spec file, the values that belong there)."""
    want: Arrays = {}
    for name, array in TORCH.items():
        path, _, role = name.replace(".", "/").rpartition("/")
        if array.ndim == 2:
            want[f"{path}/{'embedding' if path == 'embed' else 'kernel'}"] = array if path == "embed" else array.T
        else:
            want[f"{path}/{'scale' if 'norm' in path and role == 'weight' else role}"] = array
    tensors = {name: {"shape": array.shape, "dtype": "float32"} for name, array in want.items()}
    place = folder / "like.json"
    place.write_text(json.dumps({"graftax_spec": 1, "side": "flax", "tensors": tensors, "keys": {}, "containers": {}}))
    return place, want


def test_source_like_and_config_at_addresses(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    like, want = like_of(tmp_path)
    site.files |= {"/like.json": like.read_bytes(), "/config.json": b'{"hidden_size": 64}'}
    assert open_path(site.url("model.safetensors")).config == {"hidden_size": 64}
    out = tmp_path / "out.safetensors"
    assert run(["port", site.url("model.safetensors"), "--like", site.url("like.json"), "-o", str(out)]) == 0
    np.testing.assert_array_equal(open_path(out).read("layers/3/up/kernel"), want["layers/3/up/kernel"])
    assert run(["inspect", site.url("model.safetensors"), "--hashes"]) == 0
    new = tmp_path / "new.safetensors"
    assert run(["replace", site.url("model.safetensors"), "embed.weight", "--zeros", "-o", str(new)]) == 0
    assert not open_path(new).read("embed.weight").any()
    capsys.readouterr()
    assert run(["diff", site.url("model.safetensors"), str(new)]) == 1
    assert "embed.weight" in capsys.readouterr().out


def test_a_part_of_a_file(site: Site):
    found = open_path(site.url("model.safetensors") + "::layers.2")
    assert next(iter(found)) == "up.weight"
    np.testing.assert_array_equal(found.read("up.weight"), TORCH["layers.2.up.weight"])
    with pytest.raises(PlanError, match="nothing below 'nothing'"):
        open_path(site.url("model.safetensors") + "::nothing")


def test_pt_npz_and_msgpack(site: Site, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="writing .pt takes torch")
    inner = {name: torch.from_numpy(array) for name, array in TORCH.items()}
    torch.save({"epoch": 3, "model": inner}, tmp_path / "run.pt")
    site.files["/run.pt"] = (tmp_path / "run.pt").read_bytes()
    same(open_path(site.url("run.pt::model")))
    assert site.sent() < 3 * len(site.files["/run.pt"])
    flax: Arrays = {"params/fc/kernel": noise(3, 2), "params/fc/bias": noise(2)}
    for name in ("x.npz", "x.msgpack"):
        output = Output({k: spec_of(v) for k, v in flax.items()}, list(flax.items()), "flax")
        site.files[f"/{name}"] = save(tmp_path / name, output).path.read_bytes()
        found = open_path(site.url(name))
        for key, array in flax.items():
            np.testing.assert_array_equal(found.read(key), array)


def test_shards_and_their_index(site: Site, tmp_path: Path):
    folder = written(tmp_path, "sharded", shard_size=300_000)
    for path in folder.iterdir():
        site.files[f"/m/{path.name}"] = path.read_bytes()
    site.files["/m/config.json"] = b'{"layers": 6}'
    shards = sum(name.endswith(".safetensors") for name in site.files) - 1
    assert shards > 2
    for url in (site.url("m/model.safetensors.index.json"), site.url("m/")):
        site.log.clear()
        found = open_path(url)
        assert found.config == {"layers": 6}
        assert site.requests() == shards + 2 + url.endswith("m/")  # which asks for model.safetensors first
        assert (len(found), found.side, found.storage.files) == (len(TORCH), "torch", ())
        for name, array in TORCH.items():
            np.testing.assert_array_equal(found.read(name), array)
    np.testing.assert_array_equal(open_path(site.url("m/::embed")).read("weight"), TORCH["embed.weight"])
    del site.files[f"/m/model-00002-of-0000{shards}.safetensors"]
    with pytest.raises(StorageError, match=r"1 of .* shards cannot be opened") as caught:
        open_path(site.url("m/"))
    assert "does not exist (404)" in str(caught.value)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "http://a/x", "a\\b", "", "a/../../b", "s3://b/k"])
def test_an_index_names_files_in_its_folder_alone(site: Site, name: str):
    site.files["/m/model.safetensors.index.json"] = json.dumps({"weight_map": {"w": name}}).encode()
    with pytest.raises(UnsafeInputError, match="plain relative path"):
        open_path(site.url("m/model.safetensors.index.json"))
    assert site.requests() == 1


def test_a_folder_without_weights(site: Site):
    with pytest.raises(StorageError, match="holds no weights under a usual name"):
        open_path(site.url("empty/"))


# ---------------------------------------------------------------- servers that misbehave


def test_what_passes_is_tried_again(site: Site):
    codes = {0: 503, 1: 429, 2: 500}

    def fail(handler: Any, path: str, count: int) -> bool:
        if count in codes:
            handler.send_plain(codes[count], {"Retry-After": "0"}, b"busy")
        return count in codes

    site.answer = fail
    same(open_path(site.url("model.safetensors")))
    assert [path for path, _, _ in site.log].count("/model.safetensors") == 5


def test_a_server_that_is_down_for_good(site: Site):
    site.answer = lambda handler, path, count: handler.send_plain(503) is None
    with pytest.raises(StorageError, match=r"the server answers 503 \(tried 5 times\)") as caught:
        open_path(site.url("model.safetensors"))
    assert (site.requests(), caught.value.exit_code) == (remote_retry.TRIES, 5)


def test_nobody_answers(site: Site):
    with serving(Site()) as gone:
        base = gone.base
    with pytest.raises(StorageError, match="no connection: ConnectionRefusedError") as caught:
        open_path(f"{base}/model.safetensors")
    assert "tried 5 times" in str(caught.value)


@pytest.mark.parametrize("after", [0, 1, 5_000])
def test_an_answer_that_breaks_off_is_continued(site: Site, after: int):
    def broken(handler: Any, path: str, count: int) -> bool:
        _, first, last = site.log[-1]
        if path.endswith(".safetensors") and count in (1, 2):
            handler.break_off(path, first, last, after)
            return True
        return False

    site.answer = broken
    same(open_path(site.url("model.safetensors")))
    spans = [(first, last) for path, first, last in site.log if path == "/model.safetensors"]
    assert spans[2][0] == spans[1][0] + after  # from where it broke off
    assert spans[3][0] == spans[1][0] + 2 * after


def test_an_answer_that_always_breaks_off(site: Site):
    def broken(handler: Any, path: str, count: int) -> bool:
        if count:
            handler.break_off(path, *site.log[-1][1:], 10)
        return bool(count)

    found = open_path(site.url("model.safetensors"))
    site.answer = broken
    with pytest.raises(StorageError, match=r"could not be read: .*tried 5 times"):
        found.read("layers.5.up.weight")


def test_a_server_that_stays_silent(site: Site, monkeypatch: pytest.MonkeyPatch):
    import threading

    from graftax.formats.remote import connect as remote_connect

    monkeypatch.setattr(remote_connect, "TIMEOUT", 0.05)
    hold = threading.Event()
    site.answer = lambda handler, path, count: hold.wait(20) and False
    with pytest.raises(StorageError, match="the server does not answer"):
        open_path(site.url("model.safetensors"))
    hold.set()


def test_an_answer_without_end(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote_http, "LONGEST", 0.0)
    with pytest.raises(StorageError, match="took more than 0 s"):
        open_path(site.url("model.safetensors")).read("layers.5.up.weight")


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "whole": ({"status": 200}, "does not support ranges"),
    "no content-range": ({"headers": {"Content-Range": None}}, "does not say which bytes"),
    "multipart": ({"headers": {"Content-Range": None, "Content-Type": "multipart/byteranges"}}, "does not say which"),
    "unknown size": ({"headers": {"Content-Range": "bytes 0-9/*"}}, "does not say which bytes"),
    "other bytes": ({"headers": {"Content-Range": "bytes 1-{n}/99999999"}}, "sent other bytes than requested"),
    "more bytes": ({"headers": {"Content-Range": f"bytes 0-{1 << 30}/{1 << 40}"}}, "sent other bytes than requested"),
    "beyond the end": ({"headers": {"Content-Range": "bytes 0-{m}/{m}"}}, "sent other bytes than requested"),
    "backwards": ({"headers": {"Content-Range": "bytes 0-0/0"}}, "sent other bytes than requested"),
    "other length": ({"headers": {"Content-Length": "7"}, "body": b"1234567"}, "sent other bytes than requested"),
    "packed": ({"headers": {"Content-Encoding": "gzip"}}, "or compresses them"),
    "teapot": ({"status": 418}, "answers 418"),
    "forbidden": ({"status": 403}, r"forbidden \(403\)"),
    "login": ({"status": 401}, r"needs a login \(401\)"),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_answer_that_is_not_the_range(site: Site, kind: str):
    changes, words = ODD[kind]
    n = min(len(site.files["/model.safetensors"]), remote_file.HEAD)  # bytes of the answer
    headers = {name: value and value.format(n=n, m=n - 1) for name, value in changes.get("headers", {}).items()}

    def odd(handler: Any, path: str, count: int) -> bool:
        handler.send_part(path, *site.log[-1][1:], **changes | {"headers": headers})
        return True

    site.answer = odd
    with pytest.raises(StorageError, match=words) as caught:
        open_path(site.url("model.safetensors"))
    assert caught.value.exit_code == 5
    assert site.requests() == 1  # nothing is asked for again


def test_chunked_answers_are_read(site: Site):
    def chunked(handler: Any, path: str, count: int) -> bool:
        _, first, last = site.log[-1]
        body = site.files[path][first : last + 1] if path in site.files else b""
        if not body:
            return False
        pieces = [body[i : i + 1000] for i in range(0, len(body), 1000)]
        coded = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])
        headers = {"Content-Length": None, "Transfer-Encoding": "chunked"}
        handler.send_part(path, first, last, headers=headers, body=coded)
        return True

    site.answer = chunked
    same(open_path(site.url("model.safetensors")))


@pytest.mark.parametrize("how", ["etag", "no etag any more", "size", "date", "gone", "shorter"])
def test_a_file_that_changes_while_it_is_read(site: Site, how: str):
    path = "/model.safetensors"
    if how == "date":
        dates = iter(["Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT"])
        site.answer = lambda handler, asked, count: (
            asked == path
            and handler.send_part(asked, *site.log[-1][1:], headers={"ETag": None, "Last-Modified": next(dates)})
            is None
        )
    found = open_path(site.url("model.safetensors"))
    if how == "no etag any more":
        site.answer = lambda handler, asked, count: (
            handler.send_part(asked, *site.log[-1][1:], headers={"ETag": None, "Last-Modified": None}) is None
        )
    elif how == "etag":
        site.etags[path] = '"2"'
    elif how == "size":
        site.files[path] += b"more"
    elif how == "shorter":
        site.files[path] = site.files[path][:1000]
    elif how == "gone":
        del site.files[path]
    with pytest.raises(
        StorageError, match="does not exist" if how == "gone" else "changed while it was read"
    ) as caught:
        found.read("layers.5.up.weight")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (b"", FormatError, "is empty"),
        (b"<!DOCTYPE html><html>", FormatError, "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", FormatError, "Git LFS pointer"),
        ((1 << 60).to_bytes(8, "little") + b"{}", UnsafeInputError, "the limit is 100,000,000"),
        (b"nonsense", FormatError, "not in a format that graftax knows"),
    ],
)
def test_what_is_no_checkpoint(site: Site, body: bytes, error: type[Exception], words: str):
    site.files["/x.safetensors"] = body
    with pytest.raises(error, match=words):
        open_path(site.url("x.safetensors"))


def test_a_header_that_promises_much_is_refused_before_it_is_fetched(site: Site):
    site.files["/x.safetensors"] = (1 << 30).to_bytes(8, "little") + b"{" + bytes(1 << 20)
    with pytest.raises((FormatError, UnsafeInputError)):
        open_path(site.url("x.safetensors"))
    assert site.requests() == 1


def test_nothing_is_there(site: Site, capsys: pytest.CaptureFixture[str]):
    assert run(["inspect", site.url("none.safetensors")]) == 5
    assert "does not exist (404)" in capsys.readouterr().err
    assert site.requests() == 1


# ---------------------------------------------------------------- redirects and secrets


def test_redirects_are_followed_once_and_remembered(site: Site):
    def moved(handler: Any, path: str, count: int) -> bool:
        if path == "/old/model.safetensors":
            handler.send_plain(302, {"Location": "/model.safetensors?signature=s3cret"})
        return path == "/old/model.safetensors"

    site.answer = moved
    found = open_path(site.url("old/model.safetensors"))
    same(found)
    assert site.requests("old/model.safetensors") == 1
    assert "s3cret" not in found.label


def test_an_address_that_expires_is_asked_for_again(site: Site):
    signatures: list[int] = []

    def moved(handler: Any, path: str, count: int) -> bool:
        if path == "/old":
            signatures.append(len(signatures))
            handler.send_plain(302, {"Location": f"/model.safetensors?s={len(signatures)}"})
            return True
        if path == "/model.safetensors" and count == 1:
            handler.send_plain(403)
            return True
        return False

    site.answer = moved
    same(open_path(site.url("old")))
    assert len(signatures) == 2


def test_redirects_end(site: Site):
    site.answer = lambda handler, path, count: handler.send_plain(302, {"Location": "/again"}) is None
    with pytest.raises(StorageError, match="redirected more than 10 times"):
        open_path(site.url("model.safetensors"))


@pytest.mark.parametrize("there", ["file:///etc/passwd", "ftp://x/y", "s3://bucket/key", "", "http://"])
def test_redirects_to_elsewhere(site: Site, there: str):
    site.answer = lambda handler, path, count: handler.send_plain(302, {"Location": there}) is None
    with pytest.raises(StorageError, match="redirected"):
        open_path(site.url("model.safetensors"))


def test_a_redirect_never_leaves_https():
    file = remote_http.HttpFile(parse("https://example.org/x"), None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(StorageError, match="less protected"):
        file._moved(parse("https://example.org/x"), "http://example.org/x")
    assert file._moved(parse("https://example.org/a/x"), "../y").url == "https://example.org/y"


def test_secrets_are_sent_to_their_host_alone_and_shown_to_nobody(site: Site):
    with serving(Site(dict(site.files))) as other:
        site.answer = lambda handler, path, count: (
            path == "/far" and handler.send_plain(302, {"Location": other.url("model.safetensors")}) is None
        )
        secret = site.base.replace("http://", "http://me:pass%40word@")
        found = open_path(f"{secret}/far?token=s3cret")
        same(found)
        assert site.headers[0]["Authorization"] == "Basic bWU6cGFzc0B3b3Jk"
        assert not any("Authorization" in headers for headers in other.headers)
        shown = [found.label, repr(found)]
        for url in (f"{secret}/none?token=s3cret", f"{secret}/x y?token=s3cret", f"{secret.replace('http', 'ftp')}/x"):
            with pytest.raises((StorageError, UsageError)) as caught:
                open_path(url)
            shown.append(str(caught.value))
        assert all("***@127.0.0.1" in text for text in shown)
        assert not any("word" in text or "s3cret" in text for text in shown)


def test_a_proxy_is_asked_where_the_environment_names_one(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", site.base.replace("http://", "http://me:too@"))
    monkeypatch.delenv("no_proxy", raising=False)
    same(open_path("http://weights.invalid/model.safetensors"))
    assert site.headers[0]["Host"] == "weights.invalid"
    assert site.headers[0]["Proxy-Authorization"].startswith("Basic ")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site.headers.clear()
    same(open_path(site.url("model.safetensors")))
    assert "Proxy-Authorization" not in site.headers[0]


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "url", "name"),
    [
        ("https://a/b.pt::model", "https://a/b.pt", "model"),
        ("https://a/b.pt", "https://a/b.pt", ""),
        ("http://[::1]:80/b", "http://[::1]:80/b", ""),
        ("http://[::1]:80/b::x/y", "http://[::1]:80/b", "x/y"),
        ("s3://b/a::b::c", "s3://b/a::b", "c"),
    ],
)
def test_the_name_behind_an_address(text: str, url: str, name: str):
    assert split_part(text) == (url, name)


def test_a_password_that_nobody_quoted_is_shown_to_nobody(monkeypatch: pytest.MonkeyPatch):
    for url in (
        "http://me:s3cret/x@127.0.0.1:1/m",
        "http://me:s3cret?x@127.0.0.1:1/m",
        "http://me:s3#cret@127.0.0.1:1/m",
    ):
        with pytest.raises((StorageError, UsageError)) as caught:
            open_path(url)
        assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(parse("http://me:s3cret@host/m?token=s3cret"))
    monkeypatch.setenv("http_proxy", "http://me:s3cret/x@127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises((StorageError, UsageError)) as caught:
        open_path("http://example.invalid/m.safetensors")
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "the context is not shown in a traceback"


def test_a_size_that_cannot_be_costs_nothing(site: Site):
    def lie(handler: Any, path: str, count: int) -> bool:
        if path != "/model.safetensors":
            return False
        head = site.files[path][: site.log[-1][2] + 1]
        told = f"bytes 0-{len(head) - 1}/{10**17}"
        handler.send_part(path, 0, len(head) - 1, headers={"Content-Range": told}, body=head)
        return True

    site.answer = lie
    with pytest.raises(GraftaxError):
        open_path(site.url("model.safetensors"))


def test_parts_of_an_address():
    found = parse("HTTPS://User:p@Example.org:8443/a/b%20c.SafeTensors?x=1&y=2#part")
    assert (found.scheme, found.user, found.host, found.query) == ("https", "User:p", "example.org:8443", "x=1&y=2")
    assert (found.name, found.suffix) == ("b%20c.SafeTensors", ".SafeTensors")
    assert found.beside("d/e f.json").url == "https://User:p@example.org:8443/a/d/e%20f.json?x=1&y=2"
    store = parse("s3://Bucket/a/b?c#d.bin")
    assert (store.host, store.path, store.suffix) == ("Bucket", "/a/b?c#d.bin", ".bin")
    assert store.url == "s3://Bucket/a/b?c#d.bin"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ftp://a/b", "unknown scheme 'ftp'"),
        ("file:///a/b", "Name the path itself"),
        ("nonsense://a", "Known: http, https, s3"),
        ("http:///x", "names no host"),
        ("http://a:port/x", "malformed"),
        ("http://[::1/x", "malformed"),
        ("http://a/b c", "a blank"),
        ("http://a/b\nX-Evil: 1", "control character"),
        ("https://a/b::", "needs a name"),
    ],
)
def test_what_is_no_address(text: str, words: str):
    with pytest.raises(UsageError, match=words):
        open_path(text)


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "http:" / "a").mkdir(parents=True)
    written(tmp_path / "http:" / "a", "x.safetensors")
    same(open_path("http://a/x.safetensors"))


def test_the_output_is_no_address(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    like, _ = like_of(tmp_path)
    out = site.url("out.safetensors?token=s3cret")
    assert run(["port", site.url("model.safetensors"), "--like", str(like), "-o", out]) == 2
    said = capsys.readouterr().err
    assert "is a URL; the output is a path" in said
    assert "s3cret" not in said


def test_inspecting_an_address_loads_nothing_heavy(site: Site):
    code = (
        "import sys\nfrom graftax.cli import run\n"
        f"assert run(['inspect', {site.url('model.safetensors')!r}]) == 0\n"
        "print('LOADED', *[m for m in ('numpy', 'torch', 'jax', 'flax', 'fsspec', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"


# ---------------------------------------------------------------- stores


@pytest.fixture
def store(data: bytes) -> Iterator[Any]:
    fsspec = pytest.importorskip("fsspec", reason="stores are read by fsspec (the extra `remote`)")
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/model.safetensors", data)
    yield memory
    memory.rm("/bucket", recursive=True)


def test_a_file_in_a_store(store: Any, tmp_path: Path):
    found = open_path("memory://bucket/model.safetensors")
    assert found.label == "memory://bucket/model.safetensors"
    same(found)
    same(open_path("memory://bucket/"))
    like, want = like_of(tmp_path)
    ported = gx.port("memory://bucket/model.safetensors", like, sharding="host")
    np.testing.assert_array_equal(ported["layers"]["1"]["down"]["kernel"], want["layers/1/down/kernel"])
    assert len(open_path("memory://bucket/model.safetensors::layers.1")) == 6


def test_shards_in_a_store(store: Any, tmp_path: Path):
    for path in written(tmp_path, "sharded", shard_size=300_000).iterdir():
        store.pipe(f"/bucket/m/{path.name}", path.read_bytes())
    found = open_path("memory://bucket/m/")
    for name, array in TORCH.items():
        np.testing.assert_array_equal(found.read(name), array)


def test_a_store_that_changes(store: Any, data: bytes):
    found = open_path("memory://bucket/model.safetensors")
    store.pipe("/bucket/model.safetensors", data[:-4] + b"abcd")
    with pytest.raises(StorageError, match="changed while it was read"):
        found.read("layers.5.up.weight")


def test_a_store_without_it(store: Any):
    with pytest.raises(StorageError, match="does not exist"):
        open_path("memory://bucket/none.safetensors")
    store.pipe("/bucket/m/x", b"x")
    with pytest.raises(StorageError, match="is a folder"):
        open_path("memory://bucket/m")


def test_a_store_that_fails(store: Any, monkeypatch: pytest.MonkeyPatch):
    found = open_path("memory://bucket/model.safetensors")
    calls: list[int] = []
    whole = type(store).cat_file

    def flaky(self: Any, path: str, start: int, end: int) -> bytes:
        calls.append(start)
        if len(calls) == 1:
            raise OSError("broken pipe with s3cret in it")
        return whole(self, path, start=start, end=end)[: -1 if len(calls) == 2 else None]

    monkeypatch.setattr(type(store), "cat_file", flaky)
    same(found)
    assert len(set(calls)) == len(calls) - 2

    def broken(self: Any, path: str, **options: Any) -> bytes:
        raise OSError("s3cret")

    monkeypatch.setattr(type(store), "cat_file", broken)
    with pytest.raises(StorageError, match=r"OSError of its store \(tried 5 times\)") as caught:
        open_path("memory://bucket/model.safetensors")
    assert "s3cret" not in str(caught.value)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UsageError, match=r"pip install 'graftax\[remote\]'"):
        open_path("memory://bucket/x")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_store_whose_package_is_missing(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("fsspec", reason="stores are read by fsspec (the extra `remote`)")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"pip install 'graftax\\[remote\\]' {package}"):
        open_path(f"{scheme}://bucket/x")


# ---------------------------------------------------------------- what is kept


class Bytes:
    """A transport from memory that counts what is asked for."""

    def __init__(self, data: bytes) -> None:
        self.data, self.asked = data, []

    def start(self, length: int) -> tuple[int, bytes]:
        return len(self.data), self.data[:length]

    def fetch(self, offset: int, buffer: memoryview) -> None:
        self.asked.append((offset, len(buffer)))
        buffer[:] = self.data[offset : offset + len(buffer)]

    def settle(self) -> None:
        pass


def read(file: RemoteFile, start: int, length: int) -> bytes:
    out = bytearray(length)
    half = length // 2
    file.read_into(start, [memoryview(out)[:half], memoryview(out)[half:]])
    return bytes(out)


@pytest.mark.usefixtures("small_units")
def test_small_tensors_side_by_side_come_together():
    transport = Bytes(RNG.bytes(200_000))
    file = RemoteFile(parse("http://a/b"), transport)
    file.lay_out([(10_000 + i * 1000, 11_000 + i * 1000) for i in range(20)] + [(30_000, 150_000), (150_000, 200_000)])
    for i in reversed(range(20)):
        assert read(file, 10_000 + i * 1000, 1000) == transport.data[10_000 + i * 1000 : 11_000 + i * 1000]
    assert transport.asked == [(10_000, 16_384), (26_384, 3_616)]  # one request, in two parts


@pytest.mark.usefixtures("small_units")
def test_a_large_tensor_in_pieces_is_fetched_once():
    transport = Bytes(RNG.bytes(300_000))
    file = RemoteFile(parse("http://a/b"), transport)
    file.lay_out([(20_000, 300_000)])
    for column in range(0, 2000, 100):  # of a matrix with rows of 2,000 bytes
        for row in range(140):
            start = 20_000 + row * 2000 + column
            assert read(file, start, 100) == transport.data[start : start + 100]
    assert sum(length for _, length in transport.asked) == 280_000
    transport.asked.clear()
    file.lay_out([(20_000, 300_000)])
    assert read(file, 20_000, 280_000) == transport.data[20_000:]
    assert len(transport.asked) <= 20
    assert sum(length for _, length in transport.asked) == 280_000


@pytest.mark.usefixtures("small_units")
def test_what_is_kept_in_memory_is_bounded():
    transport = Bytes(RNG.bytes(2_000_000))
    file = RemoteFile(parse("http://a/b"), transport)
    file.lay_out([(10_000 + i * 20_000, 30_000 + i * 20_000) for i in range(99)])
    for i in range(99):
        read(file, 10_000 + i * 20_000, 100)
    assert sum(map(len, file._held.values())) <= remote_file.HELD
    with pytest.raises(StorageError, match="expected 2,000,001"):
        read(file, 1_999_999, 2)
