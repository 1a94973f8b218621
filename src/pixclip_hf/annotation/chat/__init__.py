"""The one interface to language models: questions with text and images in, checked answers out.

[`Chat`] is what a stage asks. [`open_chat`] makes one from a name: a model of transformers on this machine, or a
server with OpenAI's chat completions API.
"""

from .backends import BACKEND_HELP, ChatArguments, model_name, open_chat
from .endpoint import ChatEndpoint
from .local import LocalChat
from .questions import Answer, Chat, Question, Reply, ask_until_usable, read_reply
from .stage import ChatStage

__all__ = [
    "BACKEND_HELP",
    "Answer",
    "Chat",
    "ChatArguments",
    "ChatEndpoint",
    "ChatStage",
    "LocalChat",
    "Question",
    "Reply",
    "ask_until_usable",
    "model_name",
    "open_chat",
    "read_reply",
]
