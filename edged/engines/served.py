"""An engine in a process of its own. `python -m edged.engines.served FD PARENT TITLE`, started by `edged.engines.host`.

It speaks frames on the socket FD. The main thread works; another one listens, so that pings are answered and a request can
be halted while the engine computes (engines release the interpreter's lock in their native code). When the socket closes,
whether the daemon closed it or died, the process ends at once: all that it has belongs to the system again.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

from edged.engines.base import EngineError, EngineOptions, Generator, open_engine
from edged.engines.frames import START, Frame, Unpacker, answer_frame, error_frame, pack, request_of
from edged.wire.manifest import ReleaseManifest

CHUNK_BYTES = 1 << 16
OOM_SCORE = 500  # of 1000: when memory runs out the kernel takes this process before the daemon
EXIT_FAULT = 70  # EX_SOFTWARE: a fault of ours, its traceback is on standard error
_PR_SET_PDEATHSIG = 1


class Served:
    """The engine's side of the conversation."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        self._orders: queue.SimpleQueue[Frame] = queue.SimpleQueue()  # the daemon asks for one thing at a time
        self._halt = (START, "")  # request, reason
        self._engine: Generator | None = None
        self._acts = {"load": self._load, "generate": self._generate, "attach": self._attach}

    def run(self) -> None:
        """Work until the daemon hangs up; does not return."""
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        while True:
            order = self._orders.get()
            try:
                self._acts[order["do"]](order)
            except EngineError as error:
                self._say(error_frame(order["id"], error))
            except Exception as error:
                traceback.print_exc()
                self._say(error_frame(order["id"], error))

    def _listen(self) -> None:
        try:
            unpacker = Unpacker()
            while data := self._socket.recv(CHUNK_BYTES):
                for frame in unpacker.feed(data):
                    self._hear(frame)
        except ConnectionError:
            pass
        except BaseException:
            traceback.print_exc()
            os._exit(EXIT_FAULT)
        os._exit(0)  # past an engine that may be deep in native code

    def _hear(self, frame: Frame) -> None:
        if frame["do"] == "ping":
            self._say({"say": "pong"})
        elif frame["do"] == "halt":
            self._halt = (frame["id"], frame["reason"])
        else:
            self._orders.put(frame)

    def _say(self, frame: Frame) -> None:
        with self._sending:
            try:
                self._socket.sendall(pack(frame))
            except OSError:
                os._exit(0)  # nobody listens any more

    def _load(self, order: Frame) -> None:
        manifest = ReleaseManifest.model_validate(order["manifest"])
        options = order["options"] | {"providers": tuple(order["options"]["providers"])}
        engine = open_engine(Path(order["folder"]), manifest, EngineOptions(**options))
        if not isinstance(engine, Generator):
            raise EngineError(f"release {manifest.release} is no generator (kind {manifest.kind})")
        self._engine = engine
        self._say({"say": "loaded", "id": order["id"], "context": engine.context})

    def _generate(self, order: Frame) -> None:
        number: int = order["id"]

        def halt() -> str:
            request, reason = self._halt
            return reason if request == number else ""

        answer = self._loaded().generate(request_of(order["request"], halt))
        self._say({"say": "accepted", "id": number})
        for event in answer:
            self._say(answer_frame(number, event))

    def _attach(self, order: Frame) -> None:
        adapter = order["adapter"]
        self._loaded().attach(Path(adapter) if adapter is not None else None, order["scale"])
        self._say({"say": "accepted", "id": order["id"]})

    def _loaded(self) -> Generator:
        if self._engine is None:
            raise EngineError("no release is loaded")
        return self._engine


def _join(parent: int) -> None:
    """Make this process what the daemon expects of it. Limits of its own (memory) belong here."""
    # The daemon ends it when its requests are done. systemd sends SIGTERM to every process of the service at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel knew that this process goes with it
        os._exit(0)
    score = Path("/proc/self/oom_score_adj")
    try:
        score.write_text(str(max(OOM_SCORE, int(score.read_text()))))
    except OSError as error:
        print(f"oom_score_adj is not set: {error}", file=sys.stderr)


def main() -> None:
    """Entry point of the process."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    _join(parent)
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    Served(connection).run()


if __name__ == "__main__":
    main()
