"""Who answers in a chat: an engine here, or an endpoint. Enters: messages; leaves: pieces of text."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from microlm.cli.answers.engine_options import EngineOptions, load_adapters, warm
from microlm.core.errors import UserError
from microlm.core.records import Message, Sampling

if TYPE_CHECKING:
    from microlm.core.client import Client
    from microlm.engine import Engine

Pieces = Generator[tuple[str, str | None], None, None]
"""Text and, on the last piece, why the reply ended. Closing it stops the reply."""


class TooLong(UserError):
    """The conversation does not fit the window; fewer turns may."""


class Talker(Protocol):
    """Replies to a conversation, or continues a raw text."""

    name: str

    def reply(self, prompt: str | Sequence[Message]) -> Pieces:
        """The reply, piece by piece; TooLong comes before the first piece."""

    def close(self) -> None:
        """Let go of what it holds."""


class LocalTalker:
    """An engine in this process."""

    def __init__(self, engine: Engine, sampling: Sampling, adapter: str | None = None) -> None:
        self.engine = engine
        self.sampling = sampling
        self.adapter = adapter
        self.name = str(engine.directory)

    def reply(self, prompt: str | Sequence[Message]) -> Pieces:
        """Stream from the engine; a quarter of the window is kept for the reply."""
        from microlm.engine.prompts import encode_prompt
        from microlm.text.sources.marked import answered

        if not isinstance(prompt, str):  # marks that the model wrote are marks again
            prompt = [answered(m.content) if m.role == "assistant" else m for m in prompt]
        window = self.engine.max_seq_len
        ids = encode_prompt(self.engine.tokenizer, prompt, self.engine.config.vocab_size)
        room = min(self.sampling.max_tokens, max(1, window // 4))
        if len(ids) + room > window:
            raise TooLong(
                f"prompt: {len(ids)} tokens and {room} for the reply do not fit the window of {window}"
            )
        for delta in self.engine.stream(ids, self.sampling, adapter=self.adapter):
            yield delta.text, delta.finish_reason

    def close(self) -> None:
        """Nothing to close."""


class RemoteTalker:
    """An OpenAI-compatible endpoint."""

    def __init__(self, client: Client, sampling: Sampling, model: str) -> None:
        self.client = client
        self.sampling = sampling
        self.model = model or client.default_model()
        self.name = f"{self.model} at {client.url}"

    def reply(self, prompt: str | Sequence[Message]) -> Pieces:
        """Stream from the endpoint; raw text comes in one piece, the client has no stream for it."""
        from microlm.core.client import EndpointError

        try:
            if isinstance(prompt, str):
                whole = self.client.complete(prompt, self.sampling, self.model)
                yield whole.text, whole.finish_reason
            else:
                for delta in self.client.chat_stream(prompt, self.sampling, self.model):
                    yield delta.text, delta.finish_reason
        except EndpointError as e:
            if e.status == 400 and "context_length_exceeded" in str(e.body):
                raise TooLong(str(e)) from None
            raise

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def open_remote(
    url: str, sampling: Sampling, runs: EngineOptions, adapters: Sequence[str], model: str, key: Path | None
) -> Talker:
    """The talker at a URL; how its engine runs was said where it was started."""
    from microlm.core.client import Client
    from microlm.core.endpoint import read_key

    runs.refuse_at_url()
    if adapters:
        raise UserError(
            "--adapter: is loaded by an engine here; at a URL give --model, if it serves the adapter"
        )
    return RemoteTalker(Client(url, read_key(key)), sampling, model)


def open_local(
    place: str, sampling: Sampling, runs: EngineOptions, adapters: Sequence[str], *, base: bool, raw: bool
) -> Talker:
    """The talker at a directory; of a run, `raw` and `base` ask for the pretrained model."""
    arguments = runs.arguments(max_seqs=1)
    from microlm.engine import Engine
    from microlm.engine.resolve import is_model_dir, resolve_model_dir

    folder = resolve_model_dir(place, base=base or (raw and not is_model_dir(place)))
    engine = Engine(folder, **arguments)
    _, adapter = load_adapters(engine, adapters)
    if adapters and adapter is None:
        raise UserError("--adapter: a NAME= is for prompts files; give the directory alone")
    warm(engine)
    return LocalTalker(engine, sampling, adapter)
