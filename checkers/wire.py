"""What a judge and a program send each other: plain data as JSON, and types that JSON lacks.

    (1, {2: "a"})   ->   ["tuple", [1, ["dict", [[2, "a"]]]]]

Neither pickle nor code is sent. Whatever the program sends, the judge makes only values of the
types below from it. Their methods and their equality are Python's own. Next to read: models.py.
"""

import collections
import datetime
import decimal
import fractions
import json
import socket

PARTS = {  # type: the arguments from which a value of this type is made again
    complex: lambda z: (z.real, z.imag),
    range: lambda r: (r.start, r.stop, r.step),
    collections.deque: lambda d: (list(d),),
    fractions.Fraction: lambda q: (q.numerator, q.denominator),
    decimal.Decimal: lambda d: (str(d),),
    datetime.datetime: lambda t: (*t.timetuple()[:6], t.microsecond),
    datetime.date: lambda d: (d.year, d.month, d.day),
    datetime.timedelta: lambda d: (d.days, d.seconds, d.microseconds),
}
MAKE = {kind.__name__: kind for kind in PARTS} | {
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "keys": lambda keys: {key: None for key in keys}.keys(),  # noqa: C420, an alarm can end the loop
    "items": lambda items: {key: value for key, value in items}.items(),  # noqa: C416
    "values": lambda values: dict(enumerate(values)).values(),
}
COLLECTIONS = {
    "list": list,
    "tuple": tuple,
    "frozenset": frozenset,
    "keys": collections.abc.KeysView,
    "items": collections.abc.ItemsView,
    "values": collections.abc.ValuesView,
    "set": collections.abc.Set,
    "iterator": collections.abc.Iterator,  # the items that it has left
}


def pack(value, hold):
    """A value as JSON: a subclass as its base class, an object that is no data as hold(object)."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return value if value.bit_length() < 64 else ["int", hex(value)]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[pack(key, hold), pack(item, hold)] for key, item in value.items()]]
    for name, kind in COLLECTIONS.items():
        if isinstance(value, kind):
            return [name, [pack(item, hold) for item in value]]
    for kind, parts in PARTS.items():
        if isinstance(value, kind):
            return [kind.__name__, [pack(part, hold) for part in parts(value)]]
    return ["object", hold(value)]


def unpack(data, held):
    """The value that was packed; held(number or name) gives an object that is no data."""
    if not isinstance(data, list):
        return data
    name, parts = data
    if name == "object":
        return held(parts)
    if name in ("int", "bytes"):
        return int(parts, 16) if name == "int" else bytes.fromhex(parts)
    if name == "dict":
        return {unpack(key, held): unpack(item, held) for key, item in parts}
    if name in ("set", "frozenset"):  # item by item, so that an alarm can end the loop
        items = {unpack(item, held) for item in parts}
        return items if name == "set" else frozenset(items)
    items = [unpack(item, held) for item in parts]
    return MAKE[name](items) if name in COLLECTIONS else MAKE[name](*items)


def send(channel: socket.socket, message) -> None:
    data = json.dumps(message).encode()
    channel.sendall(len(data).to_bytes(8, "big") + data)


def receive(channel: socket.socket, longest: int = 2**40):
    """The next message; EOFError if the other side is gone, ValueError if it is too long."""
    size = int.from_bytes(read(channel, 8), "big")
    if size > longest:
        raise ValueError(f"a message of {size} bytes")
    return json.loads(read(channel, size))


def read(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            raise EOFError("the other side is gone")
        data += part
    return data
