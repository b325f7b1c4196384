"""Channels: names such as `stable`, each of which points to a snapshot, and can be moved to another one.

    channels/stable/00000000000000000003.json      the third move; creating it is the move

What a move says never changes, so the moves are the history of a channel. The newest one says where it points to.
"""

import re
import time
import uuid
from typing import Annotated

from pydantic import Field

from featurestore.errors import ChannelError, CorruptFileError
from featurestore.log import CHANNELS, manifest_path, versions, writer_name
from featurestore.published.versions import append_numbered
from featurestore.spec import LAST_SECOND, MAX_VERSION, OptionalId, RandomId, Sealed, Version, read_sealed
from featurestore.storage.storage import Storage

VersionName = int | str
"""The number of a snapshot, or the name of a channel that points to one."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
# Words that YAML or a user would take for something else.
_OTHERWISE = {"newest", "latest", "none", "null", "true", "false", "yes", "no", "on", "off", "inf", "nan", "y", "n"}
CHANNEL_RULE = (
    "{name!r} is not the name of a channel: a letter first, then letters, digits, '.', '_' and '-', up to 64 in all;"
    f" and not a word that means something else ({', '.join(sorted(_OTHERWISE))})"
)


class ChannelMove(Sealed):
    """One move of a channel; without a version it removed the channel."""

    channel: str
    number: Annotated[int, Field(ge=1, le=MAX_VERSION)]
    version: Version | None
    commit_id: OptionalId  # of the snapshot; empty without one
    reason: str  # for people
    writer: str
    time_s: Annotated[float, Field(ge=0, le=LAST_SECOND)]  # for people
    nonce: RandomId


def is_channel_name(name: str) -> bool:
    """Return whether a channel may have this name."""
    return _NAME.fullmatch(name) is not None and name.lower() not in _OTHERWISE


def check_channel_name(name: str) -> str:
    """Return the name. Raises ChannelError where no channel may have it."""
    if not is_channel_name(name):
        raise ChannelError(CHANNEL_RULE.format(name=name))
    return name


def version_name(text: str) -> VersionName:
    """Read a user's name of a snapshot: its number, or a channel. Raises ValueError."""
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    if not is_channel_name(text):
        raise ValueError(f"{text!r} is neither the number of a snapshot nor the name of a channel")
    return text


def read_moves(storage: Storage, name: str) -> list[ChannelMove]:
    """Read all moves of a channel, the first one first; none where it never was. Raises CorruptFileError."""
    return [_read(storage, name, number) for number in versions(storage, _folder(name))]


def last_move(storage: Storage, name: str) -> ChannelMove | None:
    """Read the newest move of a channel; None if it never existed. Raises CorruptFileError, with the way out."""
    numbers = versions(storage, _folder(name))
    return _read(storage, name, numbers[-1]) if numbers else None


def read_channels(storage: Storage) -> list[ChannelMove]:
    """Read where each channel points to, by name. Raises CorruptFileError."""
    last = [last_move(storage, name) for name in storage.list(CHANNELS) if is_channel_name(name)]
    return [move for move in last if move is not None and move.version is not None]


def find_channel(storage: Storage, name: str) -> ChannelMove:
    """Read where a channel points to. Raises ChannelError where there is none, which names those that there are."""
    move = last_move(storage, check_channel_name(name))
    if move is None or move.version is None:
        known = ", ".join(each.channel for each in read_channels(storage)) or "none"
        raise ChannelError(f"{storage.url} has no channel {name!r}; it has {known}")
    return move


def add_move(
    storage: Storage, name: str, version: int | None, commit_id: str, reason: str, after: int | None = None
) -> ChannelMove:
    """Move a channel; without a version, remove it. `after` as in `append_numbered`.

    For `featurestore.upkeep.history`, which sees that the snapshot does not expire meanwhile.
    """
    writer, now_s, nonce = writer_name(), time.time(), uuid.uuid4().hex

    def move_of(number: int) -> ChannelMove:
        return ChannelMove(
            channel=name,
            number=number,
            version=version,
            commit_id=commit_id,
            reason=reason,
            writer=writer,
            time_s=now_s,
            nonce=nonce,
        )

    return append_numbered(storage, _folder(name), move_of, after)


def _folder(name: str) -> str:
    return f"{CHANNELS}/{check_channel_name(name)}"


def _read(storage: Storage, name: str, number: int) -> ChannelMove:
    path = manifest_path(number, _folder(name))
    way_out = f"set the channel again: crossmedia store channel {storage.url} {name} N"
    try:
        move = read_sealed(storage, path, ChannelMove)
    except FileNotFoundError as error:
        raise CorruptFileError(f"{storage.full(path)} is missing: {way_out}") from error
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}: {way_out}") from error
    if (move.channel, move.number) != (name, number):
        raise CorruptFileError(f"{storage.full(path)} is move {move.number} of channel {move.channel!r}: {way_out}")
    return move
