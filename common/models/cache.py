"""The cache of keys and values while answers are generated."""

from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64  # positions


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, with room behind them: new ones are written there, and nothing is copied.

    DynamicLayer copies all of them for each token.
    """

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """key_states, value_states: the new ones, [b, g, s, d]. Returns all of them."""
        if self.is_initialized:
            self.keys, self.values = appended(self.keys, key_states), appended(self.values, value_states)
        else:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = with_room(key_states), with_room(value_states)
        return self.keys, self.values


def appended(states: Tensor, new: Tensor) -> Tensor:
    """Both, one behind the other: in the memory of ``states`` if that has room, as their strides tell."""
    length = states.shape[2] + new.shape[2]
    if states.stride(1) < length * states.stride(2):
        states = with_room(states, new.shape[2])
    whole = states.as_strided((*states.shape[:2], length, states.shape[3]), states.stride())
    whole[:, :, -new.shape[2] :] = new
    return whole


def with_room(states: Tensor, more: int = 0) -> Tensor:
    """A copy with room for ``more`` positions and ROOM others behind it."""
    batch, groups, length, size = states.shape
    room = states.new_empty(batch, groups, length + more + ROOM, size)
    room[:, :, :length] = states
    return room[:, :, :length]
