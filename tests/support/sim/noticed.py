"""For every fsync of the product (mutants.py): which scenario notices that it is left out, and in how many seeds."""

from __future__ import annotations

# How many: several times as many as it took when it was measured.
NOTICED = {
    "edged/dataset.py:write:sync(beside)": ("repairs", 400),
    "edged/dataset.py:write:sync(path.parent)": ("repairs", 400),
    "edged/delivery.py:Delivery._bring_manifest:sync(beside)": ("updates", 400),
    "edged/delivery.py:Delivery.fetch:sync(folder)": ("updates", 1500),
    "edged/enroll.py:_put:os.fsync": ("repairs", 400),
    "edged/enroll.py:carry_out:sync(folder)": ("repairs", 400),
    "edged/enroll.py:carry_out:sync(plan.config.resolve().parent)": ("repairs", 400),
    "edged/files.py:sync:os.fsync": ("repairs", 400),
    "edged/orders.py:Orders.__init__:sync(state)": ("repairs", 2500),
    "edged/orders.py:place:sync(beside)": ("repairs", 400),
    "edged/orders.py:place:sync(folder)": ("repairs", 400),
    "edged/part.py:Part.finish:os.fsync": ("updates", 400),
    "edged/part.py:Part.finish:sync(self.target.parent)": ("updates", 400),
    "edged/releases.py:Releases.__init__:sync(root.parent)": ("updates", 1500),
    "edged/releases.py:Releases.begin:sync(self.root)": ("repairs", 1500),
    "edged/releases.py:Releases.install:sync(beside / name)": ("repairs", 400),
    "edged/releases.py:Releases.install:sync(beside)": ("repairs", 400),
    "edged/releases.py:Releases.install:sync(self.root)": ("repairs", 1500),
    "edged/store/blobs.py:Blobs.__init__:sync(folder)": ("repairs", 1500),
    "edged/store/blobs.py:Blobs.__init__:sync(folder.parent)": ("repairs", 1500),
    "edged/store/blobs.py:Blobs.write:os.fsync": ("samples", 400),
    "edged/store/blobs.py:Blobs.write:sync(target.parent)": ("samples", 400),
    'edged/store/database.py:_Connection.__init__:"PRAGMA synchronous=FULL"': ("repairs", 1500),
    "edged/store/database.py:Database.write:f\"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}\"": (
        "samples",
        1500,
    ),
    "edged/store/integrity.py:_mark:sync(beside)": ("repairs", 1500),
    "edged/store/integrity.py:_mark:sync(marker.parent)": ("repairs", 1500),
    "edged/store/integrity.py:set_aside:sync(folder)": ("repairs", 2500),
    "edged/store/recover.py:_take_over:sync(folder)": ("repairs", 1500),
    "edged/store/recover.py:_copy:sync(beside)": ("repairs", 1500),
    "edged/trust.py:write_durably:os.fsync": ("repairs", 400),
    "edged/trust.py:write_durably:sync(path.parent)": ("repairs", 400),
    'trainer/database.py:_configure:"synchronous = FULL"': ("rollouts", 400),
    "trainer/files.py:make_folder:sync_folder(path.parent)": ("repairs", 400),
    "trainer/files.py:sync_folder:os.fsync": ("repairs", 400),
    "trainer/files.py:write_whole:os.fsync": ("repairs", 400),
    "trainer/files.py:write_whole:sync_folder(path.parent)": ("repairs", 400),
    "trainer/keys.py:Key.save:os.fsync": ("repairs", 400),
    "trainer/keys.py:Key.save:sync_folder(folder)": ("repairs", 400),
    "trainer/releases.py:Registry.register:sync_folder(beside)": ("repairs", 400),
    "trainer/releases.py:Registry.register:sync_folder(self.folder)": ("repairs", 400),
    "trainer/releases.py:_copy_checked:os.fsync": ("repairs", 400),
    "trainer/releases.py:_write_synced:os.fsync": ("repairs", 400),
}

NOT_SIMULATED = {
    "edged/check_machine.py:_durable:os.fsync": "tries whether the disk can do it; nothing is kept",
    "edged/store/database.py:Database.__init__:sync(path.parent)": (
        "SQLite fsyncs the folder of a log that it made itself; this is for a log that a killed process made and did not "
        "get to fsync, and in a world of the simulation everything is on the disk after a kill"
    ),
    "trainer/ceremony.py:create:sync_folder(folder.parent)": (
        "a person's command, repeated by hand: keys whose folder is gone have signed nothing that anybody has"
    ),
    "trainer/export/gguf.py:written_beside:os.fsync": "a step of a training, which begins anew after a power cut",
    "trainer/formats/base.py:whole_folder:sync_folder(made)": "an export, which is made again after a power cut",
    "trainer/formats/base.py:whole_folder:sync_folder(beside)": "the same",
    "trainer/formats/base.py:whole_folder:sync_folder(folder.parent)": "the same",
    "trainer/server.py:Server._receive:os.fsync": "a device hands the pixels over again until its claim is confirmed",
    "trainer/server.py:Server._receive:run_in_threadpool(sync_folder, self._samples)": "the same",
}
