"""A training job claims samples of a device that can reach only the broker: `trainer serve` fetches them as blocks."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from edged.bulk import Bulk
from edged.clock import SystemClock
from edged.fetch import Fetcher, FetchError
from edged.link import LinkOptions
from edged.uploads import Uploads
from tests.system.test_trainer_serve import SITE, Trainer, job_of, running, until


def arrived(trainer: Trainer) -> int:
    """Samples that are kept at the trainer."""
    folder = trainer.folder / "data" / "samples"
    return sum(1 for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else 0


@pytest.mark.timeout(180)
def test_claimed_samples_come_as_blocks_through_a_kill_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_BLOCKS__SAMPLES", "true")
    monkeypatch.setenv("TRAINER_BLOCKS__KIB_S", "256")
    with running(tmp_path, "d1") as (broker, trainer, (device,)):
        counted, ended = Counter[str](), threading.Event()

        def count(name: str, n: int) -> None:
            counted[name] += n

        def slowly(_bytes: int) -> None:  # so that there is a middle
            ended.wait(0.02)

        bulk = Bulk(LinkOptions(broker.host, broker.port, "d1~blk", reconnect_s_max=1), count)
        uploads = Uploads(Fetcher(), bulk, SITE, "d1", SystemClock(), count, slowly)
        for number in range(101):
            device.catalogue(number)
        claim_id, claim = until("the device is asked", device.claims)[0]
        assert claim.upload_url == ""
        files = {}
        for digest, data in device.pixels.items():
            files[digest] = tmp_path / digest
            files[digest].write_bytes(data)

        def answer() -> None:
            with suppress(FetchError):
                uploads.answer(files, ended.is_set)
                device.done(claim_id)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            until("the first have come", lambda: arrived(trainer) >= 5)
            trainer.end(signal.SIGKILL)
            trainer.start()
            job = until("the job went on with them", lambda: (j := job_of(trainer)).get("status") == "failed" and j)
            assert "missing.pt" in job["detail"]
            assert job["metrics"]["samples_used"] == 101
            assert counted["blocks_sent"] <= 101 + 16 + 5, "what had come was not sent again"
        finally:
            ended.set()
            thread.join()
            bulk.close()
