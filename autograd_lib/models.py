"""Three small models to train, measure and take apart: a Transformer, a CNN and an RNN.

In each, what repeats is a chain named `blocks`, each block taking what the one before returns, so
that `plan_checkpoints` and `Settings` find it. Samples of a batch do not depend on one another, so
that a batch may be cut into micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autograd_lib.functions.activations import low_memory_gelu, low_memory_silu

__all__ = ["CustomCNNModel", "CustomRNNModel", "CustomTransformerModel"]

_STD = 0.02  # of the weights of the Transformer, as in GPT-2


class CustomTransformerModel(nn.Module):
    r"""A causal Transformer over tokens: logits of the next token at each position.

    Token and position are embedded, then pass `num_layers` blocks of attention and a feed-forward
    network, $x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x))$, then
    $x \leftarrow x + \mathrm{mlp}(\mathrm{norm}(x))$: with the norm in front, gradients are of one
    size at all depths from the start (Xiong et al., *On layer normalization in the Transformer
    architecture*, 2020). Weights start as in GPT-2 (Radford et al., 2019): normal with standard
    deviation 0.02, and $0.02 / \sqrt{2 \cdot \mathrm{layers}}$ where a branch joins the sum.

    Attention is `F.scaled_dot_product_attention`. In PyTorch 2.13 its fast kernels have no second
    derivative for `create_graph=True`; under
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` it has, and `jet` does without.

    Args:
        vocab_size: Number of tokens.
        d_model: Width of an embedding; the heads of attention are the largest number of 8, 4, 2 and
            1 that divides it.
        num_layers: Number of blocks.
        max_length: Largest number of positions.
        dropout: Probability of dropout for embeddings, attention weights and branches, in [0, 1).
        custom_gradients: Whether GELU is `low_memory_gelu`, which saves a byte per element where
            GELU saves four; in float64 the gradient is the same.

    Example:
        >>> model = CustomTransformerModel(vocab_size=100, d_model=64)
        >>> model(torch.randint(0, 100, (8, 16))).shape
        torch.Size([8, 16, 100])
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        num_layers: int = 4,
        max_length: int = 512,
        dropout: float = 0.0,
        custom_gradients: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(max_length, d_model)
        self.dropout = nn.Dropout(dropout)
        blocks = [_TransformerBlock(d_model, dropout, custom_gradients) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.apply(_initialize)
        for joined in (layer for b in blocks for layer in (b.out_proj, b.linear2)):
            nn.init.normal_(joined.weight, std=_STD / math.sqrt(2 * num_layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            tokens: Shape (batch, seq), int64 (or int32), in [0, vocab_size). Padding at the end
                needs no mask: no position attends to a later one.

        Returns:
            Shape (batch, seq, vocab_size).

        Raises:
            ValueError: The shape is wrong, or the sequence is too long.
            IndexError: A token is out of range. CUDA reports this by a device-side assertion.
        """
        self._check(tokens)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self._embed(tokens) + self.positions(position))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def _embed(self, tokens: Tensor) -> Tensor:
        # Look for the range only after a failure: reading it would synchronize with a GPU.
        try:
            return self.embedding(tokens)
        except IndexError as err:
            raise IndexError(
                f"CustomTransformerModel: expected tokens in [0, {self.embedding.num_embeddings}), "
                f"got {tokens.min()} to {tokens.max()}; make the model with a larger vocab_size, "
                "or give padding any token in range"
            ) from err

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2:
            raise ValueError(
                "CustomTransformerModel: expected tokens of shape (batch, seq), got "
                f"{tuple(tokens.shape)}; tokens[None] is a batch of one sequence"
            )
        if tokens.shape[1] > self.positions.num_embeddings:
            raise ValueError(
                "CustomTransformerModel: expected at most "
                f"max_length={self.positions.num_embeddings} positions, got {tokens.shape[1]}; cut "
                "the sequence, or make the model with a larger max_length"
            )


class _TransformerBlock(nn.Module):
    """Attention and a feed-forward network, each normalized first and added to its input."""

    def __init__(self, width: int, dropout: float, custom: bool) -> None:
        super().__init__()
        self.heads = math.gcd(width, 8)
        self.norm1 = nn.LayerNorm(width)
        # Without biases: softmax ignores that of the keys, whose gradient would be rounding.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.activation = _LowMemoryGELU() if custom else nn.GELU()
        self.linear2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, seq, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.dropout(self.out_proj(mixed.transpose(1, 2).flatten(2)))
        inner = self.activation(self.linear1(self.norm2(x)))
        return x + self.dropout(self.linear2(inner))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class CustomCNNModel(nn.Module):
    r"""A residual network over images, with the norm and the activation in front of convolutions.

    A convolution, then one block for each pair of neighbors in `channels`,
    $x \leftarrow \mathrm{shortcut}(x) + \mathrm{conv}(\mathrm{silu}(\mathrm{norm}(
    \mathrm{conv}(\mathrm{silu}(\mathrm{norm}(x))))))$ (He et al., *Identity mappings in deep
    residual networks*, 2016), then the mean over all places and a linear layer. A block that
    changes the number of channels halves height and width, rounded up, so that images of any size
    from 1 x 1 on will do. SiLU, unlike ReLU, has derivatives of every order.

    The second convolution of each of the n blocks starts at $1 / \sqrt n$ of He's scale, so that
    the sum does not grow with depth.

    GroupNorm, unlike BatchNorm, treats each sample by itself: gradients of micro-batches add up,
    each sample has its own gradient under `torch.func.vmap`, and derivatives of higher order exist.
    It has groups of 16 channels, or one group where 16 does not divide them.

    Args:
        input_channels: Channels of an image.
        num_classes: Number of logits.
        channels: Channels after the first convolution, then after each block.
        dropout: Probability of dropout before the linear layer, in [0, 1).
        custom_gradients: Whether SiLU is `low_memory_silu`, which saves a byte per element where
            SiLU saves four; in float64 the gradient is the same.

    Example:
        >>> cnn = CustomCNNModel(input_channels=3, num_classes=10)
        >>> cnn(torch.randn(2, 3, 17, 9)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        channels: Sequence[int] = (32, 32, 64, 64, 128, 128),
        dropout: float = 0.0,
        custom_gradients: bool = False,
    ) -> None:
        super().__init__()
        self.stem = _conv(input_channels, channels[0], 3)
        gain = max(len(channels) - 1, 1) ** -0.5
        block = partial(_ResidualBlock, custom=custom_gradients, gain=gain)
        self.blocks = nn.Sequential(*(block(*pair) for pair in pairwise(channels)))
        self.norm = _norm(channels[-1])
        self.activation = _silu(custom_gradients)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            images: Shape (batch, input_channels, height, width), floating point, best with mean 0
                and standard deviation 1.

        Returns:
            Shape (batch, num_classes).

        Raises:
            ValueError: The shape is wrong.
        """
        channels = self.stem.in_channels
        if images.dim() != 4 or images.shape[1] != channels or 0 in images.shape[2:]:
            raise ValueError(
                f"CustomCNNModel: expected images of shape (batch, {channels}, height, width), got "
                f"{tuple(images.shape)}; images[None] is a batch of one, and images.permute(0, 3, "
                "1, 2) puts channels that come last in their place"
            )
        x = self.activation(self.norm(self.blocks(self.stem(images))))
        return self.head(self.dropout(x.mean((2, 3))))


class _ResidualBlock(nn.Module):
    """Two convolutions, each of them normalized and activated first, added to the input."""

    def __init__(self, inputs: int, outputs: int, *, custom: bool, gain: float) -> None:
        super().__init__()
        same = inputs == outputs
        stride = 1 if same else 2
        self.norm1 = _norm(inputs)
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.norm2 = _norm(outputs)
        self.conv2 = _conv(outputs, outputs, 3, gain=gain)
        self.activation = _silu(custom)
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(self.activation(self.norm1(x)))
        return self.shortcut(x) + self.conv2(self.activation(self.norm2(branch)))


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, gain: float = 1.0) -> nn.Conv2d:
    # Without a bias: the next norm subtracts it, or has one of its own.
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.normal_(conv.weight, std=gain * math.sqrt(2 / (inputs * size**2)))
    return conv


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels)


class CustomRNNModel(nn.Module):
    r"""Layers of LSTM over a sequence: an output at each of its steps.

    Recurrent weights start orthogonal (Saxe et al., 2014), those of the inputs by Glorot's rule,
    and the model remembers from the start: the bias of the forget gates is 1 (Jozefowicz et al.,
    2015).

    There is no `custom_gradients`: a fused kernel decides what a layer saves. In
    PyTorch 2.13 `nn.LSTM` stays uncompiled within `torch.compile`, with a graph break, and `jet`
    has no rule for it.

    Args:
        input_size: Features of a step.
        hidden_size: Features of the state.
        output_size: Features of the output, by a linear layer; None for the states themselves.
        num_layers: Number of layers.

    Example:
        >>> rnn = CustomRNNModel(input_size=100, hidden_size=128)
        >>> rnn(torch.randn(2, 7, 100)).shape
        torch.Size([2, 7, 128])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int | None = None,
        *,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        sizes = [input_size] + [hidden_size] * num_layers
        self.blocks = nn.Sequential(*(_RecurrentBlock(*pair) for pair in pairwise(sizes)))
        self.head = nn.Identity() if output_size is None else nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs.

        Args:
            x: Shape (batch, seq, input_size), floating point.

        Returns:
            Shape (batch, seq, output_size or hidden_size).
        """
        return self.head(self.blocks(x))


class _RecurrentBlock(nn.Module):
    """One layer, which returns its states alone."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, batch_first=True)
        of_inputs, recurrent, bias, other_bias = self.rnn.parameters()
        nn.init.xavier_uniform_(of_inputs)
        for gate in recurrent.data.split(hidden):
            nn.init.orthogonal_(gate)
        nn.init.zeros_(bias)
        nn.init.zeros_(other_bias)
        nn.init.ones_(bias.data[hidden : 2 * hidden])  # the second of four gates

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class _LowMemoryGELU(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return low_memory_gelu(input)


class _LowMemorySiLU(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return low_memory_silu(input)


def _silu(custom: bool) -> nn.Module:
    return _LowMemorySiLU() if custom else nn.SiLU()
