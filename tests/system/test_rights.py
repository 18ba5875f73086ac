"""What somebody with a good certificate cannot do at a real broker: be, read, or speak for anybody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.device import until
from tests.support.plant import Client, Plant

ROOT = "edged/v1"
HASH = "ab" * 32
NOT_AUTHORISED = "Not authorized"


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    built = Plant(tmp_path_factory.mktemp("plant"), ["cam2"], ["big1"])
    built.enroll("cam1", "--group", "line-a")
    built.enroll("cam3", "--group", "line-b")
    built.enroll("asker", "--peer")
    built.enroll("helper", "--peer")
    built.trainer("broker", "config", "--listen", "127.0.0.1", "--user", "root")
    with built:
        yield built


def test_a_device_says_its_own_and_the_trainer_hears_it(plant: Plant) -> None:
    with Client(plant, "host", f"{ROOT}/plant/+/up/metrics") as host, Client(plant, "cam1") as device:
        assert host.say(f"{ROOT}/_host/host/state") == ""
        assert device.say(f"{ROOT}/plant/cam1/up/metrics") == ""
        until("the trainer hears it", lambda: f"{ROOT}/plant/cam1/up/metrics" in host.topics())


@pytest.mark.parametrize(
    "topic",
    [
        "plant/cam2/up/metrics", "plant/cam2/up/reply/1", "plant/cam2/down/desired", "plant/cam2/down/verdict",
        "plant/cam1/down/desired", "plant/_g/line-a/down/desired", "other/cam1/up/state",
        f"_blocks/{HASH}/0", "_host/host/state", "_host/host/metadata", "_host/cam1/state", "_resp/big/detect/cam1.r",
    ],
)  # fmt: skip
def test_a_device_cannot_speak_for_others(plant: Plant, topic: str) -> None:
    with Client(plant, "cam1") as device, Client(plant, "cam1~blk") as bulk:
        assert device.say(f"{ROOT}/{topic}") == NOT_AUTHORISED
        assert bulk.say(f"{ROOT}/{topic}") == NOT_AUTHORISED


def test_the_second_connection_carries_blocks_and_nothing_else(plant: Plant) -> None:
    with Client(plant, "cam1~blk", f"{ROOT}/_blocks/{HASH}/+", f"{ROOT}/plant/cam1/down/desired") as bulk:
        assert bulk.say(f"{ROOT}/plant/cam1/up/want/{HASH}") == ""
        assert bulk.say(f"{ROOT}/plant/cam1/up/blob/{HASH}/3") == ""
        assert bulk.say(f"{ROOT}/plant/cam1/up/state") == NOT_AUTHORISED
        assert bulk.link.refused == {f"{ROOT}/plant/cam1/down/desired"}


@pytest.mark.parametrize(
    "topic",
    [
        f"{ROOT}/plant/cam2/up/#", f"{ROOT}/plant/cam2/down/#", f"{ROOT}/plant/+/up/metrics", f"{ROOT}/#", "#",
        f"{ROOT}/plant/_g/line-b/down/desired", f"{ROOT}/plant/_g/+/down/desired", "$CONTROL/#",
        f"$share/big-detect/{ROOT}/plant/+/up/esc/big/detect", f"$share/x/{ROOT}/plant/cam1/up/#",
        f"$share/x/{ROOT}/plant/cam1/down/#", f"{ROOT}/plant/cam1/up/#",
    ],
)  # fmt: skip
def test_a_device_cannot_listen_to_others_nor_take_what_is_for_responders(plant: Plant, topic: str) -> None:
    own = f"{ROOT}/plant/cam1/down/desired"
    with Client(plant, "cam1", topic, own) as device:
        device.say(f"{ROOT}/plant/cam1/up/event")
        assert device.link.refused == {topic}


def test_a_group_is_heard_by_its_own_devices_only(plant: Plant) -> None:
    topic = f"{ROOT}/plant/_g/line-a/down/desired"
    with Client(plant, "cam1", topic) as mine, Client(plant, "cam3", topic) as other, Client(plant, "host") as host:
        for device in (mine, other):
            device.say(f"{ROOT}/plant/{device.link.options.client_id}/up/event")
        assert host.say(topic) == ""
        until("its device hears it", lambda: topic in mine.topics())
        assert other.link.refused == {topic}
        assert other.topics() == []


def test_questions_reach_the_responder_and_nobody_who_asked_for_them_in_its_place(plant: Plant) -> None:
    shared = f"$share/big-detect/{ROOT}/plant/+/up/esc/big/detect"
    with Client(plant, "big1", shared) as responder, Client(plant, "cam2", shared) as thief:
        responder.say(f"{ROOT}/plant/big1/up/event")
        thief.say(f"{ROOT}/plant/cam2/up/event")
        with Client(plant, "cam1") as device:
            for _ in range(6):  # a shared subscription would give the thief half of them
                assert device.say(f"{ROOT}/plant/cam1/up/esc/big/detect") == ""
        until("all six", lambda: len(responder.topics()) == 6)
        assert thief.topics() == []
        assert responder.link.refused == set()
        assert responder.say(f"{ROOT}/plant/cam1/down/verdict") == ""
        assert responder.say(f"{ROOT}/plant/cam1/down/desired") == NOT_AUTHORISED


def test_only_peers_invoke_agents_of_other_devices_and_only_in_their_own_name(plant: Plant) -> None:
    root = f"{ROOT}/plant"
    with (
        Client(plant, "asker", f"{root}/asker/down/invoked/+/+") as asker,
        Client(plant, "helper", f"{root}/helper/down/invoke/+/+") as helper,
    ):
        assert asker.say(f"{root}/helper/down/invoke/clerk/asker") == ""
        until("it is asked", lambda: f"{root}/helper/down/invoke/clerk/asker" in helper.topics())
        assert helper.say(f"{root}/asker/down/invoked/helper/i1") == ""
        until("it is answered", lambda: f"{root}/asker/down/invoked/helper/i1" in asker.topics())
        for forged in ("helper/down/invoke/clerk/cam1", "cam1/down/invoked/helper/i1", "helper/down/desired"):
            assert asker.say(f"{root}/{forged}") == NOT_AUTHORISED
        assert asker.say(f"{ROOT}/other/helper/down/invoke/clerk/asker") == NOT_AUTHORISED
    with Client(plant, "cam1", f"{root}/helper/down/invoke/+/+") as device:  # no peer
        assert device.say(f"{root}/helper/down/invoke/clerk/cam1") == NOT_AUTHORISED
        assert device.say(f"{root}/asker/down/invoked/cam1/i1") == NOT_AUTHORISED
        assert device.link.refused == {f"{root}/helper/down/invoke/+/+"}


def test_a_certificate_cannot_take_another_clients_id_and_session(plant: Plant) -> None:
    verdict = f"{ROOT}/plant/cam2/down/verdict"
    with Client(plant, "cam2", verdict, session_s=60) as victim:
        victim.say(f"{ROOT}/plant/cam2/up/event")
        with Client(plant, "cam1", client_id="cam2", session_s=60) as thief, Client(plant, "big1") as responder:
            assert thief.say(f"{ROOT}/plant/cam2/up/event") == NOT_AUTHORISED
            assert thief.say(f"{ROOT}/plant/cam1/up/event") == ""  # it is who its certificate says
            assert responder.say(verdict) == ""
            until("the owner hears it", lambda: verdict in victim.topics())
            assert thief.topics() == []
        assert victim.connections == 1  # it was not thrown out


def test_an_observer_sees_everything_and_moves_nothing(plant: Plant) -> None:
    plant.trainer("ca", "issue", "eye", "--role", "observer")
    plant.trainer("broker", "admit", "eye")
    with Client(plant, "eye", f"{ROOT}/#") as observer, Client(plant, "cam1") as device:
        assert observer.say(f"{ROOT}/plant/cam1/down/desired") == NOT_AUTHORISED
        device.say(f"{ROOT}/plant/cam1/up/event")
        until("it sees it", lambda: f"{ROOT}/plant/cam1/up/event" in observer.topics())


def test_a_certificate_that_the_broker_was_not_told_of_can_do_nothing_until_it_is(plant: Plant) -> None:
    plant.enroll("cam9")
    own = f"{ROOT}/plant/cam9/up/event"
    with Client(plant, "cam9") as device:
        assert device.say(own) == NOT_AUTHORISED
        plant.trainer("broker", "admit", "cam9")
        assert until("it is known", lambda: device.say(own) == "")


def test_a_device_that_moves_to_another_group_no_longer_hears_the_old_one(plant: Plant, tmp_path: Path) -> None:
    topic = f"{ROOT}/plant/_g/line-a/down/desired"
    plant.enroll("cam8", "--group", "line-a")
    plant.trainer("broker", "admit", "cam8")
    with Client(plant, "cam8", topic, session_s=60) as device:
        device.say(f"{ROOT}/plant/cam8/up/event")
        assert device.link.refused == set()
    plant.enroll("cam8", "--group", "line-b")
    plant.trainer("broker", "admit", "cam8")
    with (
        Client(plant, "cam8", session_s=60) as device,
        Client(plant, "host") as host,
    ):  # its session has the subscription
        assert host.say(topic) == ""
        assert host.say(f"{ROOT}/plant/cam8/down/verdict") == ""
        device.say(f"{ROOT}/plant/cam8/up/event")
        assert device.topics() == []
