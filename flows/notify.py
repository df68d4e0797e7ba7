"""Being told: what happened, why, and what to type next, as artifacts in Prefect and by the blocks of runtime.yaml."""

from __future__ import annotations

import re
from typing import Any, Literal

import prefect.blocks.notifications  # noqa: F401 - its kinds of blocks are known once it is imported
from prefect.artifacts import create_markdown_artifact
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block

from onediff.config import load_runtime

Event = Literal["failure", "refusal", "promotion", "rollback", "drift", "data"]
HIDDEN = re.compile(r"(?<=//)[^/@\s]+(?=@)")  # user and password of an address


def tell(event: Event, what: str, *, why: str, then: str, table: str = "") -> None:
    """`what` happened, `why`, and `then`, the command to type next; `table`: more, as Markdown.

    A block that cannot be reached or does not exist is said, and fails nothing: what happened has happened.
    """
    what, why = without_secrets(what), without_secrets(why)
    text = f"**{what}**\n\n{why}\n\nNext: `{then}`\n" + (f"\n{without_secrets(table)}\n" if table else "")
    create_markdown_artifact(text, key=event, description=what)
    for slug in load_runtime().notify:
        problem = _send(slug, subject=f"OneDiff: {what}", body=f"{what}\n{why}\nNext: {then}\n")
        if problem:
            print(f"runtime.yaml: notify: {slug} was not told: {problem}")


def without_secrets(text: str) -> str:
    """Addresses without user and password."""
    return HIDDEN.sub("***", text)


def _send(slug: str, *, subject: str, body: str) -> str | None:
    """Why the block could not be told, or None."""
    try:
        block = Block.load(slug)
        if not isinstance(block, NotificationBlock):
            return f"is no block that can notify, but {type(block).__name__}"
        notify: Any = block.notify  # outside of an event loop it is no coroutine
        notify(body=body, subject=subject)
    except ValueError as error:  # no such block
        return without_secrets(" ".join(str(error).split()))
    except Exception as error:  # noqa: BLE001 - whatever a service of others raises; what it says may hold its address
        return type(error).__name__
    return None
