"""lucidetr serve: a model as a small web service, with a page to watch it think."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lucidetr.errors import imported
from lucidetr.fields import check_ranges

PACKAGES = ("starlette", "uvicorn", "h11", "prometheus_client")


@dataclass(frozen=True)
class Options:
    """Serve a model by HTTP: a page for people, /predict for programs, /docs for both."""

    run: Annotated[str, tyro.conf.Positional]
    """A run's folder, a model file, or an exported model."""
    host: str = "127.0.0.1"
    """Where to listen; 0.0.0.0 lets other machines in, whoever uses them."""
    port: int = 8000
    threshold: float = 0.5
    """Least score of a detection, where a request names none."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"
    max_megabytes: float = 20.0
    """Largest body of a request."""
    max_megapixels: float = 50.0
    """Largest picture; Pillow decodes none above 178."""
    queue: int = 16
    """So many pictures wait at most; further ones are refused at once."""
    batch: int = 8
    """So many pictures of one size are looked at together at most."""
    data: str = ""
    """Where the page's sample pictures come from; left out: the run's own validation pictures."""


def run(arguments: list[str]) -> None:
    """Serve until Ctrl-C."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr serve")
    ranges = {"port": (0, 65535), "threshold": (0, 1)}
    ranges |= {"queue": (1, 10_000), "batch": (1, 1000), "max_megabytes": (0.001, 2000), "max_megapixels": (0.001, 178)}
    check_ranges(options, "--", ranges)
    for package in PACKAGES:
        imported(package, "'lucidetr[serve]'")

    from lucidetr.deployment.service.app import serve
    from lucidetr.deployment.service.messages import Settings

    settings = {name: value for name, value in vars(options).items() if name not in ("host", "port")}
    serve(Settings(**settings), options.host, options.port)
