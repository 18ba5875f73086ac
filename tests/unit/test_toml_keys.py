from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.core.toml_keys import Keys, Unwritable, Value, with_keys

SHIPPED = Path(__file__).parents[2] / "packaging" / "edged.toml"
KEYS: Keys = {("device", "id"): "cam1", ("broker", "port"): 8884, ("broker", "ca"): "/x", ("trust", "unsigned"): None}


def test_comments_and_everything_else_stay_as_they_were() -> None:
    text = SHIPPED.read_text()
    new = with_keys(text, KEYS)
    gone, come = (set(a.splitlines()) - set(b.splitlines()) for a, b in ((text, new), (new, text)))
    assert {line.split("=")[0].strip() for line in gone} == {"id", "port"}
    assert {line.split("#")[0].strip() for line in come} == {'id = "cam1"', "port = 8884", 'ca = "/x"'}
    assert all(line.split("#", 1)[1] in new for line in gone if "#" in line)  # the comment behind a changed value
    assert new.splitlines()[:3] == text.splitlines()[:3]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", '[device]\nid = "cam1"\n\n[broker]\nport = 8884\nca = "/x"\n'),
        (
            'device.id = "a"\nbroker.host = "h"\n',
            'device.id = "cam1"\nbroker.host = "h"\nbroker.port = 8884\nbroker.ca = "/x"\n',
        ),
        (
            "[trust]\nunsigned = true  # for now\n[broker]\nport = 1\n# ca = none\n[slots.a]\n[device]\nid = 'x' # me\n",
            '[trust]\n[broker]\nport = 8884\nca = "/x"\n# ca = none\n[slots.a]\n[device]\nid = "cam1" # me\n',
        ),
        (
            '[ device ]\n"id" = "a#b"\n[broker]\nca="old"\nport=1\n[[x]]\nca = 1',
            '[ device ]\n"id" = "cam1"\n[broker]\nca= "/x"\nport= 8884\n[[x]]\nca = 1\n',
        ),
    ],
)
def test_layouts(before: str, after: str) -> None:
    assert with_keys(before, KEYS) == after
    assert with_keys(after, KEYS) == after  # again: nothing changes


@pytest.mark.parametrize(
    "text",
    [
        'device = { id = "a" }\n',
        '[device]\nid = """\na\n"""\n',
        "device = 3\n",
        '[device]\nx = """\nid = "trap"\n"""\n[broker]\nport = [\n1 ]\n',
    ],
)
def test_what_it_does_not_understand_is_left_to_a_person(text: str) -> None:
    with pytest.raises(Unwritable, match=r'by program; write into it:\n  device\.id = "cam1"\n  broker\.port = 8884'):
        with_keys(text, KEYS)


names = st.sampled_from(["a", "b", "c", "device", "broker"])
values = st.one_of(st.text(max_size=8), st.integers(-9, 9), st.booleans())
lines = st.one_of(
    st.builds("{} = {}".format, names, st.sampled_from(["1", '"x"', "'#'", "[1]", '"""', "true # c", "{a = 1}"])),
    st.builds("[{}]".format, st.one_of(names, st.builds("{}.{}".format, names, names))),
    st.builds("{}.{} = 2".format, names, names),
    st.builds("# {}".format, st.text("ab=[]\"'", max_size=6)),
    st.just("[[c]]"),
    st.just(""),
)


@settings(deadline=None)
@given(
    st.lists(lines, max_size=12).map("\n".join),
    st.dictionaries(st.tuples(names, names), values | st.none(), max_size=4),
)
def test_only_what_was_asked_for_changes(text: str, keys: dict[tuple[str, str], Value]) -> None:
    try:
        expected = tomllib.loads(text)
        new = tomllib.loads(with_keys(text, keys))
    except (tomllib.TOMLDecodeError, Unwritable):
        return
    for (table, key), value in keys.items():
        if value is not None:
            expected.setdefault(table, {})[key] = value
        elif isinstance(expected.get(table), dict):
            expected[table].pop(key, None)
    assert new == expected
