"""Settings in a TOML or JSON file. Reading one runs nothing of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from svag_fast.experiments.ranges import ConfigError
from svag_fast.files import read_text

SETTINGS_BYTES = 1 << 20


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of a TOML or (by its suffix) JSON file, for `ExperimentConfig.from_dict`.

    Raises:
        ConfigError: the file can't be read, or isn't TOML or JSON of keys and values.
    """
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = read_text(path, SETTINGS_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        values = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{path} is not {kind} of settings: it is nested too deeply") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not {kind}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(values).__name__}")
    return values
