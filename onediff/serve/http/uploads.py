"""Read the body of a request within the server's limits, and take the pairs of images out of it."""

import asyncio
import codecs
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fastapi import Request
from pydantic import TypeAdapter, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from onediff.config import Serve
from onediff.serve.http.errors import ApiError, wrong_value
from onediff.serve.http.limits import Intake, Share
from onediff.serve.http.pictures import image_bytes
from onediff.serve.http.schemas import PairRequest

_FIELDS = {"before", "after", "instruction", "heat_map"}
_MOST_VALUES = 20_000  # values in a JSON body
_EXTENDED_NAME = re.compile(rb";\s*filename\*", re.IGNORECASE)
_LIST = TypeAdapter(list[PairRequest])
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Question:
    """A pair of image files from a client, the instruction or None, and whether a heat map is wanted.

    `place` is the position of the pair in the body of the request, for error messages.
    """

    before: bytes
    after: bytes
    instruction: str | None = None
    heat_map: bool = False
    place: str = ""


class Body:
    """The body of a request, which is read once, in pieces, within the limits of the server."""

    def __init__(self, request: Request, limits: Serve, intake: Intake, share: Share) -> None:
        self._request, self._limits, self._intake, self._share = request, limits, intake, share
        self.headers = request.headers

    async def read(self) -> bytes:
        """Return the body without the byte order mark that some Windows programs write at its start.

        Raises the errors of the method `pieces`.
        """
        return b"".join([piece async for piece in self.pieces()]).removeprefix(codecs.BOM_UTF8)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the body in pieces.

        Raises ApiError for a body that is compressed (415), that is too large (413), that arrives too slowly (408), or
        for which the server has no memory (429), before the limit is exceeded.
        """
        limits = self._limits
        if (encoding := self.headers.get("content-encoding", "identity")).lower() != "identity":
            raise ApiError(415, f"the body must not be compressed, got the content encoding '{encoding[:80]}'",
                           code="unsupported_content_encoding", headers={"connection": "close"})
        most, announced = int(limits.body_mb * 1e6), self.headers.get("content-length", "0")
        too_large = ApiError(413, f"the body may have at most {limits.body_mb:g} MB; send smaller images or fewer "
                             "pairs", code="body_too_large", headers={"connection": "close"})
        if announced.isdecimal() and int(announced) > most:
            raise too_large
        deadline, pieces = asyncio.get_running_loop().time() + limits.timeout_s, self._request.stream()
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    piece = await anext(pieces, None)
            except TimeoutError:
                raise ApiError(408, f"the body must arrive within {limits.timeout_s:g} s; send it again",
                               code="body_too_slow", headers={"connection": "close"}) from None
            if piece is None:
                return
            if self._share.num_bytes + len(piece) > most:
                raise too_large
            self._intake.add_bytes(self._share, len(piece))
            yield piece


def json_questions(body: bytes, limits: Serve) -> tuple[list[Question], bool]:
    """Return the pairs in a JSON body, and whether the body is a list. Raises ApiError for an invalid body."""
    check_values(body)
    is_list = body.lstrip()[:1] == b"["
    try:
        pairs = _LIST.validate_json(body) if is_list else [PairRequest.model_validate_json(body)]
    except ValidationError as error:
        raise wrong_value(error) from None
    check_number(len(pairs), limits)
    questions = []
    for number, pair in enumerate(pairs):
        place = f"{number}." if is_list else ""
        questions.append(Question(image_bytes(pair.before, f"{place}before"), image_bytes(pair.after, f"{place}after"),
                                  pair.instruction, pair.heat_map, place))
    return questions, is_list


def check_values(body: bytes) -> None:
    """Raise ApiError if a JSON body has very many values, before it is parsed.

    A value of two bytes, such as `{}`, would need hundreds of bytes of memory. Texts with many commas count, too.
    """
    if (number := sum(body.count(sign) for sign in (b"{", b"[", b","))) > _MOST_VALUES:
        raise ApiError(413, f"the body may have at most {_MOST_VALUES} JSON values, got about {number}; send several "
                       "requests", code="too_many_values")


def check_number(pairs: int, limits: Serve) -> None:
    """Raise ApiError if a request has no pair or too many pairs."""
    if not pairs:
        raise ApiError(422, "the list must have at least one pair, got none", code="no_pairs")
    if pairs > limits.pairs:
        raise ApiError(413, f"a request may have at most {limits.pairs} pairs, got {pairs}; send several requests",
                       code="too_many_pairs")


class _Parser(MultiPartParser):
    """Starlette's parser of multipart bodies, for which a part that has only a `filename*` is also a file.

    Some clients, such as old versions of the package requests, send `filename*` for a file name that is not ASCII,
    although RFC 7578 forbids it. For Starlette, such a part is text. The file name is not used.
    """

    def on_headers_finished(self) -> None:
        """Add an empty `filename` to the header of such a part."""
        disposition = self._current_part.content_disposition or b""
        if _EXTENDED_NAME.search(disposition) and b"filename" not in parse_options_header(disposition)[1]:
            self._current_part.content_disposition = disposition + b'; filename=""'
        super().on_headers_finished()


async def form_question(body: Body, limits: Serve) -> Question:
    """Return the pair in a multipart body with the files `before` and `after`. Raises ApiError for an invalid body."""
    parser = _Parser(body.headers, body.pieces(), max_files=4, max_fields=2, max_part_size=8192)
    parser.spool_max_size = int(limits.body_mb * 1e6)  # Nothing is written to the disk.
    try:
        form = await parser.parse()
    except MultiPartException as error:
        reason = error.message.rstrip(".")
        raise ApiError(422, f"the multipart body is not valid ({reason}); let your HTTP library make the body and its "
                       "content type", code="invalid_form") from None
    try:
        return await _question(form)
    finally:
        await form.close()


async def _question(form: FormData) -> Question:
    for name in form:
        if name not in _FIELDS:
            raise ApiError(422, f"{name[:80]}: unknown field; the fields are before, after, instruction and heat_map",
                           code="invalid_value", param=name[:80])
        if len(form.getlist(name)) > 1:
            raise ApiError(422, f"{name}: must be sent once, got {len(form.getlist(name))} values",
                           code="invalid_value", param=name)
    files = []
    for side in ("before", "after"):
        file = form.get(side)
        if not isinstance(file, UploadFile):
            raise ApiError(422, f"{side}: must be an image file, but is {'text' if file else 'missing'}",
                           code="invalid_value", param=side)
        files.append(await file.read())
    instruction, wanted = form.get("instruction", ""), form.get("heat_map", "false")
    if not isinstance(instruction, str):
        raise ApiError(422, "instruction: must be text, but is a file", code="invalid_value", param="instruction")
    if not isinstance(wanted, str) or wanted not in _TRUTH:
        raise ApiError(422, "heat_map: must be true or false", code="invalid_value", param="heat_map")
    return Question(files[0], files[1], instruction or None, _TRUTH[wanted])
