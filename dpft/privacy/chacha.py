"""ChaCha20's key stream, made where the model is.

OpenSSL makes it on the processor at about a gigabyte a second and every number takes 32 bytes of it, so that a large
subset on a GPU would wait for its noise. The cipher is additions, exclusive ors and rotations of 32-bit words
(Bernstein 2008; RFC 8439, section 2.3), which PyTorch has for every device: the stream is the same, bit for bit.
"""

import torch
from torch import Tensor

_SIGMA = b"expand 32-byte k"
_WORD = 1 << 32


class DeviceStream:
    """The stream of a 32-byte key and a 12-byte nonce, as uniform numbers on a device with float64."""

    def __init__(self, key: bytes, nonce: bytes, device: torch.device) -> None:
        words = torch.frombuffer(bytearray(_SIGMA + key + bytes(4) + nonce), dtype=torch.int32)
        self._start = words.view(4, 4, 1).to(device)
        self._block = 0

    def fill(self, out: Tensor) -> None:
        """Fill ``out``, contiguous float64 of a multiple of 8 numbers, with the stream's next in [0, 1)."""
        blocks = out.numel() // 8
        if self._block + blocks > _WORD:
            raise ValueError("A key's stream ends after 2**32 blocks.")
        words = self._blocks(blocks).view(blocks, 8, 2).to(torch.int64)
        self._block += blocks
        upper = (words[..., 1] << 21) & ((1 << 53) - 1)  # the upper 53 of each 64 bits, low word first
        out.view(-1).copy_((upper | ((words[..., 0] & (_WORD - 1)) >> 11)).view(-1)).mul_(2.0**-53)

    def _blocks(self, n: int) -> Tensor:
        """``(n, 16)`` int32, the next n blocks; additions of int32 wrap as the cipher wants."""
        start = self._start.repeat(1, 1, n)
        counter = torch.arange(self._block, self._block + n, device=start.device)
        start[3, 0] = torch.where(counter < _WORD // 2, counter, counter - _WORD)  # the same 32 bits, signed
        a, b, c, d = start.clone().unbind()
        for _ in range(10):
            a, b, c, d = _quarter_rounds(a, b, c, d)
            a, b, c, d = _quarter_rounds(a, b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0))
            b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
        return torch.stack([a, b, c, d]).add_(start).view(16, n).T.contiguous()


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RFC 8439, section 2.1, of four columns ``(4, n)`` at once."""
    for first, second in ((16, 12), (8, 7)):
        a = a + b
        d = _rotated(d ^ a, first)
        c = c + d
        b = _rotated(b ^ c, second)
    return a, b, c, d


def _rotated(x: Tensor, bits: int) -> Tensor:
    """To the left; PyTorch's shift to the right repeats the sign, which the mask takes off."""
    return (x << bits) | ((x >> (32 - bits)) & ((1 << bits) - 1))
