"""What a Transformer keeps while it decodes: keys and values of the source and the target so far.

B sentences, K beams of each, H heads of size D. A sentence's beams are queries over the same source
keys, which are there once. The targets' keys and values are there once as well: all beams of a
sentence write into one row of slots, K a position, and a mask says which slots are a beam's own
past. So beams change places without a copy of any key.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import Causal, Dense, KeyLengths, Mask

# Keys and values of one attention, each (B, H, L, D), or packed (T, H, D).
KeysValues = tuple[Tensor, Tensor]


# Steps that the memory of a cache is made for at first.
_FIRST_STEPS = 32


class Slots:
    """Keys and values (B, H, slots, D) that grow in place.

    In memory the heads of a slot lie side by side, as a projection makes them: a step's are copied
    in one piece, and slots that are yet to be filled are no gaps between the heads.
    """

    def __init__(self) -> None:
        self._memory: KeysValues | None = None  # (B, slots, H, D)
        self.length = 0

    def append(self, new: KeysValues) -> KeysValues:
        """All so far, of which `new` (B, H, L, D) is the last."""
        keys, values = (heads.transpose(1, 2) for heads in new)
        start, count = self.length, keys.shape[1]
        self.length += count
        if self._memory is None:
            # not copied: a whole target that is read at once may want gradients
            self._memory = keys, values
            return new
        if self.length > self._memory[0].shape[1]:
            slots = max(2 * self.length, _FIRST_STEPS * count)
            self._memory = _grown(self._memory, start, slots)
        for memory, added in zip(self._memory, (keys, values), strict=True):
            memory[:, start : self.length] = added
        keys, values = (memory[:, : self.length].transpose(1, 2) for memory in self._memory)
        return keys, values

    def keep(self, sentences: Tensor) -> None:
        if self._memory is not None:
            keys, values = (memory[:, : self.length] for memory in self._memory)
            self._memory = keys[sentences], values[sentences]


def _grown(memory: KeysValues, used: int, slots: int) -> KeysValues:
    """The same in a tensor of more slots."""
    larger = []
    for tensor in memory:
        fresh = tensor.new_empty(len(tensor), slots, *tensor.shape[2:])
        fresh[:, :used] = tensor[:, :used]
        larger.append(fresh)
    return larger[0], larger[1]


@dataclass
class DecoderState:
    """What decoding token by token keeps between steps, for each decoder layer."""

    source: list[KeysValues]
    source_lengths: Tensor  # (B,)
    beams: int
    own: list[Slots]
    length: int = 0  # target tokens so far
    # Which slots each beam may attend, (B, 1, K, slots); None where there is one beam.
    past: Tensor | None = field(default=None)

    @property
    def source_mask(self) -> KeyLengths:
        return KeyLengths(self.source_lengths)

    def advance(self, tokens: Tensor) -> Mask:
        """The mask over the slots of these next tokens, (B, L) or (B, K), and those before."""
        if self.beams == 1:
            self.length += tokens.shape[1]
            # The last of the queries stands at the last slot, whatever came before.
            return Causal(align="lower_right")
        self.length += 1
        itself = torch.eye(self.beams, dtype=torch.bool, device=tokens.device)
        itself = itself.expand(len(tokens), 1, -1, -1)
        self.past = itself if self.past is None else torch.cat((self.past, itself), dim=-1)
        return Dense(self.past)

    def reorder(self, origin: Tensor) -> None:
        """Beam k of sentence b goes on from beam origin[b, k]; origin (B, K)."""
        if self.past is not None:
            index = origin[:, None, :, None].expand_as(self.past)
            self.past = self.past.gather(2, index)

    def keep(self, sentences: Tensor) -> None:
        """Go on with these sentences (B',) alone."""
        self.source = [(keys[sentences], values[sentences]) for keys, values in self.source]
        self.source_lengths = self.source_lengths[sentences]
        for slots in self.own:
            slots.keep(sentences)
        if self.past is not None:
            self.past = self.past[sentences]
