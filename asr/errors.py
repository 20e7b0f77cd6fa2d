"""Errors whose message is written for the person who reads it."""

from dataclasses import dataclass


class AsrError(Exception):
    """Something the user can mend; the message says what was wrong, where, and what to do."""


class AudioError(AsrError):
    """Audio that cannot be read."""


class ManifestError(AsrError):
    """A manifest or one of its rows is wrong."""


class TextError(AsrError):
    """Text that cannot be spelled or normalised."""


class ConfigError(AsrError):
    """A configuration with an unknown key or an impossible value."""


class ModelError(AsrError):
    """A model folder that is missing, incomplete or of another version."""


class Overloaded(AsrError):
    """More streams, or more audio of one stream, than was agreed to hold; try again later, or elsewhere."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One row or file that was skipped: `where` it was ("file:line" or a path) and the `reason`."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"
