"""The command line: `commands` has the table of commands, and each other module one command or one group."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from receiver import __version__, exit_status
from receiver.cli.commands import GROUPS, SENTENCES, load
from receiver.cli.examples import epilog_of
from receiver.plain_words import in_our_words


class _Group(TyperGroup):
    """A group whose help has the whole first sentence of each command."""

    def sentences(self) -> Mapping[str, str]:
        """Return the first sentence of the help of each command."""
        return {name: command.get_short_help_str(1000) for name, command in self.commands.items()}

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        # click's own method cuts each sentence off after one line.
        with formatter.section("Commands"):
            formatter.write_dl(list(self.sentences().items()))


class _Loaded(Mapping[str, TyperCommand]):
    """Commands whose names are known; each is imported when it is looked up."""

    def __init__(self, names: Iterable[str], load_one: Callable[[str], TyperCommand]) -> None:
        self._names = tuple(names)
        self._load = load_one
        self._loaded: dict[str, TyperCommand] = {}

    def __getitem__(self, name: str) -> TyperCommand:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _LazyGroup(_Group):
    """A group that imports a command when it is looked up, and none to list or to complete their names."""

    def list_commands(self, ctx: Any) -> list[str]:
        # The library's own method would load them all.
        return list(self.commands)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        # Likewise.
        commands = self.commands
        self.commands = {name: TyperCommand(name, help=SENTENCES.get(name)) for name in commands}
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            self.commands = commands


class _Receiver(_LazyGroup):
    """The group of all commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = cast("Any", _Loaded(SENTENCES, _load_command))

    def sentences(self) -> Mapping[str, str]:
        return SENTENCES

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = in_our_words(error.message)
            raise


def _load_command(name: str) -> TyperCommand:
    """Return a command, or a group whose commands are still to be imported."""
    if name in GROUPS:
        group = _LazyGroup(name=name, help=SENTENCES[name], no_args_is_help=True, epilog=epilog_of(name))
        group.rich_markup_mode = None
        group.commands = cast("Any", _Loaded(GROUPS[name], partial(_load_inside, name)))
        return cast("TyperCommand", group)
    # One command alone would be no group, and get no name.
    one = typer.Typer(add_completion=False, rich_markup_mode=None)
    one.command(name)(load(name))
    command = cast("TyperCommand", get_group(one).commands[name])
    command.epilog = epilog_of(name)
    return command


def _load_inside(group: str, name: str) -> TyperCommand:
    found = typer.Typer(add_completion=False, rich_markup_mode=None)
    found.add_typer(load(group), name=group)
    command = cast("TyperCommand", cast("Any", get_group(found).commands[group]).commands[name])
    command.epilog = epilog_of(f"{group} {name}")
    return command


app = typer.Typer(
    name="receiver",
    cls=_Receiver,
    help="Receive the Clipia API's webhooks: verify them, store each event once, save its media, forward it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich would cut off the names of long options at 80 columns.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    url: str | None = typer.Option(
        None,
        metavar="URL",
        help="Work with the receiver at this URL (its internal API), without access to its database. "
        "Default: RECEIVER_URL, or else this machine's database.",
    ),
    token: str | None = typer.Option(
        None,
        metavar="TOKEN",
        help="A token of that receiver, or @FILE; other users of this machine can read an argument. "
        "Default: RECEIVER_TOKEN.",
    ),
    version: bool = typer.Option(  # noqa: ARG001 - its callback acts
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Receive the Clipia API's webhooks: verify them, store each event once, save its media, forward it."""
    from receiver.cli.remote import choose  # noqa: PLC0415 - not for --version

    choose(url, token)


def main() -> None:
    """Run the command line."""
    exit_status.run(app)
