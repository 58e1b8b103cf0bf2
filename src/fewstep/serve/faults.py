"""What is wrong with a request, in one line: the field, what would do, and what arrived."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.errors import UnknownNameError
from fewstep.serve.messages import PlanAsk, SamplesAsk, StreamAsk
from fewstep.serve.served import short_line

__all__ = ["fault"]

ASKS: dict[str, type[PlanAsk]] = {"/samples": SamplesAsk, "/samples/stream": StreamAsk, "/plan": PlanAsk}
"""What each route reads."""
SHOWN = 60
"""Characters of a value that are told."""
PREFIX = "Input should be "


def fault(errors: Sequence[Mapping[str, Any]], route: str, content_type: str | None) -> str:
    """The line.

    Args:
        errors: of pydantic, at least one.
        route: path of the route.
        content_type: of the request; None if it says none.

    Example:
        >>> fault([{"type": "extra_forbidden", "loc": ("body", "previews"), "msg": "", "input": 2}], "/samples", "application/json")
        'previews is read by POST /samples/stream alone.'
        >>> fault([{"type": "greater_than_equal", "loc": ("body", "nfe"), "msg": "at least 1", "input": 0}], "/samples", "application/json")
        'nfe: at least 1, got 0.'
    """
    first = errors[0]
    place = first["loc"][0]
    if place == "body" and len(first["loc"]) == 1 and not _is_json(content_type):
        said = "no content type" if content_type is None else f"content type {_shown(content_type)}"
        return f"the request has {said}: send JSON with the header content-type: application/json."
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", first["msg"])
        return f"the body is no JSON: {why} at character {first['loc'][-1]}."
    if len(first["loc"]) == 1:
        wanted = "the body is empty" if first["type"] == "missing" else f"the body is {_shown(first['input'])}"
        return f'{wanted}: send a JSON object such as {{"nfe": 8}}.'
    if first["type"] == "extra_forbidden":
        return _unknown(str(first["loc"][1]), route)
    return _wrong(errors)


def _is_json(content_type: str | None) -> bool:
    kind = (content_type or "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _unknown(name: str, route: str) -> str:
    """A field that the route does not read: another does, or it is misspelt."""
    where = [path for path, ask in ASKS.items() if path != route and name in ask.model_fields]
    if where:
        return f"{name} is read by POST {where[0]} alone."
    return str(UnknownNameError("field", short_line(name, SHOWN), ASKS[route].model_fields))


def _wrong(errors: Sequence[Mapping[str, Any]]) -> str:
    """A field whose value cannot be. Of the forms that a field may have, those that the value comes closest to are told."""

    def entries(error: Mapping[str, Any]) -> list[Any]:
        return [part for part in error["loc"][2:] if isinstance(part, int)]

    field = errors[0]["loc"][1]
    own = [error for error in errors if error["loc"][1:2] == (field,)]
    nearest = max(own, key=lambda error: len(entries(error)))
    place = ".".join(str(part) for part in (field, *entries(nearest)))
    wanted = dict.fromkeys(str(error["msg"]) for error in own if entries(error) == entries(nearest))
    told = ", or ".join(msg if i == 0 else msg.removeprefix(PREFIX) for i, msg in enumerate(wanted))
    return f"{short_line(place, SHOWN)}: {told}, got {_shown(nearest['input'])}."


def _shown(value: object) -> str:
    """A value as JSON, shortened."""
    try:
        return short_line(json.dumps(value), SHOWN)
    except (TypeError, ValueError, RecursionError):
        return f"something of type {type(value).__name__}"
