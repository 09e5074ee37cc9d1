"""ids → next ids: slotted KV cache, continuous batching, sampling, constrained decoding. Leaves: `Engine`."""

from microlm.engine.engine import Engine
from microlm.engine.request import Delta, Request
from microlm.engine.service import Busy, EngineService, Stopped

__all__ = ["Busy", "Delta", "Engine", "EngineService", "Request", "Stopped"]
