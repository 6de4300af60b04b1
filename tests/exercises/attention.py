"""Wrong answers to the exercises of lesson 22, and the words their diagnosis must contain."""

from llama_edu.exercises.attention import check_attend, check_merge, check_share_heads, check_softmax_backward


def attend(
    scores="q @ k.mT / q.shape[-1] ** 0.5", visible="visible.tril()", fill="-torch.inf", rest=".softmax(-1) @ v"
):
    return f"""
import torch
def attend(q, k, v):
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    visible = {visible}
    return ({scores}).masked_fill(~visible, {fill}){rest}
"""


def merge(body):
    return f"""
import torch
def merge(out_a, lse_a, out_b, lse_b):
    a, b = lse_a[:, None], lse_b[:, None]
    return {body}
"""


def softmax_backward(body):
    return f"def softmax_backward(p, grad_p):\n    return {body}\n"


MISTAKES = [
    (check_attend, attend(scores="q @ k.mT"), "not scaled"),
    (check_attend, attend(scores="q @ k.mT / q.shape[-1]"), "divided by head_dim"),
    (check_attend, attend(visible="visible"), "Nothing is masked"),
    (check_attend, attend(visible="visible.tril(-1)"), "must see itself"),
    (check_attend, attend(visible="visible.tril(1)"), "sees the next one"),
    (check_attend, attend(visible="~visible.tril()"), "upside down"),
    (check_attend, attend(fill="0.0"), "e^0 is 1"),
    (check_attend, attend(rest=".softmax(-2) @ v"), "over the queries"),
    (check_attend, attend(visible="visible", rest=".softmax(-1).tril() @ v"), "after the softmax"),
    (check_attend, attend(rest=".exp() @ v"), "differ from"),
    (check_attend, "def attend(q, k, v):\n    return q @ k.mT\n", "has shape"),
    (
        check_attend,
        attend(rest=".exp() @ v / ((q @ k.mT / 4).masked_fill(~visible, -torch.inf).exp().sum(-1, keepdim=True))"),
        "use torch.softmax",
    ),
    (
        check_share_heads,
        "def share_heads(k, n_heads):\n    return k.repeat(1, n_heads // k.shape[1], 1, 1)\n",
        "0 1 0 1",
    ),
    (check_attend, attend(fill="-1e4"), "Right for small scores only"),
    (check_attend, attend(fill="-1e5"), "Right for small scores only"),
    (
        check_attend,
        "def attend(q, k, v):\n    w = (q @ k.mT / 4).softmax(-1).tril()\n    return w / w.sum(-1, keepdim=True) @ v\n",
        "normalised again",
    ),
    (check_attend, attend(scores="q @ k.mT * q.shape[-1] ** 0.5"), "You multiplied by the root"),
    (check_attend, attend(scores="k @ q.mT / q.shape[-1] ** 0.5"), "exchanged"),
    (check_attend, attend(scores="q @ k.mT / 4 + ~visible * -torch.inf"), "Everything is nan"),
    (check_share_heads, "def share_heads(k, n_heads):\n    return k.repeat_interleave(3, dim=1)\n", "heads only"),
    (check_share_heads, "def share_heads(k, n_heads):\n    return k.repeat_interleave(n_heads, dim=1)\n", "has shape"),
    (
        check_share_heads,
        "def share_heads(k, n_heads):\n"
        "    b, n, s, d = k.shape\n"
        "    return k.repeat_interleave(n_heads // n, dim=2).reshape(b, n_heads, s, d)\n",
        "another axis",
    ),
    (check_softmax_backward, softmax_backward("p * grad_p"), "sum is missing"),
    (check_softmax_backward, softmax_backward("p * (1 - p) * grad_p"), "diagonal"),
    (
        check_softmax_backward,
        softmax_backward("p * (grad_p - grad_p.sum(-1, keepdim=True))"),
        "must be over grad_p * p",
    ),
    (check_softmax_backward, softmax_backward("p * (grad_p - grad_p.mean(-1, keepdim=True))"), "weighted with p"),
    (check_softmax_backward, softmax_backward("p * (grad_p - (grad_p * p).sum(0, keepdim=True))"), "wrong axis"),
    (check_softmax_backward, softmax_backward("p * (grad_p - (grad_p * p).sum())"), "one sum over everything"),
    (check_softmax_backward, softmax_backward("p * ((grad_p * p).sum(-1, keepdim=True) - grad_p)"), "sign"),
    (check_merge, merge("(out_a + out_b) / 2"), "averaged"),
    (check_merge, merge("out_a + out_b"), "normalised already"),
    (check_merge, merge("(a * out_a + b * out_b) / (a + b)"), "weighted with the logarithms"),
    (check_merge, merge("(b.exp() * out_a + a.exp() * out_b) / (a.exp() + b.exp())"), "exchanged"),
    (check_merge, merge("a.exp() * out_a + b.exp() * out_b"), "divide by the sum"),
    (check_merge, merge("(a.exp() * out_a + b.exp() * out_b) / (a.exp() + b.exp())"), "overflows"),
    (check_merge, merge("(a - b).sigmoid() * out_a + (b - a).sigmoid() * out_b"), "nothing in either half"),
]
