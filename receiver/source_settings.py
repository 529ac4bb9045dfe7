"""The typed `[[sources]]` tables of `receiver.toml`."""

from typing import Literal

from pydantic import SecretStr, field_validator

from receiver.config_file import require_well_formed
from receiver.destination_settings import Name, Table


class SourceSettings(Table):
    """One Clipia account or environment with its own webhook secrets."""

    name: Name
    """Its webhooks go to `/clipia/webhook/<name>`; those of `clipia` to `/clipia/webhook`, too."""
    secret: SecretStr
    """One secret, or several separated by commas during a rotation."""
    retired_secret: SecretStr | None = None
    """Earlier secrets, separated by commas: they are not accepted, and a diagnosis recognizes them."""
    environment: Literal["live", "test"] | None = None
    """Sandbox and live events must not mix: a `CLIPIA_KEY` of the other kind is an error."""

    @field_validator("secret", "retired_secret")
    @classmethod
    def _well_formed(cls, value: SecretStr | None) -> SecretStr | None:
        require_well_formed(value.get_secret_value() if value else "")
        return value

    @property
    def secrets(self) -> tuple[str, ...]:
        """The secrets in the order of the setting."""
        return _split_secrets(self.secret)

    @property
    def retired_secrets(self) -> tuple[str, ...]:
        """The earlier secrets."""
        return _split_secrets(self.retired_secret)


def _split_secrets(value: SecretStr | None) -> tuple[str, ...]:
    text = value.get_secret_value() if value else ""
    return tuple(part.strip() for part in text.split(",") if part.strip())
