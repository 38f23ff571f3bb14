# SPDX-License-Identifier: Apache-2.0
"""The launchers of a job's hosts, in touch: they start together, learn of each other's end, and leave together.

A host that vanishes leaves the others in a collective that nobody answers, and whose time-out names nobody. So each
launcher keeps a connection to the first host's, says every two seconds how it is, and hears how all are: one JSON
object a line. A launcher has nothing else to do, so that silence means that its host is gone.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

from llm_trainer.errors import Failure

PORT = 7778
HEARTBEAT_SECONDS = 2.0
SILENCE_SECONDS = 30.0  # a host that says nothing for so long is lost
RECONNECT_SECONDS = 5.0  # so is one whose connection broke and was not made again; a killed container's is not
MAX_RETRY_SECONDS = 5.0
FAREWELL_SECONDS = 0.5  # for the last word to be sent


@dataclass(frozen=True)
class State:
    """How a host is: `ready`, then `running` its nth attempt, at last `done` or `failed`; `lost` is said by others."""

    phase: str = "absent"
    attempt: int = 0
    failure: Failure | None = None

    @property
    def is_final(self) -> bool:
        return self.phase in ("done", "failed", "lost")


def parse_state(fields: dict[str, Any]) -> State:
    failure = fields["failure"]
    return State(fields["phase"], fields["attempt"], Failure(**failure) if failure else None)


@dataclass
class Contact:
    """What is known of a host, and since when."""

    state: State = field(default_factory=State)
    heard_at: float = field(default_factory=time.monotonic)
    broken_at: float | None = None

    def hear(self, state: State) -> None:
        self.state, self.heard_at, self.broken_at = state, time.monotonic(), None

    def judge(self) -> State:
        """Its state, or `lost` where it was there, was not at its end, and no longer answers."""
        now = time.monotonic()
        is_cut = self.broken_at is not None and now - self.broken_at > RECONNECT_SECONDS
        is_silent = now - self.heard_at > SILENCE_SECONDS
        if self.state.phase == "absent" or self.state.is_final or not (is_cut or is_silent):
            return self.state
        return State("lost", self.state.attempt)


class Hosts:
    """All hosts of a job as one of them sees them. The first one's launcher is the hub; alone, nothing is opened."""

    def __init__(self, names: Sequence[str], own: str) -> None:
        self.names = names
        self.own = own
        self.hub = names[0]
        self.contacts = {name: Contact() for name in names}
        self.lines: dict[str, asyncio.StreamWriter] = {}
        self.error: OSError | None = None  # why the hub cannot be reached
        self.loop = asyncio.new_event_loop()
        self.changed, self.closing = asyncio.Event(), asyncio.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Self:
        if len(self.names) > 1:
            if self.own == self.hub:
                self.server = socket.create_server(("", PORT))
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.thread.is_alive():
            time.sleep(FAREWELL_SECONDS)
            self.loop.call_soon_threadsafe(self.closing.set)
            self.thread.join()

    def run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self.keep_in_touch_until_closed())

    def publish(self, state: State) -> None:
        """Tell all hosts how this one is."""
        self.contacts[self.own].hear(state)
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.changed.set)

    def states(self) -> dict[str, State]:
        return {name: contact.state if name == self.own else contact.judge() for name, contact in self.contacts.items()}

    async def keep_in_touch_until_closed(self) -> None:
        keeping_in_touch = asyncio.ensure_future(self.keep_in_touch())
        await self.closing.wait()
        keeping_in_touch.cancel()  # the runner cancels what else there is

    async def keep_in_touch(self) -> None:
        if self.own == self.hub:
            server = await asyncio.start_server(self.listen, sock=self.server)
            async with server:
                await self.repeat(self.tell_all)
        else:
            await self.report()

    async def repeat(self, speak: Any) -> None:
        """Speak at every change, and at every heartbeat."""
        while True:
            self.changed.clear()
            await speak()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), HEARTBEAT_SECONDS)

    async def tell_all(self) -> None:
        table = {name: asdict(state) for name, state in self.states().items()}
        for line in list(self.lines.values()):
            with suppress(ConnectionError):  # the reader of that line notes it
                line.write(json.dumps(table).encode() + b"\n")

    async def listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The hub's side of one connection."""
        name = None
        with suppress(ConnectionError):
            async for text in reader:
                message = json.loads(text)
                name = message.pop("host")
                if name not in self.contacts:
                    break
                self.lines[name] = writer
                before = self.contacts[name].state
                self.contacts[name].hear(parse_state(message))
                if self.contacts[name].state != before:
                    self.changed.set()
        writer.close()
        if name in self.contacts and self.lines.get(name) is writer:
            del self.lines[name]
            self.contacts[name].broken_at = time.monotonic()

    async def report(self) -> None:
        """The other hosts' side: keep a connection to the hub, whose name may take minutes to resolve."""
        wait = 0.1
        while True:
            try:
                reader, writer = await asyncio.open_connection(self.hub, PORT)
            except OSError as error:
                self.error = error
                await asyncio.sleep(wait)
                wait = min(2 * wait, MAX_RETRY_SECONDS)
                continue
            wait, self.error = 0.1, None
            speaking = asyncio.ensure_future(self.repeat(lambda writer=writer: self.tell_hub(writer)))
            with suppress(ConnectionError):
                async for text in reader:
                    for name, state in json.loads(text).items():
                        if name != self.own:
                            self.contacts[name].hear(parse_state(state))
            speaking.cancel()
            writer.close()
            self.contacts[self.hub].broken_at = time.monotonic()

    async def tell_hub(self, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            writer.write(json.dumps({"host": self.own, **asdict(self.contacts[self.own].state)}).encode() + b"\n")
            await writer.drain()
