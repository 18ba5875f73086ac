"""The topic table: what is built can be parsed and is subscribed to; what is no topic level is refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.wire import topics
from edged.wire.topics import ROUTES, Route

RESERVED = {"_g", "_host", "_resp", "_blocks"}
levels = st.text("abcXYZ019_.@:-", min_size=1, max_size=20).filter(lambda text: text not in RESERVED)


def matches(pattern: str, topic: str) -> bool:
    """MQTT's own rule for subscriptions (MQTT 5, section 4.7.1)."""
    for wanted, found in itertools.zip_longest(pattern.split("/"), topic.split("/")):
        if wanted == "#":
            return True
        if found is None or wanted not in {"+", found}:
            return False
    return True


@given(st.sampled_from(ROUTES), st.data())
def test_what_is_built_can_be_parsed_and_is_subscribed_to(route: Route, data: st.DataObject) -> None:
    fields = {name: data.draw(levels) for name in route.fields}
    topic = route(**fields).topic
    assert topics.parse(topic) == (route, fields)
    some = {name: value for name, value in fields.items() if data.draw(st.booleans())}
    assert matches(route.filter(**some), topic)
    group, rest = route.shared("g", **some).removeprefix("$share/").split("/", 1)
    assert group == "g"
    assert matches(rest, topic)


@given(st.sampled_from(ROUTES), levels, levels)
def test_a_filter_with_fields_takes_nobody_elses_topics(route: Route, mine: str, other: str) -> None:
    if mine != other:
        name = route.fields[0]
        assert not matches(
            route.filter(**{name: mine}), route(**{**dict.fromkeys(route.fields, "x"), name: other}).topic
        )


@pytest.mark.parametrize("level", ["", "a/b", "+", "#", "a b", "ü", "a\n", "\0", "x" * 129, "$SYS"])
def test_what_is_no_topic_level_is_refused(level: str) -> None:
    with pytest.raises(ValueError, match=r"dev=.* is no topic level; use letters, digits"):
        topics.STATE(site="plant", dev=level)
    assert topics.parse(f"edged/v1/plant/{level}/up/state") is None


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="dev=None"):
        topics.STATE(site="plant")


@given(st.text(max_size=60))
def test_any_text_parses_to_something_or_nothing(text: str) -> None:
    parsed = topics.parse(text)
    if parsed is not None:
        route, fields = parsed
        assert route(**fields).topic == text


def test_delivery_is_what_the_protocol_says() -> None:
    delivery = {route.template.removeprefix("edged/v1/"): (route.qos, route.retain, route.expiry_s) for route in ROUTES}
    assert delivery == {
        "{site}/{dev}/up/state": (1, True, None),
        "{site}/{dev}/up/reported": (1, True, None),
        "{site}/{dev}/up/esc/{tier}/{task}": (1, False, 604800),
        "{site}/{dev}/up/sample": (1, False, 86400),
        "{site}/{dev}/up/result/{pipeline}": (1, False, 60),
        "{site}/{dev}/up/metrics": (1, False, 3600),
        "{site}/{dev}/up/event": (1, False, 86400),
        "{site}/{dev}/up/reply/{id}": (1, False, 60),
        "{site}/{dev}/up/partial/{id}": (0, False, 60),
        "{site}/{dev}/up/cmd/{type}/{id}": (1, False, 86400),
        "{site}/{dev}/down/invoke/{agent}/{caller}": (1, False, 3600),
        "{site}/{dev}/down/invoked/{by}/{id}": (1, False, 60),
        "{site}/{dev}/down/desired": (1, True, None),
        "{site}/_g/{group}/down/desired": (1, True, None),
        "{site}/{dev}/down/verdict": (1, False, 86400),
        "{site}/{dev}/down/infer/{pipeline}": (1, False, 60),
        "{site}/{dev}/down/cmd/{type}/{id}": (1, False, 86400),
        "_host/{trainer}/state": (1, True, None),
        "_resp/{tier}/{task}/{responder}": (1, True, 90),
        "_host/{trainer}/metadata": (1, True, None),
        "{site}/{dev}/up/want/{sha256}": (1, False, 60),
        "_blocks/{sha256}/{n}": (0, False, 60),
        "{site}/{dev}/down/blocks/{sha256}": (1, False, 60),
        "{site}/{dev}/up/blob/{sha256}/{n}": (0, False, 60),
    }


def test_an_address_can_expire_sooner_but_never_at_once() -> None:
    address = topics.ESCALATION(site="s", dev="d", tier="big", task="detect")
    assert address.expiring(90.9).expiry_s == 90
    assert address.expiring(-5).expiry_s == 1
