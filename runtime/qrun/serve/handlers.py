"""One request over HTTP, in whatever API: its answers whole, or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from qrun.answer import Answer, Piece
from qrun.decoding.sequence import Scored
from qrun.engine import Engine
from qrun.errors import QrunError
from qrun.serve import streams
from qrun.serve.asking import Asked
from qrun.serve.dialects import Dialect
from qrun.serve.errors import ApiError, from_qrun
from qrun.serve.events import PING
from qrun.serve.fields import decode
from qrun.serve.reply import Chunk, Happening, Reply
from qrun.serve.stamps import Stamps
from qrun.serve.state import ServerState, client_of, engine_of, json_response, note, read_body

# What has happened to which answer; None where nothing has for a while.
Happened = tuple[int, Happening | None]


async def complete(request: Request, dialect: Dialect) -> Response:
    """Answer one request.

    Raises:
        ApiError: it is refused.
    """
    state: ServerState = request.app.state.server
    fields: Any = decode(await read_body(request), dialect.fields)
    engine = await engine_of(request, fields.model)
    note(request, model=fields.model, stream=fields.stream)
    try:  # in another thread, since rendering and encoding a long prompt would hold up the event loop
        asked = await asyncio.to_thread(dialect.ask, engine, fields)
    except QrunError as error:
        raise from_qrun(error) from None
    reply = dialect.reply(engine, fields, asked, Stamps())
    silence = state.ping_seconds if fields.stream else None
    happenings = answers(engine, asked, client_of(request), silence)
    if not fields.stream:
        await streams.unless_gone(request, _collect(reply, happenings))
        _note_reply(request, reply)
        return json_response(reply.whole())
    first = await anext(happenings)  # a refusal has a status of its own only before the stream begins
    return StreamingResponse(
        _chunks(request, reply, first, happenings),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def answers(
    engine: Engine, asked: Asked, client: str, silence: float | None
) -> AsyncIterator[Happened]:
    """What happens to all answers of a request, with their indices, as it happens.

    With ``silence`` it is also told that nothing has happened for so many seconds: without a sign of life a
    proxy may take the connection for dead while a long prompt is read.

    Raises:
        ApiError: one of them cannot go on; the others are ended.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()

    def listener(index: int) -> Callable[[Any], None]:
        def listen(event: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

        return listen

    calls, left = [], len(asked.prompts)
    quiet = None if silence is None else streams.Silence(silence, lambda: events.put_nowait((0, None)))
    try:
        wanted = zip(asked.prompts, asked.params, asked.constraints)
        for index, (ids, params, constraint) in enumerate(wanted):
            try:
                call = engine.submit(
                    *(ids, params, listener(index)),
                    client=client,
                    constraint=constraint,
                    scoring=asked.scoring,
                )
                calls.append(call)
            except QrunError as error:
                raise from_qrun(error) from None
        while left:
            index, event = await events.get()
            if quiet is not None and event is not None:
                quiet.heard()
            if isinstance(event, QrunError):
                raise from_qrun(event, begun=True)
            left -= isinstance(event, Answer)
            yield index, event
    finally:
        if quiet is not None:
            quiet.close()
        for call in calls:
            engine.cancel(call)


async def _collect(reply: Reply, happenings: AsyncIterator[Happened]) -> None:
    async for index, event in happenings:
        assert event is not None, "nobody waits for signs of life"
        reply.see(index, event)
        if isinstance(event, Piece):
            reply.collect(index, event)


async def _chunks(
    request: Request, reply: Reply, first: Happened, happenings: AsyncIterator[Happened]
) -> AsyncIterator[bytes]:
    try:
        try:
            for chunk in reply.opening():
                yield reply.encode(chunk)
            async for found in _text_chunks(reply, first, happenings):
                yield PING if found is None else reply.encode(found)
            for chunk in reply.closing():
                yield reply.encode(chunk)
        except ApiError as error:
            note(request, error=error.message)
            yield reply.encode(reply.refusal(error))
            return
        yield reply.done
    finally:
        await happenings.aclose()  # type: ignore[attr-defined]
        _note_reply(request, reply)


def _note_reply(request: Request, reply: Reply) -> None:
    """What the request's log line says of its answers; their texts only where the operator wants them."""
    state: ServerState = request.app.state.server
    note(request, **reply.facts(), **(reply.texts() if state.log_text else {}))


async def _text_chunks(
    reply: Reply, first: Happened, happenings: AsyncIterator[Happened]
) -> AsyncIterator[Chunk | None]:
    """Chunks with text; None where nothing has happened for a while."""
    index, event = first
    while True:
        found: list[Chunk | None] = []
        if event is None:
            found.append(None)
        else:
            reply.see(index, event)
        if isinstance(event, Piece):
            found += reply.piece(index, event)
        elif isinstance(event, Scored):
            found += reply.scored(index)
        elif isinstance(event, Answer):
            found += reply.ended(index, event)
        for each in found:
            yield each
        try:
            index, event = await anext(happenings)
        except StopAsyncIteration:
            return
