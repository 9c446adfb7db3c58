"""The page's three files as routes of the service; there is no folder behind them to look around in."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

HERE = Path(__file__).parent
FILES = {
    "/": ("index.html", "text/html"),
    "/static/page.css": ("page.css", "text/css"),
    "/static/page.js": ("page.js", "text/javascript"),
}


def page_routes() -> list[Route]:
    """Return a route for each file of the page, with its content type; browsers ask each time whether it changed."""
    return [Route(path, handing_out(HERE / name, kind)) for path, (name, kind) in FILES.items()]


def handing_out(file: Path, kind: str):
    """Return what answers with a file."""

    async def answer(_: Request) -> Response:
        return FileResponse(file, media_type=kind, headers={"Cache-Control": "no-cache"})

    return answer
