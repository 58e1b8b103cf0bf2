"""Addresses of clusters are looked at before Ray is."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time

import pytest

from fewstep.cli import main
from fewstep.errors import FewstepError
from fewstep.scale import RayMap
from fewstep.scale.actors import NOT_PRINTED, import_ray
from fewstep.scale.address import check_address


@pytest.fixture
def port():
    """One at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    return number


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_an_address_is_taken_if_something_listens_there(form, port):
    with pytest.raises(FewstepError, match=rf"there is no Ray cluster at {re.escape(form.format(port))}: Connection refused\."):
        check_address(form.format(port))
    with answering(port, bytes.fromhex("000006040000000000000400100000")):
        check_address(form.format(port))


@contextlib.contextmanager
def answering(port, words):
    """Something that listens, and says this to whoever comes."""

    def serve(listening):
        with listening.accept()[0] as connection:
            connection.recv(100)
            connection.sendall(words)

    with socket.create_server(("127.0.0.1", port)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        yield
        thread.join(30)


@pytest.mark.parametrize("words", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_what_is_no_cluster_is_refused(port, words):
    why = "what listens there, perhaps its dashboard, is something else"
    with answering(port, words), pytest.raises(FewstepError, match=f"there is no Ray cluster at 127.0.0.1:{port}: {why}"):
        check_address(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["head", "head:port", "10.0.0.7:70000", "http://head:6379", "ray://", "local", ":6379", "[::1"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match=rf"is host:port, ray://host:port or auto, not '{re.escape(address)}'"):
        check_address(address)


def test_one_that_does_not_answer_is_given_up(monkeypatch):
    def silent(place, timeout):
        assert place == ("fe80::1", 6379)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(FewstepError, match=r"there is no Ray cluster at \[fe80::1\]:6379: no answer within 2 s\."):
        check_address("[fe80::1]:6379", seconds=2.0)


def test_auto_is_left_to_ray_but_for_the_variable(monkeypatch, port):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_address("auto")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(FewstepError, match=rf"127\.0\.0\.1:{port} \(the variable RAY_ADDRESS\): Connection refused"):
        check_address("auto")


@pytest.mark.parametrize(
    "command", [["sample", "digits", "--shards"], ["compare", "digits"], ["tune", "digits"]], ids=lambda c: c[0]
)
def test_commands_refuse_it_before_a_model_is_opened(command, port, monkeypatch, capsys):
    monkeypatch.setattr("fewstep.cli.setup.open_model", lambda *_, **__: pytest.fail("the model was opened"))
    begun = time.monotonic()
    assert main([*command, "--engine", "ray", "--address", f"127.0.0.1:{port}"]) == 2
    assert time.monotonic() - begun < 30.0
    assert capsys.readouterr().err == f"fewstep: there is no Ray cluster at 127.0.0.1:{port}: Connection refused.\n"


def test_what_asks_ray_refuses_it_too(port, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: the extra `scale` brings it")
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever other tests have started
    with pytest.raises(FewstepError, match="there is no Ray cluster at"):
        list(RayMap(1, f"127.0.0.1:{port}")(abs, [-1]))


def test_pages_on_lost_workers_are_not_printed_unless_wanted(monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: the extra `scale` brings it")
    monkeypatch.delenv("RAY_DEDUP_LOGS_SKIP_REGEX", raising=False)
    import_ray()
    assert os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] == NOT_PRINTED
    monkeypatch.setenv("RAY_DEDUP_LOGS_SKIP_REGEX", "nothing")
    import_ray()
    assert os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] == "nothing"
