"""Wrong answers that readers give to the exercises of lesson 20, and the words by which the checks must name them."""

from llama_edu.exercises.rmsnorm import check_fold_weight, check_rms_norm, check_rms_norm_backward

_NORM = "import torch\ndef rms_norm(x, weight, eps):\n    w = x.float()\n    ms = w.square().mean(-1, keepdim=True)\n"
_BACK = (
    "import torch\ndef rms_norm_backward(grad, x, weight, eps):\n"
    "    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)\n    u, gu = x * r, grad * weight\n"
    "    a = (gu * u).mean(-1, keepdim=True)\n"
)
_FOLD = "def fold_weight(weight, matrix):\n"

MISTAKES = [
    (check_rms_norm, _NORM + "    return x / (ms.sqrt() + eps) * weight", "outside the root"),
    (check_rms_norm, _NORM + "    w = w - w.mean(-1, keepdim=True)\n"
     "    return w * torch.rsqrt(w.square().mean(-1, keepdim=True) + eps) * weight", "subtracted the mean"),
    (check_rms_norm, _NORM + "    return w / (w.square().sum(-1, keepdim=True) + eps).sqrt() * weight", "length"),
    (check_rms_norm, _NORM + "    return w / (ms + eps) * weight", "take its root"),
    (check_rms_norm, _NORM + "    return w * (ms + eps).sqrt() * weight", "divided out"),
    (check_rms_norm, _NORM + "    return w * torch.rsqrt(ms + eps) * (1 + weight)", "1 + weight"),
    (check_rms_norm, _NORM.replace("-1", "0") + "    return w * torch.rsqrt(ms + eps) * weight", "first dimension"),
    (check_rms_norm, _NORM.replace("-1", "1") + "    return w * torch.rsqrt(ms + eps) * weight", "another dimension"),
    (check_rms_norm, _NORM + "    return w * torch.rsqrt(ms) * weight", "forgot epsilon"),
    (check_rms_norm, _NORM + "    return (w * torch.rsqrt(ms + eps)).to(x.dtype)", "left out the weight"),
    (check_rms_norm, _NORM + "    return w * torch.rsqrt(w.square().mean() + eps) * weight", "whole tensor"),
    (check_rms_norm, _NORM + "    return w * torch.rsqrt(ms + eps) * weight.float()", "dtype of x"),
    (check_rms_norm, "def rms_norm(x, weight, eps):\n"
     "    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight", "overflow"),
    (check_rms_norm, _NORM + "    r = torch.rsqrt(ms + eps)\n"
     "    r = r.bfloat16().float() if x.dtype is torch.bfloat16 else r\n"
     "    return (w * r * weight.float()).to(x.dtype)", "statistics in float32"),
    (check_rms_norm_backward, _BACK + "    return r * gu, (grad * u).sum(0)", "through the size"),
    (check_rms_norm_backward, _BACK + "    a = (grad * u).mean(-1, keepdim=True)\n"
     "    return r * (grad - a * u), (grad * u).sum(0)", "lacks the weight"),
    (check_rms_norm_backward, _BACK + "    return r * (gu + a * u), (grad * u).sum(0)", "negative"),
    (check_rms_norm_backward, _BACK + "    return r * (gu - 16 * a * u), (grad * u).sum(0)", "divide by dim"),
    (check_rms_norm_backward, _BACK + "    return gu - a * u, (grad * u).sum(0)", "factor 1/rms"),
    (check_rms_norm_backward, _BACK + "    return r * (gu - a * u), grad * u", "sum its gradient"),
    (check_rms_norm_backward, _BACK + "    return r * (gu - a * u), (grad * x).sum(0)", "normalised vector"),
    (check_rms_norm_backward, _BACK + "    return r * (gu - a * u), (grad * u).sum(0, keepdim=True)", "keepdim"),
    (check_rms_norm_backward, _BACK + "    return r * (gu - a * u), (grad * u).sum(-1)", "over the features"),
    (check_rms_norm_backward, _BACK.replace(" + eps", "") + "    return r * (gu - a * u), (grad * u).sum(0)",
     "Epsilon is missing: rms"),
    (check_rms_norm_backward, _BACK + "    v = x * torch.rsqrt(x.square().mean(-1, keepdim=True))\n"
     "    return r * (gu - a * u), (grad * v).sum(0)", "Epsilon is missing in the gradient of weight"),
    (check_rms_norm_backward, _BACK + "    return r * (gu - (gu * u).mean() * u), (grad * u).sum(0)",
     "one mean over all vectors"),
    (check_rms_norm_backward, _BACK + "    return r * (gu - (gu * u).mean(0) * u), (grad * u).sum(0)",
     "runs over the vectors"),
    (check_rms_norm_backward, _BACK + "    return r * (gu - (gu * x).mean(-1, keepdim=True) * x), (grad * u).sum(0)",
     "made from x"),
    (check_rms_norm_backward, _BACK + "    return r * (gu - gu.mean(-1, keepdim=True) - a * u), (grad * u).sum(0)",
     "LayerNorm"),
    (check_rms_norm_backward, _BACK + "    return (grad * u).sum(0), r * (gu - a * u)", "wrong order"),
    (check_fold_weight, _FOLD + "    return matrix", "changed nothing"),
    (check_fold_weight, _FOLD + "    return matrix * weight[:, None]", "the columns"),
    (check_fold_weight, _FOLD + "    return matrix / weight", "divided by the weight"),
    (check_fold_weight, _FOLD + "    return matrix * weight * weight", "twice"),
    (check_fold_weight, _FOLD + "    return (matrix * weight).T", "transpose"),
]  # fmt: skip
