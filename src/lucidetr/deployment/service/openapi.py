"""The routes of the service, described by hand: as OpenAPI for programs, as a plain page for people."""

from html import escape
from importlib.metadata import version
from typing import Any


def number(name: str, says: str, high: float = 1) -> dict[str, Any]:
    """Return the description of a number in the query."""
    return {
        "name": name,
        "in": "query",
        "description": says,
        "schema": {"type": "number", "minimum": 0, "maximum": high},
    }


THRESHOLD = number("threshold", "least score of a detection")
DRAWN = {"name": "drawn", "in": "query", "description": "1: a PNG with the boxes", "schema": {"enum": [0, 1]}}
POINT = [number("x", "from the left, as a share of the width"), number("y", "from the top, as a share of the height")]
PICTURE = {
    "required": True,
    "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}
        },
    },
}
# method, path, what it answers, query, whether it takes a picture
ROUTES: tuple[tuple[str, str, str, list[dict[str, Any]], bool], ...] = (
    ("post", "/predict", "what is in a picture: boxes in its pixels, scores, names", [THRESHOLD, DRAWN], True),
    ("post", "/look", "how the best queries found what they found, layer by layer", [], True),
    ("post", "/look/point", "what the encoder relates a point of the picture to", POINT, True),
    ("get", "/usual", "where each query usually looks, over the sample pictures", [], False),
    ("get", "/model", "the model's name, recipe, categories, settings and AP", [], False),
    ("get", "/samples", "names and addresses of sample pictures", [], False),
    ("get", "/samples/{number}", "a sample picture", [], False),
    ("get", "/health", "200: the service is up", [], False),
    ("get", "/ready", "200: the model is loaded; else 503", [], False),
    ("get", "/metrics", "counters in Prometheus' text format", [], False),
    ("get", "/openapi.json", "these routes, for programs", [], False),
    ("get", "/docs", "these routes, for people", [], False),
)
ERROR = {"description": 'a plain sentence: {"error": "…"}', "content": {"application/json": {}}}
REFUSALS = ("400", "408", "409", "413", "415", "421", "503")


def openapi() -> dict[str, Any]:
    """Return the description of the service (OpenAPI 3.1)."""
    paths: dict[str, Any] = {}
    for method, path, says, query, takes_picture in ROUTES:
        parameters = list(query)
        if "{number}" in path:
            parameters.append({"name": "number", "in": "path", "required": True, "schema": {"type": "integer"}})
        operation: dict[str, Any] = {
            "summary": says,
            "parameters": parameters,
            "responses": {"200": {"description": says}},
        }
        if takes_picture:
            operation["requestBody"] = PICTURE
            operation["responses"] |= dict.fromkeys(REFUSALS, ERROR)
        paths.setdefault(path, {})[method] = operation
    return {"openapi": "3.1.0", "info": {"title": "lucidetr", "version": version("lucidetr")}, "paths": paths}


def docs() -> str:
    """Return a page that lists the routes."""
    rows = ""
    for method, path, says, query, takes_picture in ROUTES:
        names = ", ".join(each["name"] for each in query)
        cells = (f"{method.upper()} {path}", says, names, "a picture" if takes_picture else "")
        rows += f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>lucidetr: routes</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<link rel="stylesheet" href="static/page.css"></head><body>
<header><h1>Routes</h1></header>
<table class="routes"><tr><th>route</th><th>answers</th><th>query</th><th>body</th></tr>
{rows}</table>
<p>A picture is a body of its own (Content-Type image/*) or the one file field <code>image</code> of a form. Errors are
<code>{{"error": "…"}}</code>. The same for programs: <a href="/openapi.json">/openapi.json</a>.</p>
</body></html>
"""
