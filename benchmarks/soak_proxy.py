"""What stands between a process and its database where a network would: lines that fall silent, or lose the replies."""

import asyncio
import threading
from contextlib import suppress

CHUNK = 65_536


def has_line(slot: int) -> bool:
    """Every other process is connected by a line that can fall silent."""
    return slot % 2 == 1


class Proxy:
    """`lines` ports of this host, each of which leads to the PostgreSQL server behind `socket`."""

    def __init__(self, socket: str, lines: int) -> None:
        self._socket = socket
        self._loop = asyncio.new_event_loop()
        self._requests_pass = [asyncio.Event() for _ in range(lines)]
        self._replies_pass = [asyncio.Event() for _ in range(lines)]
        self._writers: list[set[asyncio.StreamWriter]] = [set() for _ in range(lines)]
        self._servers: list[asyncio.Server] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="soak-proxy", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(lines), self._loop).result()
        self.ports: list[int] = [server.sockets[0].getsockname()[1] for server in self._servers]

    def silence(self, line: int, replies_only: bool = False) -> None:
        """Let nothing pass any more, and nobody notice: neither an error nor an end."""

        def silence() -> None:
            self._replies_pass[line].clear()
            if not replies_only:
                self._requests_pass[line].clear()

        self._loop.call_soon_threadsafe(silence)

    def resume(self, line: int, cut: bool) -> None:
        """Let everything pass again; with `cut`, what was under way is lost with its connections."""

        def resume() -> None:
            for writer in list(self._writers[line]) if cut else ():
                writer.transport.abort()
            self._requests_pass[line].set()
            self._replies_pass[line].set()

        self._loop.call_soon_threadsafe(resume)

    def close(self) -> None:
        async def close() -> None:
            for server in self._servers:
                server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self, lines: int) -> None:
        for line in range(lines):
            self._requests_pass[line].set()
            self._replies_pass[line].set()

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: int = line) -> None:
                await self._serve(line, reader, writer)

            self._servers.append(await asyncio.start_server(serve, "127.0.0.1", 0))

    async def _serve(self, line: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = {writer}
        try:
            await self._requests_pass[line].wait()
            server_reader, server_writer = await asyncio.open_unix_connection(self._socket)
            writers.add(server_writer)
            self._writers[line] |= writers
            directions = [
                asyncio.ensure_future(_pump(reader, server_writer, self._requests_pass[line])),
                asyncio.ensure_future(_pump(server_reader, writer, self._replies_pass[line])),
            ]
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            for direction in directions:
                direction.cancel()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers[line] -= writers
            for each in writers:
                each.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, may_pass: asyncio.Event) -> None:
    with suppress(OSError):
        while data := await reader.read(CHUNK):
            await may_pass.wait()
            writer.write(data)
            await writer.drain()
