"""Which addresses an agent's browser may open."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.core.hosts import AllowedHosts, BadHosts, HostRefused

PLANT = AllowedHosts(["plant.example", "wiki.example:8080", "*.shop.example", "127.0.0.1:5000"])


@pytest.mark.parametrize(
    "url",
    [
        "http://plant.example", "https://plant.example/a?b#c", "http://PLANT.example./", "http://wiki.example:8080/",
        "https://a.b.shop.example/", "http://127.0.0.1:5000/x",
    ],
)  # fmt: skip
def test_what_may_be_opened(url: str) -> None:
    assert PLANT.check(url) == url


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "only http and https"),
        ("javascript:alert(1)", "only http and https"),
        ("data:text/html,<b>x", "only http and https"),
        ("view-source:http://plant.example", "only http and https"),
        ("chrome://settings", "only http and https"),
        ("plant.example", "only http and https"),
        ("", "only http and https"),
        ("http://evil.example/", "host evil.example is not allowed"),
        ("http://plant.example.evil.example/", "not allowed"),
        ("http://evilplant.example/", "not allowed"),
        ("http://shop.example/", "not allowed"),
        ("http://plant.example:8080/", "not allowed"),
        ("http://wiki.example/", "not allowed"),
        ("http://127.0.0.1:5001/", "not allowed"),
        ("http://plant.example@evil.example/", "a name or password"),
        ("http://user:secret@plant.example/", "a name or password"),
        ("http://evil.example\\@plant.example/", "a name or password"),
        ("http://plant.example:99999/", "Port out of range"),
        ("http://[::1/", "Invalid IPv6"),
        ("http://plant.example/" + "a" * 3000, "at most 2048"),
        ("http://plant.example/\n", "printable"),
    ],
)
def test_what_may_not(url: str, said: str) -> None:
    with pytest.raises(HostRefused) as error:
        PLANT.check(url)
    assert said in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("hosts", ["plant.example", ["http://plant.example"], ["a b"], ["*"], [""], ["a/b"]])
def test_a_list_that_cannot_be_used_is_refused(hosts: list[str]) -> None:
    with pytest.raises(BadHosts):
        AllowedHosts(hosts)


@given(st.text(max_size=40))
def test_nothing_is_opened_where_nothing_is_allowed(text: str) -> None:
    for url in (text, f"http://{text}", f"https://{text}/x"):
        with pytest.raises(HostRefused):
            AllowedHosts([]).check(url)
