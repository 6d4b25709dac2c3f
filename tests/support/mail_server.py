"""A mail server on a real socket, with faults on request."""

import asyncio
import ssl
from collections.abc import Coroutine
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from threading import Thread
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session


class MailServer:
    """Keeps the mails that it receives in `mails` and `recipients`. Each entry of `trouble` is a fault for one mail.

    An entry is a reply to a recipient ("550 ..."), to the sender ("sender 550 ...") or to the text ("text 550 ..."). Or
    it is one of `drop in data`, `drop after data`, `hang` (instead of a reply to the data), `drop at quit`. An
    empty entry is no fault.
    """

    def __init__(
        self, host: str = "127.0.0.1", password: str | None = None, tls: ssl.SSLContext | None = None, **options: Any
    ) -> None:
        self.mails: list[EmailMessage] = []
        self.recipients: list[list[str]] = []
        self.raw: list[bytes] = []
        self.was_encrypted: list[bool] = []
        self.passwords: list[str] = []
        self.trouble: list[str] = []
        self.host, self._password = host, password
        self._options = {"hostname": "mail.example.com", "tls_context": tls, "auth_require_tls": False, **options}
        if password is not None:
            self._options["authenticator"] = self._authenticate
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="mail-server")
        self._thread.start()

    def start(self, tls_at_once: ssl.SSLContext | None = None) -> "MailServer":
        server = self._call(self._loop.create_server(self._protocol, self.host, 0, ssl=tls_at_once))
        self._server, self.port = server, server.sockets[0].getsockname()[1]
        return self

    def url(self, scheme: str = "smtp", login: str = "") -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{login}{host}:{self.port}"

    def close(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the loop closes the transports in its next round

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def _protocol(self) -> SMTP:
        return Protocol(self, **self._options)

    def _authenticate(
        self, _server: SMTP, _session: Session, _envelope: Envelope, mechanism: str, found: LoginPassword
    ) -> AuthResult:
        self.passwords.append(found.password.decode())
        is_right = found.login == b"shop" and found.password.decode() == self._password
        return AuthResult(success=is_right, handled=is_right)

    # -- methods that aiosmtpd calls

    async def handle_MAIL(
        self, server: SMTP, _session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self.trouble and self.trouble[0].startswith("sender "):
            return self.trouble.pop(0).removeprefix("sender ")
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(
        self, server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        if self.trouble and self.trouble[0][:1].isdigit():
            return self.trouble.pop(0)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        if self.trouble and self.trouble[0].startswith("text "):
            return self.trouble.pop(0).removeprefix("text ")
        self.raw.append(envelope.original_content)
        self.mails.append(message_from_bytes(envelope.original_content, policy=default))
        self.recipients.append(envelope.rcpt_tos)
        self.was_encrypted.append(server.transport.get_extra_info("ssl_object") is not None)
        trouble = self.trouble.pop(0) if self.trouble else ""
        if trouble == "drop after data":
            server.transport.abort()
        if trouble == "hang":
            await asyncio.sleep(3600)
        return "250 OK"


class Protocol(SMTP):
    def __init__(self, mail_server: MailServer, **options: Any) -> None:
        super().__init__(mail_server, **options)
        self.mail_server = mail_server

    async def smtp_DATA(self, arg: str) -> None:
        if self._is_to("drop in data"):
            await self.push("354 Go ahead")
            await self._reader.read(20)
            self.transport.abort()
        else:
            await super().smtp_DATA(arg)

    async def smtp_QUIT(self, arg: str) -> None:
        if self._is_to("drop at quit"):
            self.transport.abort()
        else:
            await super().smtp_QUIT(arg)

    def _is_to(self, trouble: str) -> bool:
        """Return True once if this is the next fault on the list."""
        is_next = self.mail_server.trouble[:1] == [trouble]
        if is_next:
            del self.mail_server.trouble[0]
        return is_next
