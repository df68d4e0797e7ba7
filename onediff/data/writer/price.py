"""What the writer costs: guessed before, bounded while it runs, counted after.

Guess: a token per 4 characters, 60 tokens of answer. Bound: a token per byte of UTF-8, the whole of max_tokens, because
no byte-level tokenizer makes more. An image of at most one tile of 512 px: 255 tokens (85 + 170 of OpenAI's tile rule),
8,500 with gpt-4o-mini (2,833 + 5,667); the bound takes the larger for every model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from onediff.config import Runtime
from onediff.data.writer.request import SCHEMAS, Request

ANSWER_TOKENS = 60
MESSAGE_TOKENS = 16  # what roles and the chat format add
IMAGE_TOKENS, DEAR_IMAGE_TOKENS = 255, 8500


@dataclass(frozen=True)
class Tokens:
    input: int
    output: int

    def usd(self, runtime: Runtime) -> float:
        """Raises ValueError where a price is unknown: nothing may be asked then."""
        prices = {"input": runtime.writer_usd_per_million_input, "output": runtime.writer_usd_per_million_output}
        for name, price in prices.items():
            if price is None:
                raise ValueError(f"runtime.yaml: writer_usd_per_million_{name} is not set: give what a million {name} "
                                 "tokens cost, 0 for an endpoint of your own")
        return (self.input * (prices["input"] or 0) + self.output * (prices["output"] or 0)) / 1e6


def guess(request: Request) -> Tokens:
    image = DEAR_IMAGE_TOKENS if request.writer.model.startswith("gpt-4o-mini") else IMAGE_TOKENS
    text = -(-sum(map(len, _texts(request))) // 4)
    return Tokens(MESSAGE_TOKENS + text + image * len(request.images), min(ANSWER_TOKENS, request.writer.max_tokens))


def bound(request: Request) -> Tokens:
    """More than this a request never takes."""
    text = sum(len(text.encode("utf-8", "surrogatepass")) for text in _texts(request))
    return Tokens(MESSAGE_TOKENS + text + DEAR_IMAGE_TOKENS * len(request.images), request.writer.max_tokens)


def _texts(request: Request) -> tuple[str, str, str]:
    return request.system, request.user, json.dumps(SCHEMAS[request.form])


@dataclass
class Budget:
    """Dollars: `spent` are gone, `reserved` could be taken by what is in flight; both together stay below `cap`."""

    cap: float
    spent: float
    reserved: float = field(default=0.0, init=False)

    def reserve(self, usd: float) -> bool:
        """Whether a request that costs at most `usd` may go out."""
        if self.spent + self.reserved + usd > self.cap:
            return False
        self.reserved += usd
        return True

    def settle(self, *, reserved: float, spent: float) -> None:
        self.reserved = max(0.0, self.reserved - reserved)
        self.spent += spent
