"""Attention and Philox in plain Python numbers, one element at a time, from the equations.

Slow and obvious: what the oracle itself is held to. Nothing of `rowmax` is used here but the
definition of a mask by `dense`.
"""

from __future__ import annotations

import math

from rowmax.kernels import ALiBi, Mask

from .support import AttentionCase


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds of Philox4x32 on Python ints (Salmon et al. 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def keeps(seed: int, dropout_p: float, b: int, h: int, i: int, j: int) -> bool:
    """Whether the weight of query i for key j survives dropout."""
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    return philox4x32([j // 4, i, h, b], key)[j % 4] >= round(dropout_p * 2**32)


def attention(arguments: AttentionCase) -> tuple[list[float], list[float]]:
    """out and lse of `arguments` (float64), flattened."""
    q, k, v = (t.tolist() for t in (arguments.q, arguments.k, arguments.v))
    B, Hq, Lq, Lk = arguments.shape
    D, Dv = arguments.q.shape[3], arguments.v.shape[3]
    groups = Hq // arguments.k.shape[1]
    mask, bias = arguments.mask, arguments.bias
    if mask is not None:
        dense = mask.dense(B, Hq, Lq, Lk) if isinstance(mask, Mask) else mask
        allowed = dense.expand(B, Hq, Lq, Lk).tolist()
    if bias is not None:
        dense = bias.dense(B, Hq, Lq, Lk) if isinstance(bias, ALiBi) else bias
        added = dense.expand(B, Hq, Lq, Lk).tolist()
    sinks = None if arguments.sinks is None else arguments.sinks.tolist()
    scale = arguments.options.get("scale", 1.0 / math.sqrt(D))
    softcap = arguments.options.get("softcap")
    dropout_p, seed = (arguments.options.get(name, 0) for name in ("dropout_p", "seed"))
    outs, lses = [], []
    for b in range(B):
        for h in range(Hq):
            for i in range(Lq):
                scores = {}
                for j in range(Lk):
                    if mask is not None and not allowed[b][h][i][j]:
                        continue
                    score = scale * math.fsum(
                        q[b][h][i][d] * k[b][h // groups][j][d] for d in range(D)
                    )
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    if bias is not None:
                        score += added[b][h][i][j]
                    if score > -math.inf:
                        scores[j] = score
                terms = list(scores.values()) + ([sinks[h]] if sinks is not None else [])
                highest = max(terms, default=0.0)
                total = math.fsum(math.exp(term - highest) for term in terms)
                lses.append(highest + math.log(total) if terms else -math.inf)
                weights = {j: math.exp(score - highest) / total for j, score in scores.items()}
                if dropout_p > 0:
                    kept = 1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0
                    for j in weights:
                        weights[j] *= kept if keeps(seed, dropout_p, b, h, i, j) else 0.0
                outs += [
                    math.fsum(weight * v[b][h // groups][j][e] for j, weight in weights.items())
                    for e in range(Dv)
                ]
    return outs, lses
