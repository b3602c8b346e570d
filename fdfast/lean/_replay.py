"""Replay by the embedded Lean: its kernel checks every declaration of an .olean anew.

The library exports Lean's own `Environment.replay`, which is what `leanchecker` does. It is called
here through ctypes, with objects laid out as in lean.h of Lean 4.35.0; `embedded.REPLAYS` names the
versions for which a test has shown that to hold. To be called in a fork that ends afterwards:
nothing is freed.
"""

import ctypes
import os
import struct
from typing import Any

_ARRAY_TAG = 246
_TAG_OFFSET, _WORDS_OFFSET = 7, 8
_STRING_BYTES_OFFSET = 32
_PRIVATE_LEVEL = 2  # of OLeanLevel: the whole file
# A constructor without fields is its number, shifted and marked by the last bit.
_NIL = 1  # AssocList.nil, constructor 0
_LEAF = 3  # the empty tree map, constructor 1


def replay(lean: Any, olean: str) -> str:
    """Return why the kernel refuses the file, "" if it accepts every declaration in it.

    Args:
        lean: the loaded and initialised library.
        olean: the file; what it imports is looked up in $LEAN_PATH.

    Raises:
        OSError: the file, or what it imports, cannot be read.
    """
    calls = _Calls(lean)
    lean.lean_init_task_manager()
    calls.io("lean_init_search_path")
    path = calls.pointer("lean_mk_string", ctypes.c_char_p(os.fsencode(olean)))
    module = _word(calls.io("l_Lean_readModuleData", _pointer(path)), 0)
    imports, names, constants = (_word(module, field) for field in range(3))
    objects = _Objects()
    environment = calls.io(
        "l_Lean_importModules",
        _pointer(imports),
        ctypes.c_void_p.in_dll(lean, "l_Lean_Options_empty"),
        ctypes.c_uint32(0),  # trust level
        _pointer(objects.array([])),  # plugins
        ctypes.c_uint8(0),  # leakEnv
        ctypes.c_uint8(0),  # loadExts: no code of a module runs
        ctypes.c_uint8(_PRIVATE_LEVEL),
        _pointer(_LEAF),  # artifacts
    )
    # A hash map of one bucket, which is a list: there are few constants.
    bucket, count = _NIL, _word(names, 0)
    for place in range(2, count + 2):
        bucket = objects.constructor(1, [_word(names, place), _word(constants, place), bucket])
    new = objects.constructor(0, [2 * count + 1, objects.array([bucket])])
    try:
        calls.io("l_Lean_Environment_replay", _pointer(new), _pointer(environment))
    except OSError as refused:
        return str(refused)
    return ""


class _Objects:
    """Lean objects in our own memory; a reference count of 0 says that nobody may free them."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def constructor(self, number: int, fields: list[int]) -> int:
        return self._object(number, len(fields), fields)

    def array(self, items: list[int]) -> int:
        return self._object(_ARRAY_TAG, 0, [len(items), len(items), *items])

    def _object(self, tag: int, other: int, words: list[int]) -> int:
        size = 8 + 8 * len(words)
        header = struct.pack("<iHBB", 0, size, other, tag)
        buffer = ctypes.create_string_buffer(header + struct.pack(f"<{len(words)}Q", *words), size)
        self._kept.append(buffer)
        return ctypes.addressof(buffer)


class _Calls:
    """Functions of the library by name."""

    def __init__(self, lean: Any) -> None:
        self._lean = lean

    def pointer(self, name: str, *arguments: Any) -> int:
        function = self._lean[name]  # [] gives a function object of its own, not the shared one
        function.restype = ctypes.c_void_p
        result = function(*arguments)
        assert isinstance(result, int)
        return result

    def io(self, name: str, *arguments: Any) -> int:
        """Call a function in IO; its error becomes an OSError."""
        result = self.pointer(name, *arguments)
        value = _word(result, 0)
        if ctypes.c_uint8.from_address(result + _TAG_OFFSET).value == 0:
            return value
        text = self.pointer("lean_io_error_to_string", _pointer(value))
        said = ctypes.string_at(text + _STRING_BYTES_OFFSET, _word(text, 0) - 1)
        raise OSError(said.decode(errors="replace"))


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)


def _word(address: int, number: int) -> int:
    """A field of an object: its number counts words after the header."""
    return ctypes.c_uint64.from_address(address + _WORDS_OFFSET + 8 * number).value
