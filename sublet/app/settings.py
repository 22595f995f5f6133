"""Settings: one frozen table, read once. Command line over `SUBLET_…` over `sublet.toml`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from sublet.base.kernel.errors import Invalid

DEFAULT_DATA = Path(".sublet")
WEIGHTS = ".weights"


class SettingsInvalid(Invalid):
    """A setting is wrong: the message names it and what would be right."""

    code = "settings_invalid"


class Settings(BaseSettings):
    """Every setting of a cloud on one machine, with its default and its meaning."""

    model_config = SettingsConfigDict(env_prefix="SUBLET_", frozen=True, extra="forbid")

    data: Path = Field(DEFAULT_DATA, description="Folder of the database, logs and workloads.")
    host: str = Field("127.0.0.1", description="Address that the API and SSH listen on.")
    port: int = Field(8700, ge=0, le=65535, description="Port of the API; 0 picks a free one.")
    gateway_port: int = Field(
        8701, ge=0, le=65535, description="Port of the model gateway; 0 picks a free one."
    )
    gateways: int = Field(
        1, ge=1, le=64, description="Gateway processes, side by side on the gateway's port."
    )
    body_limit: int = Field(
        16 << 20,
        ge=1024,
        le=1 << 30,
        description="Bytes of a request to the gateway: beyond it is refused with 413.",
    )
    gateway_stale_seconds: int = Field(
        60,
        ge=4,
        le=3600,
        description="A gateway that has heard nothing new from the control plane for so long refuses "
        "calls.",
    )
    weights: Path | None = Field(
        None,
        description="Folder of the weights that `make setup` fetched; default: `.weights` beside the "
        "installation's virtual environment, else in the working directory.",
    )
    key_file: Path | None = Field(
        None,
        description="File of the key that seals models, outside of the data folder; default: one "
        "named for the installation in the user's configuration folder.",
    )
    ssh_port: int = Field(2222, ge=0, le=65535, description="Port of SSH; 0 picks a free one.")
    api_workers: int = Field(1, ge=1, le=64, description="Processes that answer the API.")
    trusted_tenants: bool = Field(
        False, description="Serve although a fence is missing: only for tenants you trust."
    )
    site_name: str = Field("home", min_length=1, max_length=60, description="Name of the site.")
    currency: str = Field("USD", pattern="^USD$", description="Currency of all books: USD.")
    trial_credit: str | None = Field(
        None,
        description="Credit granted at sign-up, such as 5.00; default: two on-demand hours of "
        "the dearest one-device offer on the rate card; 0 grants none.",
    )
    trials_per_day: int = Field(
        20,
        ge=0,
        description="So many sign-ups in 24 hours get trial credit; those after them get none, and "
        "start nothing until credit is added.",
    )
    disk_reserve_mb: int = Field(
        1024, ge=16, description="Free space kept for Sublet itself: below it nothing starts."
    )
    database_url: str | None = Field(
        None, description="A database other than the SQLite file in the data folder."
    )
    log_level: str = Field(
        "info", pattern="^(debug|info|warning|error)$", description="What the log file holds."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        toml = TomlConfigSettingsSource(settings_cls, Path("sublet.toml"))
        return init_settings, env_settings, toml

    @property
    def weights_folder(self) -> Path:
        """Where weights are looked for; it need not exist."""
        if self.weights is not None:
            return self.weights.expanduser().absolute()
        beside = Path(sys.prefix).parent / WEIGHTS
        return beside if beside.is_dir() else Path(WEIGHTS).absolute()

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.data.resolve() / 'sublet.db'}"


# The environment also names the cloud to talk to; that is the client's, not a setting of `up`.
_CLIENT_VARIABLES = {"SUBLET_URL", "SUBLET_KEY"}


def read_settings(given: Mapping[str, Any]) -> Settings:
    """The settings in force. `given` is the command line: None means not given.

    Raises SettingsInvalid naming the setting and what would be right.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        known = ", ".join(sorted(Settings.model_fields))
        hint = f" Settings are: {known}." if first["type"] == "extra_forbidden" else ""
        raise SettingsInvalid(f"setting {name}: {first['msg']}.{hint}", param=name) from None
    except (OSError, ValueError) as error:
        raise SettingsInvalid(f"sublet.toml cannot be read: {error}", param="sublet.toml") from None
