from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from layerfold.environment import hub_reachable


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    hub_reachable.cache_clear()
    yield
    hub_reachable.cache_clear()


def refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("nothing is to be asked")


@pytest.mark.parametrize(
    ("name", "value", "reachable"),
    [
        ("HF_HUB_OFFLINE", "1", False),
        ("HF_HUB_OFFLINE", "True", False),
        ("HTTPS_PROXY", "http://proxy:3128", True),
        ("all_proxy", "socks5://proxy", True),
    ],
)
def test_the_environment_may_say_so(name: str, value: str, reachable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv(name, value)
    assert hub_reachable() is reachable


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        (None, ("huggingface.co", 443)),
        ("http://mirror.local", ("mirror.local", 80)),
        ("https://mirror.local:8443/hub", ("mirror.local", 8443)),
    ],
)
def test_one_short_attempt_is_made_and_remembered(
    endpoint: str | None, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> None:
        assert timeout <= 5
        attempts.append(address)
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", connect)
    if endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert hub_reachable() is False
    assert hub_reachable() is False
    assert attempts == [address]


def test_a_connection_that_opens_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = socket.socketpair()
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: one)
    assert hub_reachable() is True
    assert one.fileno() == -1
    other.close()
