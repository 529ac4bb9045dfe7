"""`receiver sandbox`: a local Clipia."""

import inspect
from dataclasses import asdict
from typing import Annotated, Any

import typer
import uvicorn

from receiver.api.protocol import DeadlineHttpToolsProtocol
from receiver.cli.heartbeat import announce
from receiver.cli.listeners import bind
from receiver.cli.options import MAX_PORT
from receiver.cli.remote import local_only
from receiver.cli.terminal import stdout
from receiver.logs import configure_logging
from receiver.sandbox import WITHOUT_LIMITS, SandboxOptions, create_app, switches
from receiver.settings import Settings


@local_only("it runs a Clipia of its own")
def sandbox(context: typer.Context, host: str, port: int, like_clipia: bool, **values: Any) -> None:
    """Run a local Clipia: the documented API, signed webhooks and a small CDN, on one origin.

    It accepts any key such as clipia_test_… or clipia_live_…, and charges nothing. It signs webhooks with the
    first secret of CLIPIA_WEBHOOK_SECRET, or makes one and prints it. The options below make it misbehave;
    PATCH /_sandbox/options changes them while it runs.
    """
    settings = Settings.load()
    configure_logging(level=settings.log_level)
    if not like_clipia:
        values |= {name: value for name, value in WITHOUT_LIMITS.items() if not _is_given(context, name)}
    for listener in bind(host, port):
        listener.close()  # uvicorn binds again; its own error would be a traceback
    given = next((source.secrets for source in settings.all_sources if source.secrets), ())
    app = create_app(SandboxOptions(**values), secret=given[0] if given else None)
    base_url = f"http://{host}:{port}"
    stdout.print(
        f"Clipia sandbox on {base_url}\n  CLIPIA_BASE_URL={base_url}\n  CLIPIA_KEY=clipia_test_sandbox"
    )
    stdout.print(f"  RECEIVER_MEDIA_HOSTS={base_url}")
    if not given:
        stdout.print(f"  CLIPIA_WEBHOOK_SECRET={app.state.secret}", soft_wrap=True)
    announce("sandbox", (host, port), path="/_sandbox/options")
    uvicorn.run(
        app,
        host=host,
        port=port,
        # Java's client offers h2c. uvicorn's own protocol would skip the bodies of its requests.
        http=DeadlineHttpToolsProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )


def _parameters() -> list[inspect.Parameter]:
    """Make an option of every switch of the sandbox."""
    own: dict[str, tuple[Any, Any]] = {
        "context": (typer.Context, inspect.Parameter.empty),
        "host": (Annotated[str, typer.Option(help="Address to listen on.")], "127.0.0.1"),
        "port": (Annotated[int, typer.Option(help="Port to listen on.", min=1, max=MAX_PORT)], 9000),
        "like_clipia": (
            Annotated[bool, typer.Option(help="Keep Clipia's limits, or lift all but those given here.")],
            True,
        ),
    }
    defaults = asdict(SandboxOptions())
    made = {
        name: (Annotated[kind, typer.Option(help=_sentence(switch.help))], defaults[name])
        for name, (kind, switch) in switches().items()
    }
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in (own | made).items()
    ]


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


# typer reads the options from the signature. inspect finds it in this attribute, which the type of functions
# does not declare.
sandbox.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]  # typer reads it
sandbox.__annotations__ = {each.name: each.annotation for each in _parameters()}
