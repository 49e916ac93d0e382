"""What `stream` and `serve` do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualcodec_ext._cli.codec import Codec, configure_torch, load_config, open_model
from dualcodec_ext._cli.options import DEFAULT_MODEL, ModelOptions
from dualcodec_ext._cli.report import Report, one_line
from dualcodec_ext.codes import UNTRAINED

if TYPE_CHECKING:
    from dualcodec_ext.serving import Server, ServeOptions


def run_serve(options: ModelOptions, limits: ServeOptions) -> int:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        options: which model, and how it runs.
        limits: where the server listens, and what it allows.
    Returns:
        The exit code.
    Raises:
        DualCodecError: the model can't be opened or can't stream, or the address can't be had.
        MissingExtraError: aiohttp or prometheus_client is missing.
    """
    from dualcodec_ext.errors import need_extra
    from dualcodec_ext.serving import serve

    for package in ("aiohttp", "prometheus_client"):  # before the model, which takes longer to load
        need_extra(package, "serve", "serve")
    codec = _opened(options, Report("serve", as_json=False))

    def started(server: Server) -> None:
        refused = [f"{task} is not served: {why}" for task, why in server.info.unsupported.items()]
        for text in dict.fromkeys(refused):
            print(one_line(text), flush=True)
        print(one_line(f"{codec.name} at {server.url} (Ctrl-C ends)"), flush=True)

    serve(codec.model, codec.name, limits, started)
    return 0


def _opened(options: ModelOptions, report: Report) -> Codec:
    configure_torch(options)
    codec = open_model(*load_config(options.model or DEFAULT_MODEL), options, options.seed or 0)
    if codec.untrained:
        report.note(f"{UNTRAINED} (the weights are random numbers; --weights gives real ones)")
    return codec
