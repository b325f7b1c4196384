"""Channels of a store: where each points to, and how it came there."""

from dataclasses import dataclass

from featurestore.log import CHANNELS
from featurestore.published.channels import ChannelMove, is_channel_name, read_moves
from featurestore.store import FeatureStore

MOST = 20
"""Moves of a channel that are shown, the newest ones."""


@dataclass(frozen=True)
class ChannelHistory:
    """One channel, also one that was removed; newest first."""

    name: str
    moves: tuple[ChannelMove, ...]
    num_moves: int

    @property
    def version(self) -> int | None:
        """The snapshot that it points to; None where it was removed."""
        return self.moves[0].version if self.moves else None


def channel_histories(store: FeatureStore) -> list[ChannelHistory]:
    """Read all channels, by name. Raises CorruptFileError."""
    found = []
    for name in filter(is_channel_name, store.storage.list(CHANNELS)):
        moves = read_moves(store.storage, name)[::-1]
        found.append(ChannelHistory(name, tuple(moves[:MOST]), len(moves)))
    return found
