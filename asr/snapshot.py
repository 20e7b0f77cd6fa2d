"""Objects' state as bytes and back, without pickle: an .npz file of their arrays, the rest as JSON in it.

What is kept of an object are its attributes: numbers, strings, arrays, containers, and objects in their turn, but for
what its class names in `shared`. An object that is made anew, with the same arguments, takes them back, and says by
`check_restored`, if it has that, whether they can be its own: data makes no objects but those that the caller offers.
"""

import contextlib
import dataclasses
import io
import json
import zipfile
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from asr.errors import AsrError, ModelError

_VERSION = 1
_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "deque": deque,
    "array": partial(array, "d"),
}


class Snapshot:
    """What `Snapshot.write` wrote.

    Attributes:
        about: plain data, told by the writer.
    """

    def __init__(self, about: dict[str, Any], state: Any, arrays: Mapping[str, np.ndarray]) -> None:
        self.about, self._state, self._arrays = about, state, arrays

    @staticmethod
    def write(target: object, about: dict[str, Any]) -> bytes:
        """The state of an object, and what is to be known before it is restored."""
        arrays: list[np.ndarray] = []
        text = json.dumps({"version": _VERSION, "about": about, "state": _plain(target, arrays)})
        file = io.BytesIO()
        np.savez(file, np.frombuffer(text.encode(), np.uint8), *arrays)
        return file.getvalue()

    @classmethod
    def read(cls, data: bytes) -> "Snapshot":
        """Read what `write` wrote.

        Raises:
            ModelError: the data is damaged, or of another version.
        """
        with cls.reading(), np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            whole = json.loads(arrays["arr_0"].tobytes())
            if whole["version"] != _VERSION:
                raise ModelError(f"a saved state of version {whole['version']}; this program reads {_VERSION}")
            return cls(whole["about"], whole["state"], arrays)

    def restore(self, target: object, makers: Mapping[str, Callable[..., Any]]) -> None:
        """Put the state into an object of the same class.

        Args:
            target: made with the same arguments as the one that was saved.
            makers: for objects in containers: their classes, or what makes them, by class name.

        Raises:
            ModelError: the data is damaged, or from a program whose objects are others.
        """
        with self.reading():
            self._fill(target, self._state["attributes"], makers)

    @staticmethod
    @contextlib.contextmanager
    def reading() -> Iterator[None]:
        """Whatever fails inside is the data's fault."""
        try:
            yield
        except AsrError:
            raise
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RuntimeError,
            OSError,
            EOFError,
            zipfile.BadZipFile,
        ) as error:
            raise ModelError(f"a saved state is damaged, or of another version ({error})") from error

    def _fill(self, target: object, attributes: dict[str, Any], makers: Mapping[str, Callable[..., Any]]) -> None:
        kept = vars(target).keys() - set(getattr(target, "shared", ()))
        if kept != attributes.keys():
            names = ", ".join(sorted(kept ^ attributes.keys()))
            raise ModelError(f"a saved {type(target).__name__} is of another version (it differs in {names})")
        for name, value in attributes.items():
            setattr(target, name, self._value(value, getattr(target, name), makers))
        if hasattr(target, "check_restored"):
            target.check_restored()  # type: ignore[attr-defined]

    def _value(self, node: Any, current: Any, makers: Mapping[str, Callable[..., Any]]) -> Any:
        if not isinstance(node, dict):
            return node
        if "array" in node:
            array = self._arrays[f"arr_{node['array']}"]
            return array[()] if node.get("scalar") else array
        kind = node["kind"]
        if kind in _CONTAINERS:
            return _CONTAINERS[kind]([self._value(item, None, makers) for item in node["items"]])
        if "fields" in node:
            return makers[kind](**{name: self._value(item, None, makers) for name, item in node["fields"].items()})
        target = current if type(current).__name__ == kind else makers[kind]()
        self._fill(target, node["attributes"], makers)
        return target


def _plain(value: Any, arrays: list[np.ndarray]) -> Any:
    """A value as JSON can hold it; its arrays are added to `arrays`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic):
        arrays.append(np.asarray(value))
        node: dict[str, Any] = {"array": len(arrays)}  # the JSON itself is the first
        return {**node, "scalar": True} if isinstance(value, np.generic) else node
    kind = type(value).__name__
    if kind in _CONTAINERS:
        return {"kind": kind, "items": [_plain(item, arrays) for item in value]}
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return {"kind": kind, "fields": {name: _plain(getattr(value, name), arrays) for name in names}}
    shared = getattr(value, "shared", ())
    attributes = {name: _plain(item, arrays) for name, item in vars(value).items() if name not in shared}
    return {"kind": kind, "attributes": attributes}
