"""The smallest server around OpenVINO GenAI's continuous batching: completions of token ids, streamed.

It does less than any real server: no text is decoded, so that only the engine's own speed counts. A chunk's
text is "x" for each token.

    python openvino_server.py FOLDER --port 8082 --slots 8 --threads 2
"""

from __future__ import annotations

import argparse
import asyncio
import json
from itertools import count
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import openvino
import openvino_genai


class Worker(Thread):
    """Steps the pipeline, and hands each request the number of its new tokens."""

    def __init__(self, folder: str, slots: int, threads: int) -> None:
        super().__init__(daemon=True)
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = 2  # GB
        scheduling.max_num_seqs = slots
        scheduling.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduling, "CPU", properties)
        self._asked: SimpleQueue[tuple[Any, list[int], int]] = SimpleQueue()
        self._numbers = count()

    def submit(self, listener: Any, ids: list[int], tokens: int) -> None:
        """``listener`` is called from this thread: with a number of new tokens, and if they are the last."""
        self._asked.put((listener, ids, tokens))

    def run(self) -> None:
        handles: dict[Any, Any] = {}
        while True:
            while not self._asked.empty() or not handles:
                listener, ids, tokens = self._asked.get()
                config = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
                config.do_sample = False
                given = openvino.Tensor(np.array([ids], dtype=np.int64))
                handles[self._pipeline.add_request(next(self._numbers), given, config)] = listener
            self._pipeline.step()
            for handle, listener in list(handles.items()):
                while handle in handles and handle.can_read():
                    (output,) = handle.read().values()
                    over = output.finish_reason != openvino_genai.GenerationFinishReason.NONE
                    listener(len(output.generated_ids), over)
                    if over:
                        del handles[handle]


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


async def answer(worker: Worker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request on one connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    if head.startswith("get"):
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()
        return
    length = int(head.split("content-length:")[1].split("\r\n")[0])
    asked = json.loads(await reader.readexactly(length))
    loop, news = asyncio.get_running_loop(), asyncio.Queue[tuple[int, bool]]()
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n\r\n")
    worker.submit(
        lambda new, over: loop.call_soon_threadsafe(news.put_nowait, (new, over)),
        asked["prompt"],
        asked["max_tokens"],
    )
    sent, over = 0, False
    while not over:
        new, over = await news.get()
        writer.write(event({"choices": [{"index": 0, "text": "x" * new}]}))
        sent += new
        await writer.drain()
    usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": sent}
    writer.write(event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
    await writer.drain()
    writer.close()


async def serve(arguments: argparse.Namespace) -> None:
    worker = Worker(arguments.folder, arguments.slots, arguments.threads)
    worker.start()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(worker, reader, writer)

    server = await asyncio.start_server(connected, "127.0.0.1", arguments.port, limit=1 << 22)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8082)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    asyncio.run(serve(parser.parse_args()))
