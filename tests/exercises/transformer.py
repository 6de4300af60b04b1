"""Wrong answers to the exercises of lesson 24, and the words their diagnosis must contain."""

from llama_edu.exercises.transformer import check_block, check_count_parameters, check_next_token_loss


def block(*lines):
    body = "\n    ".join(lines)
    return f"def block(x, attention, feed_forward, attention_norm, ffn_norm):\n    {body}\n"


def count(attention="2 * cfg.n_heads + 2 * cfg.n_kv_heads", ffn="3", norms="2 * cfg.dim", last="cfg.dim", vocab="2"):
    return f"""
def count_parameters(cfg):
    vocabularies = 1 if cfg.tie_embeddings else 2
    layer = cfg.dim * cfg.head_dim * ({attention}) + {ffn} * cfg.dim * cfg.ffn_dim + {norms}
    return cfg.vocab_size * cfg.dim * {vocab} + cfg.n_layers * layer + {last}
"""


def loss(body):
    return f"import torch.nn.functional as F\ndef next_token_loss(logits, tokens):\n    return {body}\n"


ATTEND = "x = x + attention(attention_norm(x))"
FEED = "return x + feed_forward(ffn_norm(x))"
MISTAKES = [
    (check_block, block("x += attention(attention_norm(x))", FEED), "in place"),
    (check_block, block("h = x + attention(attention_norm(x))", "return h + feed_forward(ffn_norm(x))"), "must read"),
    (check_block, block("x = attention(attention_norm(x))", FEED), "not added to x"),
    (check_block, block(ATTEND, "return feed_forward(ffn_norm(x))"), "replaces it"),
    (check_block, block("x = x + attention(x)", "return x + feed_forward(x)"), "norms are missing"),
    (check_block, block("x = attention_norm(x + attention(x))", "return ffn_norm(x + feed_forward(x))"), "post-norm"),
    (check_block, block(ATTEND, "return x + feed_forward(attention_norm(x))"), "used twice"),
    (check_block, block("return x.sum()"), "shape"),
    (check_count_parameters, count(vocab="2"), "only one"),
    (check_count_parameters, count(vocab="vocabularies", attention="4 * cfg.n_heads"), "n_kv_heads"),
    (check_count_parameters, count(vocab="vocabularies", ffn="2"), "SwiGLU has three"),
    (check_count_parameters, count(vocab="vocabularies", last="0"), "last norm"),
    (check_count_parameters, count(vocab="vocabularies", norms="0", last="0"), "norms are missing"),
    (check_count_parameters, count(vocab="1"), "output matrix is missing"),
    (check_count_parameters, count(vocab="3"), "too many"),
    (check_next_token_loss, loss("F.cross_entropy(logits.flatten(0, 1), tokens.flatten())"), "Nothing is shifted"),
    (
        check_next_token_loss,
        loss("F.cross_entropy(logits[:, 1:].flatten(0, 1), tokens[:, :-1].flatten())"),
        "wrong way",
    ),
    (check_next_token_loss, loss("F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())"), "rolled"),
    (
        check_next_token_loss,
        loss("F.cross_entropy(logits[:, :-1].softmax(-1).flatten(0, 1), tokens[:, 1:].flatten())"),
        "applied twice",
    ),
    (
        check_next_token_loss,
        loss("F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction='sum')"),
        "You summed",
    ),
    (
        check_next_token_loss,
        loss("F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction='none')"),
        "one number",
    ),
]
