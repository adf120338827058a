"""The APIs that are spoken here, without HTTP: what a request holds and asks, and how its answers look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from qrun.engine import Engine
from qrun.serve.asking import Asked, ask_chat, ask_completion
from qrun.serve.fields import ChatRequest, CompletionRequest
from qrun.serve.message_reply import MessageReply
from qrun.serve.messages import MessagesRequest, ask_messages
from qrun.serve.replies import CompletionReply
from qrun.serve.reply import Reply
from qrun.serve.response_reply import ResponseReply
from qrun.serve.responses import ResponsesRequest, ask_responses
from qrun.serve.stamps import Stamps


@dataclass(frozen=True)
class Dialect:
    """What tells one API from another: its fields, what they ask, and how answers look."""

    fields: type[msgspec.Struct]
    ask: Callable[[Engine, Any], Asked]
    reply: Callable[[Engine, Any, Asked, Stamps], Reply]


CHAT = Dialect(ChatRequest, ask_chat, CompletionReply)
COMPLETION = Dialect(CompletionRequest, ask_completion, CompletionReply)
RESPONSES = Dialect(ResponsesRequest, ask_responses, ResponseReply)
MESSAGES = Dialect(MessagesRequest, ask_messages, MessageReply)
